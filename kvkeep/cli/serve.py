"""`kvkeep serve`: run a keeper until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING

from kvkeep import config
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.observe.logs import set_up
from kvkeep.observe.traces import Traces, otlp
from kvkeep.observe.watch import Watch, tier_names
from kvkeep.tiers.peer_nixl import loaded
from kvkeep.wire.server import KeeperServer

if TYPE_CHECKING:
    from kvkeep.observe.http import Web

__all__ = ["add_arguments", "run"]

log = logging.getLogger("kvkeep.keeper")


_OPTIONS = {  # each is a field of KeeperConfig; those of several values are given several times
    "socket": ("PATH", "path of the unix socket (default: {socket})"),
    "memory": ("SIZE", "bound of the host memory used, e.g. 64GiB (default: 4GiB)"),
    "policy": ("NAME", "eviction policy: lru, arc or s3fifo (default: lru)"),
    "prefault": ("WHETHER", "allocate memory ahead of use: yes or no (default: yes)"),
    "huge_pages": ("WHETHER", "use reserved huge pages: yes or no (default: no)"),
    "linger": ("SECONDS", "end after so long without a client (default: 0, never)"),
    "tiers": ("URL", "a place below memory, e.g. fs:///data/kv?capacity=500GiB; several: the fastest first"),
    "peers": ("ADDRESS:PORT", "let other keepers read this one there, e.g. 10.0.0.1:7440?cert=FILE&key=FILE"),
    "drain": ("SECONDS", "how long the end waits for chunks to be written to the tiers (default: 30)"),
    "record": ("FILE", "record requests for `kvkeep bench simulate`: ids and lengths only"),
    "http": ("ADDRESS:PORT", "serve metrics, health and a web page there, e.g. 0.0.0.0:9400?token_file=FILE"),
    "tenant_quotas": ("TENANT=SIZE", "what a tenant (or `default`: each without its own) may hold in memory"),
    "log_format": ("NAME", "how the log is written: text or json (default: text)"),
    "traces": ("URL", "send OpenTelemetry spans to this OTLP/HTTP endpoint"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the keeper; the same names as in an engine's configuration."""
    for name, (metavar, text) in _OPTIONS.items():
        action = "append" if name in ("tiers", "tenant_quotas") else "store"
        flag = "--" + (name.removesuffix("s") if action == "append" else name).replace("_", "-")
        said = text.format(socket=config.default_socket())
        parser.add_argument(flag, dest=name, action=action, metavar=metavar, help=said)


def run(args: argparse.Namespace) -> int:
    """Serve; returns 0 after SIGTERM or SIGINT, or when the last client of an embedded keeper left."""
    try:
        return _run(args)
    except KVKeepError as error:
        if args.linger is not None:  # an engine has started it, and reads this
            print(error)
        raise


def _run(args: argparse.Namespace) -> int:
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    settings = config.load(config.KeeperConfig, {"socket": config.default_socket(), **given})
    set_up(settings.log_format)
    with contextlib.suppress(OSError):
        # An embedded keeper inherits its engine's pinning, on whose cores it must not depend.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with contextlib.suppress(OSError):
        # What an engine tells it must not stop the engine: the keeper wakes up without taking over its core.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    asyncio.run(_serve(settings))
    if loaded():
        logging.shutdown()
        os._exit(0)
    return 0


async def _serve(settings: config.KeeperConfig) -> None:
    server = KeeperServer(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    look = _look_on(server, settings)

    def ready() -> None:
        about = {"keeper": server.identity[:8], "socket": settings.socket, "policy": settings.policy}
        about["memory"] = f"{server.keeper.arena.nbytes / 2**30:.2f} GiB"
        log.info("keeper %(keeper)s serves %(socket)s: %(memory)s of memory, policy %(policy)s", about)
        if look is not None:
            look.announce()

    try:
        if look is not None:
            await look.start()
        await server.run(ready)
    finally:
        if look is not None:
            await look.close()
        if server.watch is not None:
            server.watch.close()
    log.info("keeper %(keeper)s has stopped", {"keeper": server.identity[:8]})


def _look_on(server: KeeperServer, settings: config.KeeperConfig) -> Web | None:
    """What `--http` and `--traces` ask for."""
    traces = None if settings.traces is None else Traces(otlp(settings.traces))
    if settings.http is None:
        if traces is not None:
            server.watch = Watch(server.keeper, tier_names(server.movers), traces)
        return None
    try:
        from kvkeep.observe.http import Web
    except ImportError as error:
        raise ConfigError(f"--http needs {error.name}: pip install 'kvkeep[http]'") from error
    return Web(server, settings, traces)
