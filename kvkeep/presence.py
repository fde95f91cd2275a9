"""What a keeper holds, for engines of its host to see without asking: most prompts begin like no other.

A table of counts in shared memory, found by a part of the key. Where a count is 0 nothing with such a key is
held, and an engine need not wait to hear so; any other count says nothing, and the engine asks.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from kvkeep import pages

__all__ = ["Presence", "PresenceView"]

_SHARE, _FEWEST = 1 << 14, 1 << 16
_F_SEAL_FUTURE_WRITE = 0x10
_Keys = npt.NDArray[np.uint64]


class Presence:
    """The keeper's side: a byte for each 16 KiB of memory, so that few chunks share one.

    Counts wrap round: one that is 0 again with 256 chunks costs engines what they would have found, no more.
    `tells`: False where what is not here may be elsewhere, or every lookup is to be heard of before its
    answer. Raises ConfigError without memory.
    """

    def __init__(self, memory_bytes: int, tells: bool) -> None:
        size = max(_FEWEST, 1 << (memory_bytes // _SHARE - 1).bit_length())
        nbytes = size + mmap.PAGESIZE
        self.fd = pages.create(nbytes, huge_pages=False, name="kvkeep-presence", final=False)
        """For engines, which cannot write to it from Linux 5.1 on."""
        table = np.frombuffer(pages.map_shared(self.fd, nbytes), np.uint8)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        self._counts, table[size] = table[:size], tells

    def add(self, keys: _Keys) -> None:
        """These are held from now on, or being written."""
        np.add.at(self._counts, _places(keys, len(self._counts)), 1)

    def remove(self, keys: _Keys) -> None:
        """These are held no longer."""
        np.subtract.at(self._counts, _places(keys, len(self._counts)), 1)


class PresenceView:
    """An engine's side. `fd` stays the caller's. Raises OSError or ValueError where it is no such table."""

    def __init__(self, fd: int) -> None:
        self._size = os.fstat(fd).st_size - mmap.PAGESIZE
        if self._size < _FEWEST or self._size & (self._size - 1):
            raise ValueError(f"a table of {self._size} counts")
        self._table = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)

    def absent(self, keys: _Keys) -> bool:
        """Whether certainly none of these is held."""
        return bool(self._table[self._size]) and not self._table[_places(keys, self._size)].any()


def _places(keys: _Keys, size: int) -> npt.NDArray[np.int64]:
    return (keys[:, 1] & np.uint64(size - 1)).astype(np.int64)
