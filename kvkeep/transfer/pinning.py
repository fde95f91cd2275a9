"""Registers the arena's mapping with a device, so that its copy engines reach it directly.

In the background and in pieces: registering takes up to a second per GiB, and holds locks of the driver
meanwhile. What is registered is always the arena's beginning, so one number says how far it is.
"""

from __future__ import annotations

import logging
import os
import threading

from kvkeep import pages
from kvkeep.background import GiveWay
from kvkeep.errors import DeviceError
from kvkeep.transfer.streams import Backend

__all__ = ["REGISTER_STEP", "Pinning"]

log = logging.getLogger("kvkeep.transfer")

REGISTER_STEP = 256 << 20
"""Bytes per registration: a piece must not hold the driver's locks for long. Not measured yet on a GPU."""
_CAPTURING = (900, 901)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, _INVALIDATED: a graph is being captured
_AGAIN = 0.5  # seconds until the next try then


class Pinning:
    """One process's registration of one arena mapping; `registered` bytes from its start are pinned."""

    def __init__(self, backend: Backend, arena: memoryview, step: int = REGISTER_STEP) -> None:
        self.registered = 0
        self.step = step
        self._backend, self._arena = backend, arena  # which stays mapped as long as the thread touches it
        self._base, self._nbytes = pages.address(arena), len(arena)
        self._pieces: list[int] = []
        self._lock = threading.Lock()  # one piece is registered, or all are let go of
        self._closed = threading.Event()

    def start(self, fd: int) -> threading.Thread:
        """Register all of it in a thread, as the keeper allocates it; `fd` stays the caller's."""
        thread = threading.Thread(target=self._run, args=(os.dup(fd),), name="kvkeep-pin", daemon=True)
        thread.start()
        return thread

    def _run(self, fd: int) -> None:
        self._backend.attend()
        closed = self._closed.is_set
        try:
            there = pages.await_allocation(fd, self._nbytes, closed)
        finally:
            os.close(fd)
        if not there:
            if not closed():
                self._warn("the keeper does not allocate it ahead (--prefault no)")
            return
        give_way = GiveWay()
        for offset in range(0, self._nbytes, self.step):
            size = min(self.step, self._nbytes - offset)
            pages.populate(self._base + offset, size, give_way, closed)
            while (error := self._register(offset, size)) in _CAPTURING:
                self._closed.wait(_AGAIN)
            if error:
                self._warn(f"the driver refuses more of it (CUDA error {error}; see `kvkeep doctor`)")
            if error or closed():
                return

    def _register(self, offset: int, size: int) -> int:
        """The driver's error, if there is one. Does nothing once it is closed."""
        with self._lock:
            if self._closed.is_set():
                return 0
            error = self._backend.register(self._base + offset, size)
            if not error:
                self._pieces.append(self._base + offset)
                self.registered = offset + size
        return error

    def _warn(self, why: str) -> None:
        log.warning(
            "%.1f of the arena's %.1f GiB are pinned, as %s: other copies go through pageable memory, slower",
            self.registered / 2**30,
            self._nbytes / 2**30,
            why,
        )

    def close(self) -> None:
        """Let go of what is registered. No copy may be under way."""
        self._closed.set()
        with self._lock:
            self.registered = 0
            pieces, self._pieces = self._pieces, []
            refused = 0
            for address in pieces:
                try:
                    self._backend.unregister(address)
                except DeviceError:
                    refused += 1  # the others go all the same
            if refused:
                log.warning("the driver did not let go of %d pieces of the arena", refused)
