"""A prompt on the command line, and its chunk keys in a keeper's namespace."""

from __future__ import annotations

import argparse
import re
import struct
import sys
from pathlib import Path
from typing import Any

from kvkeep.cli.fleet import Keeper, fetch
from kvkeep.errors import ConfigError, RequestRefused
from kvkeep.identity import ChainHasher, encode_extra

__all__ = ["add_prompt", "chain", "read_text", "space", "tokens"]


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Options that say which prompt, and of which model."""
    parser.add_argument(
        "--namespace",
        metavar="NAME",
        help="its number, the start of its fingerprint or its model's name, as `kvkeep status` has them "
        "(default: the only one)",
    )
    parser.add_argument("--tokens", metavar="FILE", help="the prompt's token ids; -: standard input")
    parser.add_argument("--text", metavar="FILE", help="the prompt's text, UTF-8; -: standard input")
    parser.add_argument("--chat", action="store_true", help="the text is a user's message of a chat")
    parser.add_argument(
        "--engine", default="http://127.0.0.1:8000", help="server that tokenises (default: %(default)s)"
    )
    parser.add_argument("--model", help="the server's name of the model (default: its first)")
    parser.add_argument("--salt", help="the request's cache_salt")


def tokens(args: argparse.Namespace) -> list[int] | None:
    """The prompt's token ids; None: no prompt was given. Raises ConfigError."""
    if args.tokens is not None and args.text is not None:
        raise ConfigError("give --tokens or --text, not both")
    if args.tokens is not None:
        words = re.findall(r"[^\s,\[\]]+", read_text(args.tokens))
        if not all(word.isdecimal() for word in words):
            raise ConfigError(f"{args.tokens} has more in it than token ids")
        return [int(word) for word in words]
    if args.text is None:
        return None
    text = read_text(args.text)
    said = {"messages": [{"role": "user", "content": text}]} if args.chat else {"prompt": text}
    engine = args.engine.rstrip("/")
    try:
        said["model"] = args.model or fetch(f"{engine}/v1/models", None, args.timeout)["data"][0]["id"]
        return [int(token) for token in fetch(f"{engine}/tokenize", said, args.timeout)["tokens"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{args.engine} does not tokenise ({error}): give --engine, or --tokens") from error


def space(keeper: Keeper, name: str | None) -> dict[str, Any]:
    """The namespace of one keeper that is meant. Raises RequestRefused where it is not one."""
    spaces = keeper.call("/api/state")["keeper"]["namespaces"]
    if name is not None:
        spaces = [
            one
            for one in spaces
            if name in (str(one["namespace"]), *one["label"].split())
            or (len(name) >= 6 and one["fingerprint"].startswith(name))
        ]
    if len(spaces) != 1:
        known = f"{len(spaces)} namespaces here" if name is None else f"{len(spaces)} namespaces are {name!r}"
        raise RequestRefused(f"{known}: name one with --namespace")
    found: dict[str, Any] = spaces[0]
    return found


def chain(of: dict[str, Any], prompt: list[int], salt: str | None) -> bytes:
    """Keys of a prompt's whole chunks in a namespace, as the engine makes them. Raises RequestRefused."""
    size = int(of["chunk_tokens"])
    if not size:
        raise RequestRefused("its engine does not say how many tokens a chunk has")
    hasher, count = ChainHasher(bytes.fromhex(of["fingerprint"]), size), len(prompt) // size
    if not count:
        raise RequestRefused(f"a prompt of {len(prompt)} tokens has no whole chunk of {size}")
    # What vLLM 0.32 makes of a salt: an extra key of the first block, and so of the first chunk.
    extra = None if salt is None else encode_extra((("cache_salt", salt),))
    salted = None if extra is None else [extra, *[None] * (count - 1)]
    try:
        hasher.extend(prompt, salted)
    except struct.error as error:
        raise ConfigError(f"not token ids: {error}") from error
    return hasher.keys(0, count)


def read_text(name: str) -> str:
    """A text file; -: standard input. Raises ConfigError."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name} as UTF-8 text: {error}") from error
