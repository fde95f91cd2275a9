"""Calls into libraries that cannot be cancelled: who waits for one gives up at a deadline, or at close.

They run on daemon threads, so that one which hangs keeps neither its caller nor the process. What a call
that was given up may still do to the caller's buffers is the tier's to prevent: a `Gate`, or a landing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from kvkeep.errors import KVKeepError, TierUnavailable

__all__ = ["Calls", "Gate"]

_R = TypeVar("_R")
_LIBRARY_ERRORS = (RuntimeError, OSError, ValueError, TypeError, MemoryError)


class Calls:
    """Threads for one library. Owned by a tier, which closes them before it lets the library go."""

    def __init__(self, name: str, threads: int, queues: bool = False) -> None:
        """`queues`: calls beyond the threads wait for one; else they are refused, so that a library which
        does not come back is soon not called any more."""
        self._name, self._most, self._queues = name, threads, queues
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._threads = 0
        self.out = 0
        """Calls that were begun and have not come back."""
        self._closed = False

    def begin(self, work: Callable[[], _R]) -> Future[_R]:
        """Call `work` on a thread of ours. What is added to the future by `add_done_callback` runs there
        too, and counts as part of the call. Raises TierUnavailable when closed, or too many are out."""
        future: Future[_R] = Future()
        with self._changed:
            self._check()
            if self.out >= self._most and not self._queues:
                raise TierUnavailable(f"{self._name}: {self.out} calls have not come back")
            self.out += 1
            if self._threads < min(self.out, self._most):
                self._threads += 1
                threading.Thread(target=self._serve, name=f"kvkeep-{self._name}", daemon=True).start()
        self._queue.put((future, work))
        return future

    def end(self, future: Future[_R], timeout: float | None = None) -> _R:
        """The call's result. Raises TierUnavailable if it is not there within `timeout` seconds, if the
        tier is closed meanwhile (in both cases the call is still out), or if the library raised."""
        if not future.done():
            with self._changed:
                self._changed.wait_for(lambda: future.done() or self._closed, timeout)
        if not future.done():
            self._check()
            raise TierUnavailable(f"{self._name}: no answer within {timeout:g} s") from TimeoutError()
        try:
            return future.result()
        except _LIBRARY_ERRORS as error:
            raise TierUnavailable(f"{self._name}: {error}") from error

    def run(self, work: Callable[[], _R], timeout: float | None = None) -> _R:
        """Begin and end in one."""
        return self.end(self.begin(work), timeout)

    def each(self, work: Callable[[Any], _R], items: Sequence[Any], wait_for_all: bool = False) -> list[_R]:
        """The results of `work` on all items, side by side. Raises TierUnavailable for the first that failed:
        what has not begun then is not begun any more; `wait_for_all`: and the others have ended."""
        futures = list[Future[_R]]()
        try:
            for item in items:
                futures.append(self.begin(partial(work, item)))
            return [self.end(future) for future in futures]
        finally:
            begun = [future for future in futures if not future.cancel()]
            if wait_for_all:
                wait(begun)

    def close(self, timeout: float) -> bool:
        """Begin no more calls, and wait for none. Returns whether all have come back within `timeout`
        seconds: if not, the library must be left as it is, since a thread is inside."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._closed:
                self._closed = True
                for _ in range(self._threads):
                    self._queue.put(None)  # behind what was begun
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self.out, max(0.0, deadline - time.monotonic()))

    def _check(self) -> None:
        if self._closed:
            raise TierUnavailable(f"{self._name}: the tier is closed")

    def _serve(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._call(*item)
                del item  # an idle thread keeps nobody's memory
        finally:
            with self._changed:
                self._threads -= 1

    def _call(self, future: Future[Any], work: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(work())
        except (KVKeepError, *_LIBRARY_ERRORS) as error:
            future.set_exception(error)
        finally:
            if not future.done():  # an error that nobody thought of ends this thread, not its caller
                future.set_exception(TierUnavailable(f"{self._name}: an unexpected error"))
            with self._changed:
                self.out -= 1
                self._changed.notify_all()


class Gate:
    """Through which calls of one verb reach the caller's buffers, until the verb ends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._shut = 0, False

    @contextmanager
    def passing(self) -> Iterator[bool]:
        """For the duration, the buffers may be written to if it says so."""
        with self._changed:
            may = not self._shut
            self._inside += may
        try:
            yield may
        finally:
            with self._changed:
                self._inside -= may
                self._changed.notify_all()

    def shut(self) -> None:
        """The verb ends: waits for who is inside (a copy in memory, no I/O), and lets nobody in again."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._inside)
