"""`kvkeep lookup`: how much of a prompt keepers hold in memory. It uses nothing, and counts nowhere."""

from __future__ import annotations

import argparse
from typing import Any

from kvkeep.cli.fleet import Keeper, add_keepers, each
from kvkeep.cli.prompt import add_prompt, chain, space, tokens
from kvkeep.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep lookup`."""
    add_keepers(parser)
    add_prompt(parser)


def run(args: argparse.Namespace) -> int:
    """Ask all of them."""
    prompt = tokens(args)
    if prompt is None:
        raise ConfigError("which prompt? give --tokens or --text")

    def ask(keeper: Keeper) -> dict[str, Any]:
        of = space(keeper, args.namespace)
        keys = chain(of, prompt, args.salt)
        said = keeper.call("/api/lookup", {"namespace": of["namespace"], "keys": keys.hex()})
        return {**said, "held_tokens": said["held_chunks"] * of["chunk_tokens"], "asked_tokens": len(prompt)}

    return each(args, ask, _line)


def _line(said: dict[str, Any]) -> str:
    return f"{said['held_tokens']} of {said['asked_tokens']} tokens"
