"""Work that can wait: preparing memory while an engine may need every core.

By pauses, not by priority. With scheduler autogroups, and with cgroups, a thread of lowest priority in the
keeper's session gets as much of a core as an engine's thread; and within the engine's process it would hold
the lock of the address space while it waits for a core, so that the engine waits for both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Busy", "GiveWay", "never"]

Busy = Callable[[], bool]
"""Whether somebody is at work on the cores, so that work which can wait had better do so."""

_NOTICED_NS, _PAUSE = 200_000, 0.05


def never() -> bool:
    """Nobody that we know of is at work."""
    return False


class GiveWay:
    """Called by a background thread after each few milliseconds of work: sleeps where others want its core.

    Made in that thread. Others want the core when the thread had to wait for one, which the kernel counts
    (schedstat; without it this never sleeps). `pause`: seconds that it then sleeps. `busy`: sleep also
    while this says so.
    """

    def __init__(self, pause: float = _PAUSE, busy: Busy = never) -> None:
        self._pause = pause
        self._busy = busy
        self._figures = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._waited = self._read()

    def __call__(self) -> None:
        waited = self._read()
        if waited - self._waited > _NOTICED_NS or self._busy():
            time.sleep(self._pause)
            while self._busy():
                time.sleep(self._pause)
            waited = self._read()  # the wait after the sleep says nothing of the work
        self._waited = waited

    def _read(self) -> int:
        try:
            return int(self._figures.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
