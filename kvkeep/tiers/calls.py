"""Calls into libraries that cannot be cancelled: each is waited for only until a deadline.

They run on daemon threads, so that one which hangs keeps neither its caller nor the process. How many
may be out at once is bounded: a library that does not come back is soon not called any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import SimpleQueue
from typing import Any, TypeVar

from kvkeep.errors import TierUnavailable

__all__ = ["Calls"]

_R = TypeVar("_R")


class Calls:
    """Threads for one library. Owned by a tier, which closes them before it lets the library go."""

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._out = self._threads = 0
        self._closed = False

    def begin(self, work: Callable[[], _R]) -> Future[_R]:
        """Call `work` on a thread of ours. What is added to the future by `add_done_callback` runs there
        too, and counts as part of the call. Raises TierUnavailable when closed, or too many are out."""
        future: Future[_R] = Future()
        with self._changed:
            if self._closed:
                raise TierUnavailable(f"{self._name}: the tier is closed")
            if self._out == self._most:
                raise TierUnavailable(f"{self._name}: {self._out} calls have not come back")
            self._out += 1
            if self._out > self._threads:
                self._threads += 1
                threading.Thread(target=self._serve, name=f"kvkeep-{self._name}", daemon=True).start()
        self._queue.put((future, work))
        return future

    def end(self, future: Future[_R], timeout: float) -> _R:
        """The call's result. Raises TierUnavailable if it is not there within `timeout` seconds, or if the
        library raised; in the first case the call is still out."""
        try:
            return future.result(timeout)
        except FutureTimeout as error:
            raise TierUnavailable(f"{self._name}: no answer within {timeout:g} s") from error
        except (RuntimeError, OSError, ValueError) as error:  # what native libraries raise
            raise TierUnavailable(f"{self._name}: {error}") from error

    def run(self, work: Callable[[], _R], timeout: float) -> _R:
        """Begin and end in one."""
        return self.end(self.begin(work), timeout)

    def close(self, timeout: float) -> bool:
        """Begin no more calls. Returns whether all have come back within `timeout` seconds: if not, the
        library must be left as it is, since a thread is inside."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._closed:
                self._closed = True
                for _ in range(self._threads):
                    self._queue.put(None)  # behind what was begun
            return self._changed.wait_for(lambda: not self._out, max(0.0, deadline - time.monotonic()))

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            try:
                result = work()
            except (RuntimeError, OSError, ValueError, TypeError) as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, work, item
            with self._changed:
                self._out -= 1
                self._changed.notify_all()
