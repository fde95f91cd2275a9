"""Work that can wait: preparing memory while an engine may need every core.

Priorities do not suffice: with scheduler autogroups, and with cgroups, a thread of lowest priority in the
keeper's session still gets as much of a core as an engine's thread, and engines wait for their slowest one
(seen: a prefill three times as long while an arena of 4 GiB was prepared on two cores).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

__all__ = ["GiveWay"]

_NOTICED_NS, _PAUSE = 200_000, 0.05


class GiveWay:
    """Called by a background thread after each few milliseconds of work: sleeps where others want its core.

    Made in that thread, which gets the lowest priority. Others want the core when the thread had to wait for
    one, which the kernel counts (schedstat; without it this never sleeps).
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._figures = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._waited = self._read()

    def __call__(self) -> None:
        waited = self._read()
        if waited - self._waited > _NOTICED_NS:
            time.sleep(_PAUSE)
            waited = self._read()  # the wait after the sleep says nothing of the work
        self._waited = waited

    def _read(self) -> int:
        try:
            return int(self._figures.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
