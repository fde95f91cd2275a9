"""`kvkeep serve`: run a keeper until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal

from kvkeep import config
from kvkeep.wire.server import KeeperServer

__all__ = ["add_arguments", "run"]

log = logging.getLogger("kvkeep.keeper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the keeper; the same names as in an engine's configuration."""
    parser.add_argument("--socket", help=f"path of the unix socket (default: {config.default_socket()})")
    parser.add_argument("--memory", help="bound of the host memory used, e.g. 64GiB (default: 4GiB)")
    parser.add_argument("--policy", help="eviction policy: lru, arc or s3fifo (default: lru)")
    parser.add_argument("--prefault", help="allocate memory ahead of use: yes or no (default: yes)")
    parser.add_argument("--huge-pages", help="use reserved huge pages: yes or no (default: no)")
    parser.add_argument("--linger", help="end after so many seconds without a client (default: 0, never)")
    parser.add_argument(
        "--tier",
        dest="tiers",
        action="append",
        metavar="URL",
        help="a place below memory, e.g. fs:///data/kv?capacity=500GiB; several: the fastest first",
    )
    parser.add_argument(
        "--drain", help="seconds that the end waits for chunks to be written to the tiers (default: 30)"
    )
    parser.add_argument(
        "--record", metavar="FILE", help="record requests for `kvkeep bench simulate`: ids and lengths only"
    )


def run(args: argparse.Namespace) -> int:
    """Serve; returns 0 after SIGTERM or SIGINT, or when the last client of an embedded keeper left."""
    names = ("socket", "memory", "policy", "prefault", "huge_pages", "linger", "tiers", "drain", "record")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = config.load(config.KeeperConfig, {"socket": config.default_socket(), **given})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    with contextlib.suppress(OSError):
        # An embedded keeper inherits its engine's pinning, on whose cores it must not depend.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    asyncio.run(_serve(settings))
    return 0


async def _serve(settings: config.KeeperConfig) -> None:
    server = KeeperServer(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    def ready() -> None:
        log.info(
            "keeper %s serves %s: %.2f GiB of memory, policy %s",
            server.identity[:8],
            settings.socket,
            server.keeper.arena.nbytes / 2**30,
            settings.policy,
        )

    await server.run(ready)
    log.info("keeper %s has stopped", server.identity[:8])
