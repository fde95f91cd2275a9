"""`kvkeep health`, `lookup`, `pin`, `unpin`, `move`, `compress` and `clear`: one call to each keeper."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from kvkeep.cli.fleet import Keeper, add_keepers, each
from kvkeep.cli.prompt import add_prompt, chain, space, tokens
from kvkeep.config import default_socket
from kvkeep.errors import ConfigError, RequestRefused
from kvkeep.identity import tenant_of
from kvkeep.wire.client import Connection

__all__ = ["add_arguments", "run"]

Said = dict[str, Any]
Tell = Callable[[Keeper], Said]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command that `parser` is for."""
    command = parser.prog.rpartition(" ")[2]
    add_keepers(parser)
    if command not in ("health", "clear"):
        add_prompt(parser)
    if command in ("pin", "unpin"):
        parser.add_argument("--prefix", metavar="NAME", help="a prefix, as the web page names it")
        parser.add_argument("--all", action="store_true", help="all that is held")
    elif command in ("move", "compress"):
        parser.add_argument(
            "--to", default="memory", metavar="PLACE", help="memory (default), or the start of a tier's URL"
        )
        parser.add_argument("--drop", action="store_true", help="forget in memory what the tier has then")
    elif command == "clear":
        parser.add_argument(
            "--socket", default=default_socket(), help="socket of the keeper (default: %(default)s)"
        )
        parser.add_argument(
            "--namespace", type=int, help="only this namespace, by its number in `kvkeep status`"
        )
        parser.add_argument("--tenant", metavar="SALT", help="only what requests with this cache_salt saved")


def run(args: argparse.Namespace) -> int:
    """Ask or tell all of them; returns 1 where one failed or, asked for its health, is not ready."""
    if args.command == "compress":
        print(
            "nothing is compressed: there are no codecs yet, KV is kept as the engine has it", file=sys.stderr
        )
        if args.json:
            print('{"keepers": []}')
        return 0
    if args.command == "clear" and args.http is None:
        return _clear_here(args)
    prepare, line = _ACTIONS[args.command]
    return each(args, prepare(args), line)


def _health(args: argparse.Namespace) -> Tell:
    def ask(keeper: Keeper) -> Said:
        try:
            return keeper.call("/readyz")
        except RequestRefused as refusal:
            raise RequestRefused(f"not ready: {refusal}") from refusal

    return ask


def _ready(said: Said) -> str:
    off = [name for name, state in said["tiers"].items() if state != "on"]
    return "ready" + (f", without {', '.join(off)}" if off else "")


def _lookup(args: argparse.Namespace) -> Tell:
    """It uses nothing, and counts nowhere."""
    prompt = _prompt(args)

    def ask(keeper: Keeper) -> Said:
        of, about = _about(keeper, args, prompt)
        said = keeper.call("/api/lookup", about)
        return {**said, "held_tokens": said["held_chunks"] * of["chunk_tokens"], "asked_tokens": len(prompt)}

    return ask


def _pin(args: argparse.Namespace) -> Tell:
    prompt = tokens(args)
    if not (args.all or args.prefix or args.namespace or prompt is not None):
        raise ConfigError("what? give --tokens, --text, --prefix, --namespace or --all")

    def tell(keeper: Keeper) -> Said:
        about: Said = {}
        if args.prefix is not None:
            about["prefix"] = args.prefix
        elif not args.all:
            about = _about(keeper, args, prompt)[1]
        return keeper.call(f"/api/{args.command}", about)

    return tell


def _pinned(said: Said) -> str:
    ((name, count),) = said.items()
    return f"{count} chunks {name.partition('_')[0]}"


def _move(args: argparse.Namespace) -> Tell:
    if args.drop and args.to == "memory":
        raise ConfigError("--drop forgets what a tier has: name one, as --to fs")
    prompt = _prompt(args)

    def tell(keeper: Keeper) -> Said:
        about = _about(keeper, args, prompt)[1]
        about |= {"to": args.to, "drop": args.drop, "wait": min(args.timeout / 2, 600.0)}
        if args.salt:
            about["tenant"] = tenant_of(args.salt).hex()
        return keeper.call("/api/move", about) | {"to": args.to}

    return tell


def _moved(said: Said) -> str:
    dropped = f", {said['dropped_chunks']} dropped from memory" if said.get("dropped_chunks") else ""
    return f"{said['there_chunks']} of {said['asked_chunks']} chunks are in {said['to']}{dropped}"


def _clear(args: argparse.Namespace) -> Tell:
    about = {"namespace": args.namespace, "tenant": tenant_of(args.tenant).hex() or None}
    return lambda keeper: keeper.call("/api/clear", about)


def _clear_here(args: argparse.Namespace) -> int:
    with closing(Connection.open(args.socket, f"cli-{os.getpid()}", timeout=args.timeout)) as connection:
        print(_cleared({"forgotten_chunks": connection.clear(args.namespace, tenant_of(args.tenant))}))
    return 0


def _cleared(said: Said) -> str:
    return f"{said['forgotten_chunks']} chunks forgotten"


def _prompt(args: argparse.Namespace) -> list[int]:
    prompt = tokens(args)
    if prompt is None:
        raise ConfigError("which prompt? give --tokens or --text")
    return prompt


def _about(keeper: Keeper, args: argparse.Namespace, prompt: list[int] | None) -> tuple[Said, Said]:
    """The namespace that is meant; and what a request says of it, and of the chunks of the prompt."""
    of = space(keeper, args.namespace)
    keys = {} if prompt is None else {"keys": chain(of, prompt, args.salt).hex()}
    return of, {"namespace": of["namespace"], **keys}


_ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], Tell], Callable[[Said], str]]] = {
    "health": (_health, _ready),
    "lookup": (_lookup, lambda said: f"{said['held_tokens']} of {said['asked_tokens']} tokens"),
    "pin": (_pin, _pinned),
    "unpin": (_pin, _pinned),
    "move": (_move, _moved),
    "clear": (_clear, _cleared),
}
