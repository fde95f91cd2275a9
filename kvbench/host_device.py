"""A device that is none: streams and events over host memory, for what CUDA cannot be asked here.

With a `random.Random` it executes as late and as much out of order as CUDA's rules allow: streams
interleave anyhow, the copies of a batch come in any order, nothing is done before somebody waits for it.
A missing fence then shows as wrong bytes. Without one, all is done when it is submitted.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable

from kvkeep.errors import DeviceError
from kvkeep.transfer.streams import Backend, Copies

__all__ = ["HostBackend", "HostEvent", "HostStream"]

_CHANGE = 1 / 16

Work = list[Callable[[], object]]
"""Steps in any order."""


class HostEvent:
    """A point in a stream's work."""

    def __init__(self, backend: HostBackend) -> None:
        self._backend = backend
        self.at: float | None = None

    def query(self) -> bool:
        """Whether it is reached; a late device comes a little further with every look."""
        self._backend.advance(1)
        return self.at is not None

    def synchronize(self) -> None:
        """Execute, in an order of chance, until it is."""
        while self.at is None:
            assert self._backend.advance(1) or self.at is not None, "an event that no stream will reach"

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Milliseconds."""
        assert self.at is not None
        assert end_event.at is not None
        return (end_event.at - self.at) * 1e3


Item = HostEvent | Work | tuple[HostEvent]


class HostStream:
    """Work in order."""

    def __init__(self, backend: HostBackend) -> None:
        self._backend = backend
        self.queue: deque[Item] = deque()

    def submit(self, work: Work) -> None:
        """Add steps that may come in any order among themselves."""
        self._backend.submit(self, list(work))

    def record_event(self, event: None = None) -> HostEvent:
        """See `kvkeep.transfer.streams.Stream`."""
        recorded = HostEvent(self._backend)
        self._backend.submit(self, recorded)
        return recorded

    def wait_event(self, event: HostEvent) -> None:
        """See `kvkeep.transfer.streams.Stream`."""
        self._backend.submit(self, (event,))

    def step(self, chance: random.Random) -> bool:
        """Execute one step, if the next one may be executed."""
        if not self.queue:
            return False
        head = self.queue[0]
        if isinstance(head, tuple):
            if head[0].at is None:
                return False
            self.queue.popleft()
        elif isinstance(head, HostEvent):
            head.at = time.perf_counter()
            self.queue.popleft()
        elif head:
            head.pop(chance.randrange(len(head)))()
        else:
            self.queue.popleft()
        return True


class HostBackend(Backend):
    """One such device. `limit`: bytes that may be registered; `gathering`: what `gather` runs."""

    def __init__(
        self,
        late: random.Random | None = None,
        limit: float = float("inf"),
        gathering: Callable[[Copies], None] | None = None,
    ) -> None:
        self._late = late
        self._chance = late or random.Random(0)
        self._limit = limit
        self._gathering = gathering
        self._lock = threading.RLock()  # pageable copies are submitted by a thread of their own
        self._favoured: list[HostStream] = []  # first come first: the last ones fall far behind
        self.registered: dict[int, int] = {}
        self.attended: set[str] = set()
        self.gathered = 0
        self.engine = self.stream()

    def submit(self, stream: HostStream, item: Item) -> None:
        """Add to a stream's work."""
        with self._lock:
            stream.queue.append(item)
        if self._late is None:
            self.finish()

    def advance(self, steps: int) -> bool:
        """Execute so many steps; whether there was one."""
        done = False
        for _ in range(steps):
            with self._lock:
                if self._chance.random() < _CHANGE:
                    self._chance.shuffle(self._favoured)
                done = any(stream.step(self._chance) for stream in self._favoured)
        return done

    def finish(self) -> None:
        """Execute all."""
        while self.advance(1):
            pass

    def attend(self) -> None:
        self.attended.add(threading.current_thread().name)

    def current(self) -> HostStream:
        return self.engine

    def stream(self, urgent: bool = False) -> HostStream:
        self._favoured.append(HostStream(self))
        return self._favoured[-1]

    def copy(self, stream: HostStream, copies: Copies, *, saving: bool, pinned: bool) -> None:  # type: ignore[override]
        work: Work = []
        for paged, slot, size in zip(*(column.tolist() for column in copies), strict=True):
            if pinned:
                self._check(slot, size)
            target, source = (slot, paged) if saving else (paged, slot)
            work.append(lambda to=target, start=source, size=size: ctypes.memmove(to, start, size))  # type: ignore[misc]
        stream.submit(work)
        if not pinned:  # as CUDA does
            stream.record_event().synchronize()

    def gather(self, stream: HostStream, copies: Copies) -> None:  # type: ignore[override]
        if self._gathering is None:
            self.copy(stream, copies, saving=False, pinned=True)
            return
        self.gathered += len(copies.sizes)
        stream.submit([lambda: self._gathering(copies)])  # type: ignore[misc]

    def _check(self, address: int, nbytes: int) -> None:
        if not any(
            start <= address and address + nbytes <= start + n for start, n in self.registered.items()
        ):
            raise DeviceError("a copy that no one registration covers")

    def register(self, address: int, nbytes: int) -> int:
        if sum(self.registered.values()) + nbytes > self._limit:
            return 2
        self.registered[address] = nbytes
        return 0

    def unregister(self, address: int) -> None:
        del self.registered[address]
