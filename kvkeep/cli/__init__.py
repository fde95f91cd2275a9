"""The `kvkeep` command."""

from kvkeep.cli.main import main

__all__ = ["main"]
