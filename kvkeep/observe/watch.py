"""What is remembered of lookups for those who look on: where chunks came from, and which are worth most.

All of it is bounded, whatever is asked. The event loop's, like the keeper.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvkeep.identity import KEY_BYTES, group_keys
from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.movers import Movers
from kvkeep.keeper.namespaces import Answer, Namespace
from kvkeep.observe.histogram import LOOKUP_SECONDS, Histogram
from kvkeep.observe.traces import Traces

__all__ = ["Prefix", "Seen", "Watch", "tier_names"]

SAMPLE_EVERY = 15.0
_SAMPLES = 240  # an hour
_REQUESTS, _PREFIXES, _SHOWN = 100, 128, 12


class Seen(NamedTuple):
    """One lookup and its outcome."""

    session: str
    space: Namespace
    keys: bytes
    answer: Answer
    settles: int
    """Ticket of the lookup that this one ends; 0: none."""
    ticket: int
    """Not 0: tiers may have more, a second lookup of the same request will tell."""
    lease: int
    trace: str


@dataclass
class Request:
    """One line of the page."""

    at: float
    engine: str
    space: Namespace
    answer: Answer
    state: str = ""
    """Empty once it is answered; otherwise `waits` for tiers, or `gave up`."""


@dataclass
class Prefix:
    """The beginning of a prompt that was found, and how much finding it was worth."""

    space: Namespace
    keys: bytes
    nbytes: int
    uses: int = 0
    weight: float = 0.0
    """Bytes × uses, of which the older count less."""
    last: float = 0.0


class Watch:
    """Remembers the last lookups of one keeper, sums since its start, and the heaviest prefixes."""

    def __init__(
        self,
        keeper: Keeper,
        tiers: Sequence[str],
        traces: Traces | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keeper = keeper
        self._tiers = tiers
        self._traces = traces
        self._clock = clock
        self.seconds = Histogram(LOOKUP_SECONDS)
        self.history: deque[tuple[float, int, int, int, int]] = deque(maxlen=_SAMPLES)
        """Totals at one time each: when; chunks asked for, of memory, of tiers; bytes used."""
        self._requests: deque[Request] = deque(maxlen=_REQUESTS)
        self._waiting: dict[int, Request] = {}
        """By ticket; as many as there are fetches at most."""
        self._prefixes: dict[str, Prefix] = {}

    def looked_up(self, seen: Seen, seconds: float) -> None:
        """A lookup was answered, and took the keeper so long."""
        self.seconds.add(seconds)
        line = self._waiting.pop(seen.settles, None) or self.missed(seen.session, seen.space, seen.answer)
        line.answer, line.state = seen.answer, ""
        if seen.ticket:
            line.state = "waits"
            self._waiting[seen.ticket] = line
        elif seen.answer.found:
            self._used(seen)
        if self._traces is not None and seen.trace:
            nbytes = _bytes_of(seen.space, seen.answer.found)
            self._traces.looked_up(seen, nbytes, self._from(seen.answer), seconds)

    def missed(self, session: str, space: Namespace, answer: Answer) -> Request:
        """A request has this answer, without a lookup where nothing is found."""
        self._requests.append(Request(self._clock(), _engine(session), space, answer))
        return self._requests[-1]

    def gave_up(self, ticket: int) -> None:
        """The request of a ticket waits for tiers no more, and takes nothing."""
        line = self._waiting.pop(ticket, None)
        if line is not None:
            line.state = "gave up"
        if self._traces is not None:
            self._traces.gave_up(ticket)

    def released(self, lease: int, read: bool) -> None:
        """A rank has read what it was leased, or the whole lease was given back unread."""
        if self._traces is not None and lease not in self._keeper.claims:
            self._traces.released(lease, read)

    def _from(self, answer: Answer) -> dict[str, int]:
        return {self._tiers[tier]: chunks for tier, chunks in answer.tiers.items()}

    def _used(self, seen: Seen) -> None:
        """Count one use of the prefix that was found: where a prompt leaves what is held, many others do."""
        end = (seen.answer.local + seen.answer.found) * KEY_BYTES
        name = seen.keys[end - KEY_BYTES : end - KEY_BYTES + 6].hex()
        prefix = self._prefixes.get(name)
        if prefix is None:
            if len(self._prefixes) >= 2 * _PREFIXES:
                self._forget_light()
            nbytes = _bytes_of(seen.space, end // KEY_BYTES)
            prefix = self._prefixes[name] = Prefix(seen.space, seen.keys[:end], nbytes)
        prefix.uses += 1
        prefix.weight += prefix.nbytes
        prefix.last = self._clock()

    def _forget_light(self) -> None:
        """Keep the heavier half, at half its weight, so that what was heavy once makes room in time."""
        heavy = sorted(self._prefixes.items(), key=lambda item: item[1].weight)[-_PREFIXES:]
        self._prefixes = dict(heavy)
        for prefix in self._prefixes.values():
            prefix.weight /= 2

    def close(self) -> None:
        """Export the spans that have ended."""
        if self._traces is not None:
            self._traces.close()

    def sample(self) -> None:
        """Note the totals; every SAMPLE_EVERY seconds."""
        counters, used = self._keeper.counters, int(self._keeper.usage()[1].sum())
        tiers = counters.tier_chunks.total()
        memory = counters.hit_chunks - tiers
        self.history.append((self._clock(), counters.asked_chunks, memory, tiers, used))

    def prefix(self, name: str) -> Prefix | None:
        """A prefix by the name that `prefixes` gives it, while it is remembered."""
        return self._prefixes.get(name)

    def prefixes(self) -> list[dict[str, object]]:
        """The heaviest prefixes, for JSON."""
        heavy = sorted(self._prefixes.items(), key=lambda item: -item[1].weight)[:_SHOWN]
        chunks = self._keeper.chunks
        out: list[dict[str, object]] = []
        for name, prefix in heavy:
            # Chains are given up from their tails: where the last chunk is held, all are.
            last = group_keys(prefix.keys[-KEY_BYTES:], prefix.space.fingerprint, 0)
            record = int(chunks.table.find(last)[0])
            held = record >= 0 and chunks.state[record] == ChunkState.COMMITTED
            count = len(prefix.keys) // KEY_BYTES
            out.append(
                {
                    "prefix": name,
                    "namespace": prefix.space.number,
                    "chunks": count,
                    "tokens": count * prefix.space.chunk_tokens,
                    "bytes": prefix.nbytes,
                    "uses": prefix.uses,
                    "weight": prefix.weight,
                    "last": prefix.last,
                    "held": bool(held),
                    "pinned": bool(held and chunks.pinned[record]),
                }
            )
        return out

    def requests(self) -> list[dict[str, object]]:
        """The last lookups, the newest first, for JSON. Chunks, and tokens where they are known."""
        return [
            {
                "at": line.at,
                "engine": line.engine,
                "namespace": line.space.number,
                "chunk_tokens": line.space.chunk_tokens,
                "chunks": line.answer.local + line.answer.asked,
                "local": line.answer.local,
                "memory": line.answer.found - line.answer.tiers.total(),
                "tiers": self._from(line.answer),
                "state": line.state,
            }
            for line in reversed(self._requests)
        ]


def tier_names(movers: Movers | None) -> list[str]:
    """A distinct label for each tier: its URL without options."""
    names: list[str] = []
    for opened in [] if movers is None else movers.tiers:
        name = opened.url.partition("?")[0]
        names.append(f"{name}#{len(names)}" if name in names else name)
    return names


def _engine(session: str) -> str:
    """For people: an engine's name, or the beginning of the UUID that it has where nobody gave it one."""
    name = session.rpartition(":")[0] or session
    return re.sub(r"([0-9a-f]{8})-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", r"\1", name)[:40]


def _bytes_of(space: Namespace, chunks: int) -> int:
    """What loading so many leading chunks takes."""
    counts = np.array([min(chunks, group.window_chunks or chunks) for group in space.groups])
    return int(counts @ np.array([group.slot_bytes for group in space.groups]))
