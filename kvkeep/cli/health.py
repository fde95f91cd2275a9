"""`kvkeep health`: whether keepers are up and ready."""

from __future__ import annotations

import argparse
from typing import Any

from kvkeep.cli.fleet import Keeper, add_keepers, each
from kvkeep.errors import RequestRefused

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep health`."""
    add_keepers(parser)


def run(args: argparse.Namespace) -> int:
    """Ask all of them; returns 1 where one is not ready."""
    return each(args, _ask, _line)


def _ask(keeper: Keeper) -> dict[str, Any]:
    try:
        return keeper.call("/readyz")
    except RequestRefused as refusal:
        raise RequestRefused(f"not ready: {refusal}") from refusal


def _line(said: dict[str, Any]) -> str:
    off = [name for name, state in said["tiers"].items() if state != "on"]
    return "ready" + (f", without {', '.join(off)}" if off else "")
