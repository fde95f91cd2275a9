"""`kvkeep route`: an OpenAI-compatible router in front of engines."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

from kvkeep.observe.logs import set_up
from kvroute.options import Options, add_arguments, read_options
from kvroute.server import Router

__all__ = ["add_arguments", "run"]

log = logging.getLogger("kvroute.command")


def run(args: argparse.Namespace) -> int:
    """Route until SIGTERM or SIGINT; a second one ends it without waiting for what runs."""
    options = read_options(args)
    set_up("text")
    logging.getLogger("kvroute").setLevel(logging.INFO)
    asyncio.run(_route(options))
    return 0


async def _route(options: Options) -> None:
    stop = asyncio.Queue[int]()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.put_nowait, number)
    router = Router(options)
    await router.start()
    try:
        log.info("routing at %s by %s to %d engines", router.url, options.policy, len(router.pool.backends))
        if not options.loopback and not options.tls and options.api_keys is not None:
            log.warning("keys come to %s in the clear: give --tls, or put a TLS proxy in front", router.url)
        await stop.get()
        again = asyncio.ensure_future(stop.get())
        draining = asyncio.ensure_future(router.drain())
        await asyncio.wait({again, draining}, return_when=asyncio.FIRST_COMPLETED)
        for task in (again, draining):
            task.cancel()
    finally:
        await router.close()
    log.info("the router has stopped")
