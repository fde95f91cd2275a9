"""Which engine a request goes to: each policy puts those that serve its model in order, the best first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvroute.backends import Backend
from kvroute.events import BlockHash, Removed, Stored
from kvroute.index import Held, Index

__all__ = ["TIER_WEIGHTS", "Ask", "Choice", "Expected", "Kv", "Policy", "PrefixHash", "RoundRobin", "Session"]

TIER_WEIGHTS = (1.0, 0.8, 0.5)
"""What a token on the GPU, in host memory, and in storage saves of computing it."""
MISSING_WEIGHT = 1.5
"""A token to compute also delays what comes after, and pushes out what others want: with 1.0 documents were
computed on several engines (benchmarks/router.py: 0.82 of the best hit ratio, with 1.5 all of it)."""
STREAM_TOKENS = 16
"""A request that is being answered delays a prompt by about as much as computing so many tokens."""

_PREFIX_CHARACTERS = 2048
_OVERLOAD = 1.25  # times the mean load, beyond which a hash's engine is passed over
_EXPECTED_BLOCK = 64
_CHARACTERS = 4  # of a token, about


class Ask(NamedTuple):
    """A request as policies see it. `text`: what its prompt begins with; `tokens`: None: not known."""

    text: bytes
    session: str | None = None
    tokens: npt.NDArray[np.uint32] | None = None
    lora: str | None = None
    salt: str | None = None

    def tokens_to_compute(self, choice: Choice) -> int:
        """Of the prompt, at that engine; where tokens are not known, by the text's length."""
        return len(self.text) // _CHARACTERS if self.tokens is None else choice.missing


class Choice(NamedTuple):
    """An engine, how many of the prompt's tokens it holds by what we know, and how many it must compute."""

    backend: Backend
    held: int = 0
    missing: int = 0


class Policy(Protocol):
    """Puts engines in order. `wants_tokens`: asks for the prompt's tokens where they can be had."""

    wants_tokens: bool

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """All of `backends`, the best first; each has at least one."""


class RoundRobin:
    """In turn: the one that was picked the longest time ago."""

    wants_tokens = False

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """See `Policy`."""
        return _choices(ask, sorted(backends, key=lambda one: one.picked))


class Session:
    """All of a session at one engine; without a session, to the one with the fewest requests."""

    wants_tokens = False

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """See `Policy`."""
        if ask.session is None:
            return _choices(ask, sorted(backends, key=_idle))
        return _choices(ask, _by_hash(ask.session.encode("utf-8", "replace"), backends))


class PrefixHash:
    """Prompts that begin alike at one engine, unless it has much more to do than the others."""

    wants_tokens = False

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """See `Policy`."""
        ranked = _by_hash(ask.text[:_PREFIX_CHARACTERS], backends)
        bound = 1 + _OVERLOAD * sum(one.in_flight for one in backends) / len(backends)
        return _choices(ask, sorted(ranked, key=lambda one: one.in_flight > bound))


class Kv:
    """Where the first token comes soonest: the fewest tokens to compute, of this prompt and of those before.

    An engine's cost is MISSING_WEIGHT times what it does not hold of the prompt (a slower tier counts as held
    in part), what it still has to compute for others, and STREAM_TOKENS for each request it is answering.
    """

    wants_tokens = True

    def __init__(self, index: Index, expected: Expected) -> None:
        self._index, self._expected = index, expected
        self._otherwise = PrefixHash()

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """See `Policy`."""
        if ask.tokens is None:
            return self._otherwise.rank(ask, backends)
        held = self._index.lookup(ask.tokens, ask.lora, ask.salt)
        coming = self._expected.lookup(ask)
        ranked = []
        for one in backends:
            have, soon = held.get(one.name, _NOTHING), coming.get(one.name, _NOTHING)
            saved = max(_saved(have), soon.tokens)
            work = MISSING_WEIGHT * (len(ask.tokens) - saved)
            work += one.waiting_tokens + STREAM_TOKENS * one.streams
            tokens = max(have.tokens, soon.tokens)
            choice = Choice(one, tokens, round(len(ask.tokens) - saved))
            ranked.append((work, one.in_flight, one.picked, choice))
        ranked.sort(key=lambda entry: entry[:3])
        return [choice for *_, choice in ranked]


class Expected:
    """What engines will hold soon: prompts that were sent to them, of which no event has told yet.

    `clock`: seconds; a promise is forgotten `lasts` seconds after it was made.
    """

    def __init__(self, clock: Callable[[], float], lasts: float) -> None:
        self._clock, self._lasts = clock, lasts
        self._index = Index(most_blocks=500_000)
        self._promises: deque[tuple[float, str, list[BlockHash]]] = deque()
        self._names = 0

    def promise(self, ask: Ask, backend: str) -> None:
        """The prompt was sent there."""
        count = 0 if ask.tokens is None else len(ask.tokens) // _EXPECTED_BLOCK
        if ask.tokens is None or not count:
            return
        names: list[BlockHash] = [*range(self._names, self._names + count)]
        self._names += count
        tokens: Any = ask.tokens[: count * _EXPECTED_BLOCK]  # an array does as well as a list
        extra = None if ask.salt is None else [[ask.salt], *[None] * (count - 1)]
        stored = Stored(names, None, tokens, _EXPECTED_BLOCK, lora_name=ask.lora, extra_keys=extra)
        self._index.apply(backend, [stored])
        self._promises.append((self._clock() + self._lasts, backend, names))

    def lookup(self, ask: Ask) -> dict[str, Held]:
        """As an index's."""
        now = self._clock()
        while self._promises and self._promises[0][0] <= now:
            _, backend, names = self._promises.popleft()
            self._index.apply(backend, [Removed(names)])
        return {} if ask.tokens is None else self._index.lookup(ask.tokens, ask.lora, ask.salt)


_NOTHING = Held(0, 0, 0)


def _saved(held: Held) -> float:
    gpu, cpu, storage = TIER_WEIGHTS
    return held.gpu * gpu + held.cpu * cpu + held.storage * storage


def _choices(ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
    missing = 0 if ask.tokens is None else len(ask.tokens)
    return [Choice(one, 0, missing) for one in backends]


def _idle(backend: Backend) -> tuple[int, int]:
    return backend.in_flight, backend.picked


def _by_hash(key: bytes, backends: Sequence[Backend]) -> list[Backend]:
    """Rendezvous hashing: when an engine comes or goes, only what is its own moves."""
    seed = xxh3_64_intdigest(key)
    return sorted(backends, key=lambda one: xxh3_64_intdigest(one.name.encode(), seed), reverse=True)
