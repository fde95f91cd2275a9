"""`kvkeep move`: have a prompt's chunks in memory, or in a tier. `kvkeep compress`: there is no codec yet."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from kvkeep.cli.fleet import Keeper, add_keepers, each
from kvkeep.cli.prompt import add_prompt, chain, space, tokens
from kvkeep.errors import ConfigError
from kvkeep.identity import tenant_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both."""
    add_keepers(parser)
    add_prompt(parser)
    parser.add_argument(
        "--to", default="memory", metavar="PLACE", help="memory (default), or the start of a tier's URL"
    )
    parser.add_argument("--drop", action="store_true", help="forget in memory what the tier has then")


def run(args: argparse.Namespace) -> int:
    """Tell all of them, and wait for it as long as --timeout allows."""
    if args.command == "compress":
        said = "nothing is compressed: there are no codecs yet, KV is kept as the engine has it"
        print(said, file=sys.stderr)
        if args.json:
            print('{"keepers": []}')
        return 0
    if args.drop and args.to == "memory":
        raise ConfigError("--drop forgets what a tier has: name one, as --to fs")
    prompt = tokens(args)
    if prompt is None:
        raise ConfigError("which prompt? give --tokens or --text")

    def tell(keeper: Keeper) -> dict[str, Any]:
        of = space(keeper, args.namespace)
        about = {"namespace": of["namespace"], "keys": chain(of, prompt, args.salt).hex()}
        about |= {"to": args.to, "drop": args.drop, "wait": min(args.timeout / 2, 600.0)}
        if args.salt:
            about["tenant"] = tenant_of(args.salt).hex()
        return keeper.call("/api/move", about) | {"to": args.to}

    return each(args, tell, _line)


def _line(said: dict[str, Any]) -> str:
    dropped = f", {said['dropped_chunks']} dropped from memory" if said.get("dropped_chunks") else ""
    return f"{said['there_chunks']} of {said['asked_chunks']} chunks are in {said['to']}{dropped}"
