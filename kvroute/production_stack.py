"""production-stack's router, unmodified, with its KV-aware routing served by our index.

    python -m kvroute.production_stack --kvkeep-events-port 5557 [the router's own arguments]

Its `--routing-logic kvaware` imports LMCache's controller and two of its messages by name. Here these names
lead to an index of the engines' KV events instead. Which engines there are, the router's own discovery knows:
what it lists is followed at its host's events port, and forgotten when it goes. Nothing listens.

An engine whose events cannot be reached is not named. The router names an engine by its host alone, has one
model's tokenizer, and does not say which model a prompt is for. So engines that share a host, or that do not
all serve the same models, are not named either: the router then falls back to its session key or to the load,
as it does where nobody holds the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec

from kvkeep.errors import ConfigError
from kvroute.index import Held, Index
from kvroute.policy import worth
from kvroute.subscribe import Source, Subscriber

__all__ = ["Endpoint", "Options", "install", "main"]

log = logging.getLogger("kvroute.production_stack")

_LOOK_EVERY = 1.0
_MOST_WAIT = 0.5  # seconds that a request waits for the index's thread, at most


class Endpoint(Protocol):
    """What the router's discovery says of an engine, as far as it matters here."""

    url: str
    model_names: list[str]
    sleep: bool


class Options(NamedTuple):
    """What the launcher takes beside the router's own arguments."""

    events_port: int = 5557
    replay_port: int | None = None
    topic: str = ""
    min_share: float = 0.5


class LookupMsg(msgspec.Struct):
    """The router asks who holds the longest prefix of a prompt."""

    tokens: list[int]
    event_id: str


class QueryInstMsg(msgspec.Struct):
    """The router asks what we call the engine at an address."""

    ip: str
    event_id: str


class LookupRetMsg(msgspec.Struct):
    """Engines that hold enough of the prompt, the best first: where, and how many of its tokens."""

    layout_info: dict[str, tuple[str, int]]
    event_id: str


class QueryInstRetMsg(msgspec.Struct):
    """An engine's name: its host."""

    instance_id: str
    event_id: str


class Controller:
    """Stands in for LMCacheControllerManager. `start_all` runs on a loop of its own, which owns the index;
    `handle_orchestration_message` is called on the router's."""

    def __init__(
        self,
        endpoints: Callable[[], Iterable[Endpoint]],
        options: Options,
        urls: dict[str, str | None],
        health_check_interval: float = 0.0,
        lmcache_worker_timeout: float = 0.0,
    ) -> None:
        """`urls` and both times are the router's words to LMCache's workers, of which there are none."""
        del urls, health_check_interval, lmcache_worker_timeout
        self._endpoints, self._options = endpoints, options
        self._index = Index()
        self._subscriber: Subscriber | None = None
        self._followed: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = 0
        self._said: set[str] = set()

    async def start_all(self) -> None:
        """Follow the engines that the router knows, until cancelled."""
        self._subscriber, self._loop = Subscriber(self._index), asyncio.get_running_loop()
        try:
            while True:
                self._follow(self._subscriber, self._hosts(self._awake()))
                await asyncio.sleep(_LOOK_EVERY)
        finally:
            self._loop = None
            await self._subscriber.close()
            log.info("KV-aware routing has ended")

    async def handle_orchestration_message(
        self, message: LookupMsg | QueryInstMsg
    ) -> LookupRetMsg | QueryInstRetMsg:
        """Answer the router. Whatever is wrong is an answer that names nobody."""
        if isinstance(message, QueryInstMsg):
            return QueryInstRetMsg(message.ip.strip("[]"), message.event_id)
        layout: dict[str, tuple[str, int]] = {}
        if self._loop is not None and message.tokens:
            asked = asyncio.run_coroutine_threadsafe(self._layout(message.tokens), self._loop)
            try:
                layout = await asyncio.wait_for(asyncio.wrap_future(asked), _MOST_WAIT)
            except asyncio.TimeoutError:
                log.warning("the index did not answer within %g s", _MOST_WAIT)
            except (OverflowError, TypeError) as error:
                log.warning("not a prompt's tokens: %s", error)
        return LookupRetMsg(layout, message.event_id)

    async def _layout(self, tokens: list[int]) -> dict[str, tuple[str, int]]:
        """Who holds enough of a prompt; of those that hold as much each is the first in turn."""
        engines = self._awake()
        if any(set(one.model_names) != set(engines[0].model_names) for one in engines[1:]):
            self._say("engines serve different models: KV-aware routing is off, run a router for each model")
            return {}
        now = self._hosts(engines) & (self._subscriber.connected if self._subscriber else set())
        least = self._options.min_share * len(tokens)
        known = self._index.lookup(tokens).items()
        held = [(host, found) for host, found in known if host in now and found.tokens >= least]
        self._turn += 1
        first = self._turn % max(1, len(held))
        held = sorted(held[first:] + held[:first], key=lambda item: worth(item[1]), reverse=True)
        return {host: (_slowest(found), found.tokens) for host, found in held}

    def _awake(self) -> list[Endpoint]:
        return [one for one in self._endpoints() if not one.sleep]

    def _hosts(self, engines: Iterable[Endpoint]) -> set[str]:
        """Hosts by which the router can tell engines apart."""
        count = Counter(_host(one.url) for one in engines)
        for host, number in count.items():
            if number > 1:
                self._say(f"{number} engines at {host}: the router tells engines apart by their host only")
        return {host for host, number in count.items() if host and number == 1}

    def _follow(self, subscriber: Subscriber, hosts: set[str]) -> None:
        for host in self._followed - hosts:
            log.info("%s is gone", host)
            subscriber.leave(host)
        self._followed &= hosts
        for host in hosts - self._followed:
            name = f"[{host}]" if ":" in host else host
            events, replay = f"tcp://{name}:{self._options.events_port}", self._options.replay_port
            again = None if replay is None else f"tcp://{name}:{replay}"
            try:
                subscriber.follow(host, Source(events, again, self._options.topic))
            except ConfigError as error:
                self._say(str(error))
                continue
            self._followed.add(host)
            log.info("following the KV events of %s", host)

    def _say(self, warning: str) -> None:
        """Warn, of each thing once."""
        if warning not in self._said:
            self._said.add(warning)
            log.warning("%s", warning)


def install(endpoints: Callable[[], Iterable[Endpoint]], options: Options) -> None:
    """Put the names that the router imports into sys.modules, over LMCache where that is installed."""
    package = None
    for name in ("lmcache", "lmcache.v1", "lmcache.v1.cache_controller"):
        package = _module(name, package)
        package.__path__ = []
    manager = _module("lmcache.v1.cache_controller.controller_manager", package)
    manager.__dict__["LMCacheControllerManager"] = functools.partial(Controller, endpoints, options)
    message = _module("lmcache.v1.cache_controller.message", package)
    message.__dict__.update(LookupMsg=LookupMsg, QueryInstMsg=QueryInstMsg)


def main(argv: Sequence[str] | None = None) -> int:
    """Start the router; its arguments are those that are not ours."""
    program = "python -m kvroute.production_stack"
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False, add_help=False)
    add = parser.add_argument_group("kvkeep").add_argument
    add("--kvkeep-events-port", type=int, default=5557, help="port of each engine's KV events")
    add("--kvkeep-replay-port", type=int, help="port of their replay (default: no replay)")
    add("--kvkeep-topic", default="", help="only events whose topic begins so")
    add("--kvkeep-min-share", type=float, default=0.5, help="share of a prompt that an engine must hold")
    given, rest = parser.parse_known_args(argv)
    if "--help" in rest or "-h" in rest:
        parser.print_help()
    logging.getLogger("kvroute").addHandler(logging.StreamHandler())
    logging.getLogger("kvroute").setLevel(logging.INFO)
    install(
        _discovered, Options(**{name.removeprefix("kvkeep_"): value for name, value in vars(given).items()})
    )
    try:
        from vllm_router.app import main as serve
    except ModuleNotFoundError as error:
        parser.exit(
            2, f"kvkeep: no {error.name} here: run this where production-stack's router is installed\n"
        )
    sys.argv = ["vllm-router", *rest]
    serve()
    return 0


def _discovered() -> list[Endpoint]:
    """The router's own list of engines; empty before it has one."""
    from vllm_router.service_discovery import get_service_discovery

    try:
        found: list[Endpoint] = get_service_discovery().get_endpoint_info()
    except ValueError:
        return []
    return found


def _module(name: str, package: ModuleType | None) -> ModuleType:
    module = ModuleType(name, "Served by kvkeep.")
    module.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = module
    if package is not None:
        setattr(package, name.rpartition(".")[2], module)
    return module


@functools.lru_cache(maxsize=4096)
def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _slowest(held: Held) -> str:
    """The slowest medium that it takes to read all that is held."""
    return "storage" if held.storage else "cpu" if held.cpu else "gpu"


if __name__ == "__main__":
    sys.exit(main())
