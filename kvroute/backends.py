"""The engines that requests can go to: who is up, what they serve, how busy they are."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import msgspec

from kvkeep.errors import ConfigError
from kvroute.options import Role
from kvroute.subscribe import Source, Subscriber

__all__ = ["Backend", "Engine", "Pool"]

log = logging.getLogger("kvroute.backends")

_FAILURES = 2  # checks in a row, until an engine counts as down
_CHECK_WAIT = 2.0
_SILENCE = 10.0  # seconds
_REST = 30.0
_MODELS_EVERY = 15  # checks


class Engine(NamedTuple):
    """An engine as discovery finds it. `url` has no path; `name` is its host and port."""

    name: str
    url: str
    role: Role = "any"
    source: Source | None = None


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(eq=False)
class Backend:
    """One engine, and what we have it do. `waiting_tokens`: of prompts that are not answered yet, what it
    does not hold, as far as we know; `streams`: requests that it answers."""

    engine: Engine
    up: bool = False
    failures: int = 0
    checks: int = 0
    models: dict[str, bool] = field(default_factory=dict)
    """Names of what it serves, and whether each is a LoRA adapter."""
    card: bytes = b""
    waiting: int = 0
    waiting_tokens: int = 0
    streams: int = 0
    picked: int = 0
    heard: float = 0.0
    """When anything came from it last, by the monotonic clock."""
    late: int = 0  # requests in a row that had their time and no answer, whatever its health
    rests: float = 0.0  # until when it had better get no more of them, by the monotonic clock
    visits: set[Visit] = field(default_factory=set)
    answers: dict[str, int] = field(default_factory=dict)
    """Requests so far by how they ended: a class of status codes, or what failed."""

    @property
    def name(self) -> str:
        """Host and port."""
        return self.engine.name

    @property
    def in_flight(self) -> int:
        """Requests that it has and has not finished."""
        return self.waiting + self.streams

    def count(self, what: str) -> None:
        """One more request that ended so."""
        self.answers[what] = self.answers.get(what, 0) + 1


class Visit:
    """One request at one engine, for its load. Ends with the `with` block."""

    def __init__(self, backend: Backend, tokens: int) -> None:
        self._backend, self._tokens, self._waits = backend, tokens, True
        self.abandoned = False
        self.stop: Callable[[], object] | None = None
        """Ends what the request waits for at the engine."""
        backend.visits.add(self)
        backend.waiting += 1
        backend.waiting_tokens += tokens

    def answered(self) -> None:
        """Its first byte has come: the prompt is computed."""
        if self._waits:
            self._waits = False
            self._backend.waiting -= 1
            self._backend.waiting_tokens -= self._tokens
            self._backend.streams += 1

    def abandon(self) -> None:
        """Wait no longer: nobody is there any more."""
        self.abandoned = True
        if self.stop is not None:
            self.stop()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.answered()
        self._backend.streams -= 1
        self._backend.visits.discard(self)


class Pool:
    """All engines by name. Owned by the event loop."""

    def __init__(self, session: aiohttp.ClientSession, interval: float, headers: dict[str, str]) -> None:
        self.backends: dict[str, Backend] = {}
        self.subscriber: Subscriber | None = None
        self.lost: Callable[[str], None] = lambda name: None
        """Told of an engine that is gone, or down: what it was computing is lost."""
        self._found: dict[object, dict[str, Engine]] = {}
        self._session, self._interval, self._headers = session, interval, headers
        self._picks = 0

    def found(self, place: object, engines: Iterable[Engine]) -> None:
        """Discovery says which engines there are at a place; those that are no more get no new requests."""
        self._found[place] = {engine.name: engine for engine in engines}
        wanted = {name: engine for there in self._found.values() for name, engine in there.items()}
        for name in self.backends.keys() - wanted.keys():
            self._remove(name)
        for name, engine in wanted.items():
            if name in self.backends and self.backends[name].engine != engine:
                self._remove(name)
            if name not in self.backends:
                self._add(engine)

    def usable(self, model: str, role: Role) -> list[Backend]:
        """Engines that are up and serve the model; those that are stuck only where there are no others."""
        roles, now = (role, "any"), time.monotonic()
        found = [b for b in self.backends.values() if b.up and b.engine.role in roles and model in b.models]
        return [one for one in found if one.rests <= now] or found

    def serves(self, model: str) -> bool | None:
        """Whether any engine serves it, up or down; None: not known, none has said what it serves."""
        told = [one.models for one in self.backends.values() if one.models]
        return any(model in models for models in told) if told else None

    def is_lora(self, model: str) -> bool:
        """Whether the name is one of a LoRA adapter."""
        return any(one.models.get(model, False) for one in self.backends.values())

    def visit(self, backend: Backend, tokens: int) -> Visit:
        """Note that a request goes there."""
        self._picks += 1
        backend.picked = self._picks
        return Visit(backend, tokens)

    def failed(self, backend: Backend, *, gone: bool) -> None:
        """A request found nobody there (`gone`), or was let down."""
        backend.failures += 1
        if backend.up and (gone or backend.failures >= _FAILURES):
            self._down(backend, "it lets requests down")

    def late(self, backend: Backend) -> None:
        """A request had its time, and no answer. After some the engine rests; then one more may try."""
        backend.late += 1
        if backend.late >= _FAILURES:
            backend.rests = time.monotonic() + _REST
            log.warning("engine %s is stuck: no more requests for %g s", backend.name, _REST)

    async def check(self) -> None:
        """Ask every engine how it is, for ever."""
        while True:
            await self.check_all()
            await asyncio.sleep(self._interval)

    async def check_all(self) -> None:
        """Ask every engine how it is."""
        asked = list(self.backends.values())
        errors = await asyncio.gather(*map(self._check, asked), return_exceptions=True)
        for one, error in zip(asked, errors, strict=True):
            if error is not None:
                log.error("engine %s cannot be checked: %r", one.name, error)

    def _add(self, engine: Engine) -> None:
        self.backends[engine.name] = Backend(engine)
        log.info("engine %s found", engine.name)
        if self.subscriber is not None and engine.source is not None:
            try:
                self.subscriber.follow(engine.name, engine.source)
            except ConfigError as error:
                log.warning("the events of %s are not followed: %s", engine.name, error)

    def _remove(self, name: str) -> None:
        del self.backends[name]
        log.info("engine %s is no more", name)
        self.lost(name)
        if self.subscriber is not None:
            self.subscriber.leave(name)

    def _down(self, backend: Backend, why: str) -> None:
        backend.up = False
        self.lost(backend.name)
        log.warning("engine %s is down: %s", backend.name, why)

    async def _check(self, backend: Backend) -> None:
        try:
            await self._get(backend, "/health")
            if not backend.up or backend.checks % _MODELS_EVERY == 0:
                await self._ask_models(backend)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, msgspec.DecodeError) as error:
            backend.failures += 1
            if backend.up and backend.failures >= _FAILURES:
                self._down(backend, f"{type(error).__name__} {error}")
            self._give_up(backend)
            return
        backend.checks += 1
        backend.failures = 0
        backend.heard = time.monotonic()
        if not backend.up:
            backend.up, backend.late, backend.rests = True, 0, 0.0
            log.info("engine %s is up, serves %s", backend.name, ", ".join(backend.models) or "nothing")

    def _give_up(self, backend: Backend) -> None:
        """Of an engine that is down and silent on all connections (its host is gone, its link cut) nothing
        more will come. One that is only too busy for checks still answers somebody."""
        if not backend.up and backend.visits and time.monotonic() - backend.heard > _SILENCE:
            log.warning("engine %s is silent: %d requests are given up", backend.name, len(backend.visits))
            for visit in list(backend.visits):
                visit.abandon()

    async def _ask_models(self, backend: Backend) -> None:
        body = await self._get(backend, "/v1/models")
        models = msgspec.json.decode(body, type=_Models).data
        backend.models, backend.card = {model.id: bool(model.parent) for model in models}, body

    async def _get(self, backend: Backend, path: str) -> bytes:
        timeout = aiohttp.ClientTimeout(_CHECK_WAIT)
        url = backend.engine.url + path
        async with self._session.get(url, timeout=timeout, headers=self._headers) as answer:
            if answer.status != 200:
                remedy = "; it wants a key: give --backend-key FILE" if answer.status == 401 else ""
                raise aiohttp.ClientError(f"{path} says {answer.status}{remedy}")
            return await answer.read()

    def models(self) -> Iterator[Any]:
        """The cards of all models that can be asked for, each once."""
        seen = set[str]()
        for backend in self.backends.values():
            if backend.up:
                for card in msgspec.json.decode(backend.card)["data"]:
                    if card["id"] not in seen:
                        seen.add(card["id"])
                        yield card
