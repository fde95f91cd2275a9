"""A search for a keeper in the background, which goes on until it is over or nobody wants it any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from kvkeep.errors import KeeperUnavailable, KVKeepError

__all__ = ["Search"]

log = logging.getLogger("kvkeep.engines")

_RETRY_FIRST, _RETRY_MOST = 0.5, 10.0  # seconds between tries
_T = TypeVar("_T")


class Search(Generic[_T]):
    """Calls `attempt` in a thread of its own until it has found something, is refused, or is told to `stop`.

    `attempt` raises KeeperUnavailable to be called again, later and later; any other KVKeepError is the end.
    What it found belongs to whoever `take`s it, and goes to `discard` if nobody wants it any more.
    """

    def __init__(
        self, attempt: Callable[[], _T], discard: Callable[[_T], object], *, at_once: bool = False
    ) -> None:
        self._attempt, self._discard, self._at_once = attempt, discard, at_once
        self._found: _T | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of what was found: it is taken once
        threading.Thread(target=self._run, name="kvkeep-search", daemon=True).start()

    def take(self) -> _T | None:
        """What was found, once. An engine's loop asks: while there is nothing it costs an attribute read."""
        if self._found is None:
            return None
        with self._lock:
            found, self._found = self._found, None
        return found

    def stop(self) -> None:
        """Look no more; what was found is discarded unless somebody took it."""
        self._stop.set()
        if (found := self.take()) is not None:
            self._discard(found)

    def _run(self) -> None:
        wait = 0.0 if self._at_once else _RETRY_FIRST
        while not self._stop.wait(wait):
            wait = max(_RETRY_FIRST, min(2 * wait, _RETRY_MOST))
            try:
                self._found = self._attempt()
            except KeeperUnavailable:
                continue
            except KVKeepError as error:
                log.warning("the keeper refuses this engine, which goes on without it: %s", error)
            if self._stop.is_set():
                self.stop()  # whoever said so may have looked before there was anything
            return
