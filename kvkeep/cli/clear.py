"""`kvkeep clear`: make a keeper forget."""

from __future__ import annotations

import argparse
import os

from kvkeep.config import default_socket
from kvkeep.wire.client import Connection

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep clear`."""
    parser.add_argument(
        "--socket", default=default_socket(), help="socket of the keeper (default: %(default)s)"
    )
    parser.add_argument("--namespace", type=int, help="only this namespace, by its number in `kvkeep status`")


def run(args: argparse.Namespace) -> int:
    """Clear, and say how much went."""
    connection = Connection.open(args.socket, f"cli-{os.getpid()}", timeout=10.0)
    try:
        print(f"{connection.clear(args.namespace)} chunks forgotten")
    finally:
        connection.close()
    return 0
