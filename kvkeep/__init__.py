"""kvkeep keeps the KV cache of LLM inference and gives it back, so that no context is prefilled twice."""

__version__ = "0.1.0"

__all__ = ["__version__"]
