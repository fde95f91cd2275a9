"""Work that can wait: preparing memory while an engine may need every core.

By pauses, not by priority. With scheduler autogroups, and with cgroups, a thread of lowest priority in the
keeper's session gets as much of a core as an engine's thread; and within the engine's process it would hold
the lock of the address space while it waits for a core, so that the engine waits for both.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

__all__ = ["GiveWay"]

_NOTICED_NS, _PAUSE = 200_000, 0.05


class GiveWay:
    """Called by a background thread after each few milliseconds of work: sleeps where others want its core.

    Made in that thread. Others want the core when the thread had to wait for one, which the kernel counts
    (schedstat; without it this never sleeps). `pause`: seconds that it then sleeps.
    """

    def __init__(self, pause: float = _PAUSE) -> None:
        self._pause = pause
        self._figures = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._waited = self._read()

    def __call__(self) -> None:
        waited = self._read()
        if waited - self._waited > _NOTICED_NS:
            time.sleep(self._pause)
            waited = self._read()  # the wait after the sleep says nothing of the work
        self._waited = waited

    def _read(self) -> int:
        try:
            return int(self._figures.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
