"""Which engine a request goes to: each policy puts those that serve its model in order, the best first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvroute.backends import Backend
from kvroute.events import Removed
from kvroute.index import Held, Index

__all__ = ["PLAIN", "Ask", "Choice", "Expected", "Kv", "Policy", "worth"]

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
_MOST_PROMISED = 500_000  # blocks
_ENDED_AT_ONCE = 4  # promises
_CHARACTERS = 4  # of a token, about


class Known(NamedTuple):
    """How much of a prompt an engine holds, or will soon: tokens, and what they are worth of computing."""

    tokens: int = 0
    saved: float = 0.0


class Ask(NamedTuple):
    """A request as policies see it. `text`: of its prompt; `known`: what was looked up, by engine."""

    text: bytes
    session: str | None = None
    tokens: npt.NDArray[np.uint32] | None = None  # not known
    lora: str | None = None
    salt: str | None = None
    known: Mapping[str, Known] = {}

    def tokens_to_compute(self, choice: Choice) -> int:
        """Of the prompt, at that engine; where tokens are not known, by the text's length."""
        return len(self.text) // _CHARACTERS if self.tokens is None else choice.missing


class Choice(NamedTuple):
    """An engine, how many of the prompt's tokens it holds by what we know, and how many it must compute."""

    backend: Backend
    held: int = 0
    missing: int = 0


class Policy:
    """Puts engines in order. This one by their names or load; `Kv` by what they hold."""

    wants_tokens = False
    """Whether it asks for the prompt's tokens where they can be had."""

    def __init__(self, order: Callable[[Ask, Sequence[Backend]], list[Backend]]) -> None:
        self._order = order

    def look(self, ask: Ask) -> Ask:
        """Look up, once, what `rank` needs to know of a prompt."""
        return ask

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """All of `backends`, the best first; there is at least one."""
        missing = 0 if ask.tokens is None else len(ask.tokens)
        return [Choice(one, 0, missing) for one in self._order(ask, backends)]


def round_robin(ask: Ask, backends: Sequence[Backend]) -> list[Backend]:
    """In turn: the one that was picked the longest time ago."""
    return sorted(backends, key=lambda one: one.picked)


def by_session(ask: Ask, backends: Sequence[Backend]) -> list[Backend]:
    """All of a session at one engine; without a session, to the one with the fewest requests."""
    if ask.session is None:
        return sorted(backends, key=lambda one: (one.in_flight, one.picked))
    return _by_hash(ask.session.encode("utf-8", "replace"), backends)


def by_prefix(ask: Ask, backends: Sequence[Backend]) -> list[Backend]:
    """Prompts that begin alike at one engine, unless it has much more to do than the others."""
    ranked = _by_hash(ask.text[:_PREFIX_CHARACTERS], backends)
    bound = 1 + _OVERLOAD * sum(one.in_flight for one in backends) / len(backends)
    return sorted(ranked, key=lambda one: one.in_flight > bound)


PLAIN = {"session": by_session, "prefix-hash": by_prefix, "round-robin": round_robin}
"""Orders that do not ask what engines hold, by the policy's name."""


class Kv(Policy):
    """Where the first token comes soonest: the fewest tokens to compute, of this prompt and of those before.

    An engine's cost is MISSING_WEIGHT times what it does not hold of the prompt (a slower tier counts as held
    in part), what it still has to compute for others, and STREAM_TOKENS for each request it is answering.
    """

    wants_tokens = True

    def __init__(self, index: Index, expected: Expected) -> None:
        super().__init__(by_prefix)  # where tokens cannot be had
        self._index, self._expected = index, expected

    def look(self, ask: Ask) -> Ask:
        """Look up, once, what `rank` needs to know of a prompt."""
        if ask.tokens is None:
            return ask
        held = self._index.lookup(ask.tokens, ask.lora, ask.salt)
        known = {name: Known(one.tokens, worth(one)) for name, one in held.items()}
        for name, one in self._expected.lookup(ask).items():
            tokens, saved = known.get(name, _NOTHING)
            known[name] = Known(max(tokens, one.tokens), max(saved, one.tokens))
        return ask._replace(known=known)

    def rank(self, ask: Ask, backends: Sequence[Backend]) -> list[Choice]:
        """All of `backends`, the best first; there is at least one."""
        if ask.tokens is None:
            return super().rank(ask, backends)
        ranked, total = [], len(ask.tokens)
        for number, one in enumerate(backends):
            tokens, saved = ask.known.get(one.name, _NOTHING)
            work = MISSING_WEIGHT * (total - saved) + one.waiting_tokens + STREAM_TOKENS * one.streams
            choice = Choice(one, tokens, round(total - saved))
            ranked.append((work, one.in_flight, one.picked, number, choice))
        ranked.sort()
        return [choice for *_, choice in ranked]


class Expected:
    """What engines will hold soon: prompts that were sent to them, of which no event has told yet.

    `clock`: seconds; a block is forgotten `lasts` seconds after the last prompt with it was sent there, or
    earlier where there are too many.
    """

    def __init__(self, clock: Callable[[], float], lasts: float) -> None:
        self._clock, self._lasts = clock, lasts
        self._index = Index(ghosts=0)
        self._promises: deque[tuple[str, float, list[int]]] = deque()
        self._until: dict[str, dict[int, float]] = {}
        self._count = 0

    def promise(self, ask: Ask, backend: str) -> None:
        """The prompt was sent there."""
        if ask.tokens is None:
            return
        until = self._clock() + self._lasts
        keys = self._index.hold(backend, ask.tokens, _EXPECTED_BLOCK, ask.lora, ask.salt)
        self._until.setdefault(backend, {}).update(dict.fromkeys(keys, until))
        self._promises.append((backend, until, keys))
        self._count += len(keys)
        self._end()

    def lookup(self, ask: Ask) -> dict[str, Held]:
        """As an index's."""
        self._end()
        return {} if ask.tokens is None else self._index.lookup(ask.tokens, ask.lora, ask.salt)

    def forget(self, backend: str) -> None:
        """What was sent there is lost: it is gone, or down."""
        self._index.forget(backend)
        self._until.pop(backend, None)

    def _end(self) -> None:
        """Forget what is over, some of it at a time."""
        now = self._clock()
        for _ in range(_ENDED_AT_ONCE):
            if not self._promises or (self._promises[0][1] > now and self._count <= _MOST_PROMISED):
                return
            backend, until, keys = self._promises.popleft()
            self._count -= len(keys)
            latest = self._until.get(backend, {})
            over = [key for key in keys if latest.get(key) == until]  # else a later prompt has it as well
            for key in over:
                del latest[key]
            if over:
                self._index.apply(backend, [Removed([*over])])


_NOTHING = Known()


def worth(held: Held) -> float:
    """What it saves of computing, in tokens."""
    gpu, cpu, storage = TIER_WEIGHTS
    return held.gpu * gpu + held.cpu * cpu + held.storage * storage


def _by_hash(key: bytes, backends: Sequence[Backend]) -> list[Backend]:
    """Rendezvous hashing: when an engine comes or goes, only what is its own moves."""
    seed = xxh3_64_intdigest(key)
    return sorted(backends, key=lambda one: xxh3_64_intdigest(one.name.encode(), seed), reverse=True)
