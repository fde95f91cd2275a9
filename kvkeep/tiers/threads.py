"""Threads of a tier: one batch's values, several at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvkeep.errors import TierUnavailable

__all__ = ["BATCHES", "Threads"]

BATCHES = 3
"""At once: a keeper reads two and writes one, and none is to wait for another's values."""


class Threads:
    """Helps callers with their batches; thread-safe. All callers share the threads."""

    def __init__(self, depth: int, name: str) -> None:
        self.depth = depth
        """Values of one batch that are worked on at a time, the caller's thread among them."""
        self._pool = ThreadPoolExecutor(BATCHES * depth, thread_name_prefix=name)

    def each(self, places: Iterable[int], work: Callable[[int], None]) -> None:
        """Call `work` with each of `places` (0 or more), in order, `depth` at a time. What is no sequence is
        asked for the next one by one thread, while the others work.

        Returns when all have ended. After an OSError or TierUnavailable no further ones are begun, and the
        first one is raised.
        """
        waiting, failures, turn = iter(places), list[Exception](), threading.Lock()

        def run() -> None:
            while not failures:
                try:
                    with turn:
                        place = next(waiting, -1)
                    if place < 0:
                        return
                    work(place)
                except (OSError, TierUnavailable) as error:
                    failures.append(error)

        helpers = list[Future[None]]()
        with contextlib.suppress(RuntimeError):  # closed: this thread ends its batch alone
            for _ in range(min(self.depth, len(places) if isinstance(places, Sized) else self.depth) - 1):
                helpers.append(self._pool.submit(run))
        try:
            run()
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]  # those that found a thread
            wait(begun)
        for helper in begun:
            helper.result()
        if failures:
            raise failures[0]

    def close(self, wait_for_it: bool = True) -> None:
        """End the threads, and wait until they have."""
        self._pool.shutdown(wait=wait_for_it)
