"""`kvkeep clear`: make a keeper, or many, forget."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kvkeep.cli.fleet import add_keepers, each
from kvkeep.config import default_socket
from kvkeep.identity import tenant_of
from kvkeep.wire.client import Connection

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep clear`."""
    parser.add_argument(
        "--socket", default=default_socket(), help="socket of the keeper (default: %(default)s)"
    )
    add_keepers(parser)
    parser.add_argument("--namespace", type=int, help="only this namespace, by its number in `kvkeep status`")
    parser.add_argument("--tenant", metavar="SALT", help="only what requests with this cache_salt saved")


def run(args: argparse.Namespace) -> int:
    """Clear, and say how much went: over the socket, or where --http is given over that."""
    tenant = tenant_of(args.tenant)
    if args.http is not None:
        about = {"namespace": args.namespace, "tenant": tenant.hex() or None}
        return each(args, lambda keeper: keeper.call("/api/clear", about), _line)
    connection = Connection.open(args.socket, f"cli-{os.getpid()}", timeout=args.timeout)
    try:
        print(_line({"forgotten_chunks": connection.clear(args.namespace, tenant)}))
    finally:
        connection.close()
    return 0


def _line(said: dict[str, Any]) -> str:
    return f"{said['forgotten_chunks']} chunks forgotten"
