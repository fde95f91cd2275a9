"""What a tier did, and how fast it is: for figures, and for the rule that loads or recomputes."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TypeVar

from kvkeep.errors import TierSwitchedOff, TierUnavailable
from kvkeep.observe.histogram import BYTES, MOVE_SECONDS, Histogram
from kvkeep.tiers.base import Buffer, Got, Key, Put, Tier
from kvkeep.tiers.wrap import Wrapper

__all__ = ["COUNTERS", "ERROR_KINDS", "Metered"]

_T = TypeVar("_T")
_KINDS = {"off": TierSwitchedOff, "timeout": TimeoutError, "connection": ConnectionError, "system": OSError}
ERROR_KINDS = (*_KINDS, "other")
"""Why verbs fail; `off`: not tried, after failures."""
COUNTERS = (
    *("asked", "found", "hits", "misses", "damaged"),
    *("got_bytes", "stored", "refused", "put_bytes", "errors"),
)
"""Totals since the tier was opened; `found`: of the keys that it was `asked` about, those that it had."""
_LATELY = 5  # answers, whose median tells what one takes: one that came late is no measure
_READS = 8  # batches by which it is told how long reading takes, without the one that took longest a byte
_BENEFIT_OF_DOUBT = (16 << 20, 0.0)  # bytes and seconds that count as read before the first batch: it dials
_STALE = 30.0  # seconds


class Metered(Wrapper):
    """Counts results, bytes and seconds of every verb; lies outside the seal, so that damage is seen."""

    def __init__(self, inner: Tier, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(inner)
        self._clock = clock
        self._lock = threading.Lock()
        self.counters = Counter(dict.fromkeys([*COUNTERS, *(f"errors_{kind}" for kind in ERROR_KINDS)], 0))
        self.seconds = {verb: Histogram(MOVE_SECONDS) for verb in ("contains", "get", "put")}
        """Of each batch by verb; of `contains` those that failed too."""
        self.nbytes = {verb: Histogram(BYTES) for verb in ("get", "put")}
        """Hit or stored by each batch."""
        self.latency: float | None = None
        """What a `contains` has taken lately, in seconds; None before the first."""
        self._lately, self._failed = deque[float](maxlen=_LATELY), False
        self.seconds_per_byte: float | None = None
        """What a byte has cost lately, batches read side by side; None before the first that hit."""
        self._reads, self._read_at = deque([_BENEFIT_OF_DOUBT], _READS), -math.inf

    def figures(self) -> dict[str, float]:
        """The counters as a dict, for `kvkeep status`."""
        with self._lock:
            return dict(self.counters)

    def read_seconds(self, nbytes: int) -> float:
        """How long reading so much is likely to take, by what was read before; of a tier that nothing was
        read from yet, only what asking takes: that is worth finding out."""
        with self._lock:
            rate = _rate(self._reads)
        return (self.latency or 0.0) + rate * nbytes

    @property
    def stale(self) -> bool:
        """Whether what is known of reading is so old that it may be otherwise now."""
        return self._clock() - self._read_at > _STALE

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        began, found = self._clock(), -1
        try:
            held = self._counted(lambda: self.inner.contains(keys))
            found = sum(held)
        finally:  # also after a failure: a store that times out is slow, until it is back
            took = self._clock() - began
            with self._lock:
                if self._failed and found >= 0:
                    self._lately.clear()
                self._failed = found < 0
                self._lately.append(took)
                self.latency = median(self._lately)
                self.seconds["contains"].add(took)
                self.counters.update({} if self._failed else {"asked": len(keys), "found": found})
        return held

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        began = self._clock()
        results = self._counted(lambda: self.inner.get(keys, buffers))
        now = self._clock()
        took = now - began
        nbytes = sum(len(buffer) for buffer, got in zip(buffers, results, strict=True) if got is Got.HIT)
        with self._lock:
            self.counters.update(hits=results.count(Got.HIT), misses=results.count(Got.MISS))
            self.counters.update(damaged=results.count(Got.DAMAGED), got_bytes=nbytes)
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
            self.counters.update(stored=len(stored), put_bytes=sum(stored))
            self.counters["refused"] += results.count(Put.REFUSED)
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
            self._reads = deque([_BENEFIT_OF_DOUBT], _READS)
        self._reads.append((nbytes, seconds))
        self._read_at = ended
        self.seconds_per_byte = _rate([read for read in self._reads if read is not _BENEFIT_OF_DOUBT])

    def _counted(self, verb: Callable[[], _T]) -> _T:
        try:
            return verb()
        except TierUnavailable as error:
            with self._lock:
                self.counters.update(("errors", f"errors_{_kind(error)}"))
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


def _rate(reads: Iterable[tuple[int, float]]) -> float:
    """Seconds per byte, but for the batch that took longest: it may have been held up."""
    kept = sorted(reads, key=lambda read: read[1] / read[0])
    kept = kept[:-1] if len(kept) > 2 else kept
    return sum(seconds for _, seconds in kept) / sum(nbytes for nbytes, _ in kept)
