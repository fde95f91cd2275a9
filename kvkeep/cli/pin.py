"""`kvkeep pin` and `kvkeep unpin`: a prompt, a prefix that the web page names, a namespace, or everything."""

from __future__ import annotations

import argparse
from typing import Any

from kvkeep.cli.fleet import Keeper, add_keepers, each
from kvkeep.cli.prompt import add_prompt, chain, space, tokens
from kvkeep.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both."""
    add_keepers(parser)
    add_prompt(parser)
    parser.add_argument("--prefix", metavar="NAME", help="a prefix, as the web page names it")
    parser.add_argument("--all", action="store_true", help="all that is held")


def run(args: argparse.Namespace) -> int:
    """Tell all of them."""
    prompt = tokens(args)
    if not (args.all or args.prefix or args.namespace or prompt is not None):
        raise ConfigError("what? give --tokens, --text, --prefix, --namespace or --all")

    def tell(keeper: Keeper) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if args.prefix is not None:
            about["prefix"] = args.prefix
        elif not args.all:
            of = space(keeper, args.namespace)
            about["namespace"] = of["namespace"]
            if prompt is not None:
                about["keys"] = chain(of, prompt, args.salt).hex()
        return keeper.call(f"/api/{args.command}", about)

    return each(args, tell, _line)


def _line(said: dict[str, Any]) -> str:
    ((name, count),) = said.items()
    return f"{count} chunks {name.partition('_')[0]}"
