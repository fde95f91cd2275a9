"""Memory that native calls may still write to after we gave them up: never the caller's, never unmapped."""

from __future__ import annotations

import contextlib
import logging
import mmap
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Buffer

__all__ = ["Landing", "Landings", "address_of", "groups", "offsets"]

log = logging.getLogger("kvkeep.tiers")

_MOST_LOST = 8


class Landing:
    """One piece of memory, of whole pages."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages, which are copied from twice as fast
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(memory, np.uint8)
        self.address = address_of(self.array)


class Landings:
    """A few landings that calls take turns with. `register` makes one known to the library, and raises what
    it likes; `size` is in bytes."""

    def __init__(self, name: str, size: int, count: int, register: Callable[[Landing], None]) -> None:
        self._name, self._size, self._register = name, size, register
        self._free: queue.LifoQueue[Landing] = queue.LifoQueue()  # the last one used lies in the cache
        self._lock = threading.Lock()
        self._lost = 0
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """One more."""
        landing = Landing(self._size)
        self._register(landing)
        self._free.put(landing)

    def take_free(self) -> Landing | None:
        """One that nobody uses, if there is one now."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return None

    def take(self, timeout: float) -> Landing:
        """One that nobody uses. Raises TierUnavailable where none comes free within `timeout` seconds."""
        try:
            return self._free.get(timeout=timeout)
        except queue.Empty:
            what = "restart it" if self._lost >= _MOST_LOST else "the calls that use it have not come back"
            raise TierUnavailable(f"{self._name}: no memory is left to read into: {what}") from None

    def give(self, landing: Landing) -> None:
        """Nothing writes to it any more."""
        self._free.put(landing)

    def lose(self, landing: Landing) -> bool:
        """Something may write to it at any time, so it stays as it is, for good. Returns whether another one
        should be added; in the end there are none, and the tier is of no use until it is opened anew."""
        with self._lock:
            self._lost += 1
            _kept.append(landing)
        log.warning("%s: a call that went on for too long keeps its memory", self._name)
        return self._lost < _MOST_LOST


_kept: list[Landing] = []


def address_of(memory: Any) -> int:
    """Where a buffer lies. Holds no reference to it."""
    array = memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, np.uint8)
    return int(array.__array_interface__["data"][0])


def offsets(sizes: Sequence[int]) -> Iterator[int]:
    """Where each of these lies when they lie one behind the other."""
    at = 0
    for size in sizes:
        yield at
        at += size


def groups(buffers: Sequence[Buffer], limit: int) -> Iterator[range]:
    """Runs of places whose buffers are `limit` bytes or less together; a longer one is alone."""
    start, held = 0, 0
    for place, buffer in enumerate(buffers):
        if held and held + len(buffer) > limit:
            yield range(start, place)
            start, held = place, 0
        held += len(buffer)
    if held:
        yield range(start, len(buffers))
