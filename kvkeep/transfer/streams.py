"""What copies on a device need of it, and nothing else: streams, events, copies, pinned memory.

The bookkeeping above it (`kvkeep.transfer.cuda`) is the same on every backend, so that tests run it on
one that executes late and out of order. The names are CUDA's; torch's streams and events fit as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvkeep.transfer.base import Offsets

__all__ = ["Backend", "Copies", "Event", "Pending", "Stream", "merge", "split"]


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the work before it is done; never waits."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until it is."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this one to a later one; both are done."""
        ...


class Stream(Protocol):
    """Work of a device, in order."""

    def record_event(self, event: Any = None, /) -> Event:
        """Mark the end of what has been submitted so far, by an event that tells the time."""
        ...

    def wait_event(self, event: Any, /) -> None:
        """What is submitted from now on begins after this event. The calling thread does not wait."""
        ...


class Copies(NamedTuple):
    """Runs of bytes, all of one direction, in any order: addresses and sizes, int64 [n]."""

    paged: Offsets
    """In the engine's KV cache, on the device."""
    slots: Offsets
    """In the arena."""
    sizes: Offsets


class Backend(ABC):
    """One device. Calls return when the work is in the stream's queue, except where they say otherwise."""

    batches = True
    """Whether `copy` is one call to the driver, however many they are."""

    def attend(self) -> None:
        """Called by each thread of ours, first of all: what it asks of the device must not disturb a graph
        that the engine's thread captures meanwhile."""
        return

    @abstractmethod
    def current(self) -> Stream:
        """The stream on which the engine computes, on this thread."""

    @abstractmethod
    def stream(self, urgent: bool = False) -> Stream:
        """A new stream of our own; `urgent`: its kernels go before the engine's."""

    @abstractmethod
    def copy(self, stream: Stream, copies: Copies, *, saving: bool, pinned: bool) -> None:
        """By the copy engines. Not `pinned`: blocks until the stream has reached it. Raises DeviceError."""

    @abstractmethod
    def gather(self, stream: Stream, copies: Copies) -> None:
        """Arena → device by a kernel that reads pinned memory itself; all is aligned to WORD bytes."""

    @abstractmethod
    def register(self, address: int, nbytes: int) -> int:
        """Pin memory of ours; blocks, and may take a second per GiB. Returns 0, or the driver's error."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo `register` of this address."""


class Pending:
    """Copies under way. `wait` belongs to a thread that may wait."""

    def __init__(self, nbytes: int, began: Event, ended: Event | Future[Event]) -> None:
        self.nbytes = nbytes
        self._began = began
        self._ended = ended

    @property
    def event(self) -> Event:
        """Their end. Blocks, and raises what went wrong, where pageable copies are still being submitted."""
        return self._ended.result() if isinstance(self._ended, Future) else self._ended

    def done(self) -> bool:
        """Whether the bytes are there; never blocks."""
        if isinstance(self._ended, Future) and not self._ended.done():
            return False
        return self.event.query()

    def wait(self) -> float:
        """Block until they are; returns the seconds that the device took. Raises DeviceError."""
        self.event.synchronize()
        return self._began.elapsed_time(self.event) / 1e3


def merge(copies: Copies) -> Copies:
    """Make one of neighbours that continue each other on both sides."""
    paged, slots, sizes = copies
    if not len(sizes):
        return copies
    after = (paged[1:] == paged[:-1] + sizes[:-1]) & (slots[1:] == slots[:-1] + sizes[:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~after]))
    return Copies(paged[starts], slots[starts], np.add.reduceat(sizes, starts))


def split(copies: Copies, base: int, step: int) -> Copies:
    """Cut at every `base` + k·`step` of the arena: no copy may span two registrations."""
    paged, slots, sizes = copies
    first = (slots - base) // step
    parts = (slots + sizes - 1 - base) // step - first + 1
    if not (parts > 1).any():
        return copies
    which = np.repeat(np.arange(len(sizes)), parts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = np.maximum(slots[which], base + (first[which] + number) * step)
    stop = np.minimum((slots + sizes)[which], base + (first[which] + number + 1) * step)
    return Copies(paged[which] + start - slots[which], start, stop - start)
