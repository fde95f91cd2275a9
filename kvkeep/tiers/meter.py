"""What a tier did, and how fast it is: for figures, and for the rule that loads or recomputes."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from kvkeep.errors import TierSwitchedOff, TierUnavailable
from kvkeep.observe.histogram import BYTES, MOVE_SECONDS, Histogram
from kvkeep.tiers.base import Buffer, Got, Key, Put, Tier
from kvkeep.tiers.wrap import Wrapper

__all__ = ["ERROR_KINDS", "Metered", "TierCounters"]

_T = TypeVar("_T")
_KINDS = {"off": TierSwitchedOff, "timeout": TimeoutError, "connection": ConnectionError, "system": OSError}
ERROR_KINDS = (*_KINDS, "other")
"""Why verbs fail; `off`: not tried, after failures."""
_SHARE = 0.2  # of the newest sample in a running mean
_DECAY = 0.7  # of all that was read before, at each batch
_BENEFIT_OF_DOUBT = 32 << 20  # bytes that cost nothing before the first batch: one that dials is no measure
_STALE = 30.0  # seconds


@dataclass
class TierCounters:
    """Totals since the tier was opened."""

    asked: int = 0
    """Keys that it was asked about, and how many of them it had."""
    found: int = 0
    hits: int = 0
    misses: int = 0
    damaged: int = 0
    got_bytes: int = 0
    stored: int = 0
    refused: int = 0
    put_bytes: int = 0
    errors: int = 0


class Metered(Wrapper):
    """Counts results, bytes and seconds of every verb; lies outside the seal, so that damage is seen."""

    def __init__(self, inner: Tier, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(inner)
        self._clock = clock
        self._lock = threading.Lock()
        self.counters = TierCounters()
        self._errors = Counter[str]()
        self.seconds = {verb: Histogram(MOVE_SECONDS) for verb in ("contains", "get", "put")}
        """Of each batch by verb; of `contains` those that failed too."""
        self.nbytes = {verb: Histogram(BYTES) for verb in ("get", "put")}
        """Hit or stored by each batch."""
        self.latency: float | None = None
        """Running mean of the seconds that a `contains` takes; None before the first."""
        self.seconds_per_byte: float | None = None
        """What a byte has cost lately, batches read side by side; None before the first that hit."""
        self._doubt, self._read_bytes, self._read_seconds = float(_BENEFIT_OF_DOUBT), 0.0, 0.0
        self._read_at = -math.inf

    def figures(self) -> dict[str, float]:
        """The counters as a dict, for `kvkeep status`."""
        with self._lock:
            return asdict(self.counters) | {f"errors_{kind}": self._errors[kind] for kind in ERROR_KINDS}

    def read_seconds(self, nbytes: int) -> float:
        """How long reading so much is likely to take, by what was read before; of a tier that nothing was
        read from yet, only what asking takes: that is worth finding out."""
        with self._lock:
            rate = self._read_seconds / (self._read_bytes + self._doubt)
        return (self.latency or 0.0) + rate * nbytes

    @property
    def stale(self) -> bool:
        """Whether what is known of reading is so old that it may be otherwise now."""
        return self._clock() - self._read_at > _STALE

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        began = self._clock()
        try:
            held = self._counted(lambda: self.inner.contains(keys))
        finally:  # also after a failure: a store that times out is slow, and must count as such
            took = self._clock() - began
            with self._lock:
                self.latency = _mean(self.latency, took)
                self.seconds["contains"].add(took)
        with self._lock:
            self.counters.asked += len(keys)
            self.counters.found += sum(held)
        return held

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        began = self._clock()
        results = self._counted(lambda: self.inner.get(keys, buffers))
        now = self._clock()
        took = now - began
        nbytes = sum(len(buffer) for buffer, got in zip(buffers, results, strict=True) if got is Got.HIT)
        with self._lock:
            self.counters.hits += results.count(Got.HIT)
            self.counters.misses += results.count(Got.MISS)
            self.counters.damaged += results.count(Got.DAMAGED)
            self.counters.got_bytes += nbytes
            self.seconds["get"].add(took)
            self.nbytes["get"].add(nbytes)
            if nbytes:
                self._add(nbytes, began, now)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        began = self._clock()
        results = self._counted(lambda: self.inner.put(keys, buffers))
        took = self._clock() - began
        stored = [len(buffer) for buffer, put in zip(buffers, results, strict=True) if put is Put.STORED]
        with self._lock:
            self.counters.stored += len(stored)
            self.counters.refused += results.count(Put.REFUSED)
            self.counters.put_bytes += sum(stored)
            self.seconds["put"].add(took)
            self.nbytes["put"].add(sum(stored))
        return results

    def delete(self, keys: Sequence[Key]) -> None:
        self._counted(lambda: self.inner.delete(keys))

    def _add(self, nbytes: int, began: float, ended: float) -> None:
        # Time in which another batch was read too has been counted with the one that ended first.
        asking = 0.0 if began < self._read_at else self.latency or 0.0
        seconds = max(0.0, ended - max(began, self._read_at) - asking)
        if began - self._read_at > _STALE:
            self._doubt, self._read_bytes, self._read_seconds = float(_BENEFIT_OF_DOUBT), 0.0, 0.0
        self._read_bytes = _DECAY * self._read_bytes + nbytes
        self._read_seconds = _DECAY * self._read_seconds + seconds
        self._doubt, self._read_at = _DECAY * self._doubt, ended
        self.seconds_per_byte = self._read_seconds / self._read_bytes

    def _counted(self, verb: Callable[[], _T]) -> _T:
        try:
            return verb()
        except TierUnavailable as error:
            with self._lock:
                self.counters.errors += 1
                self._errors[_kind(error)] += 1
            raise


def _kind(error: TierUnavailable) -> str:
    """Of ERROR_KINDS: what it came from tells."""
    cause: BaseException | None = error
    for _ in range(8):  # one that is raised again may be among its own causes
        for kind, of in _KINDS.items():
            if isinstance(cause, of):
                return kind
        cause = cause and (cause.__cause__ or cause.__context__)
    return ERROR_KINDS[-1]


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _SHARE * (new - old)
