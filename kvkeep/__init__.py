"""kvkeep keeps the KV cache of LLM inference: a context that it holds is not prefilled again."""

__version__ = "0.1.0"

__all__ = ["__version__"]
