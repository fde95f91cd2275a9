"""Memory as a keeper hands it out: a memfd with all its pages, huge ones where it has them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from kvkeep import pages
from kvkeep.errors import ConfigError

__all__ = ["Bed", "arena"]


def arena(nbytes: int, pieces: Sequence[int] = ()) -> memoryview:
    """Map `nbytes` of a memfd, or of each of `pieces`, memfds of the caller's, one behind the other.

    `pieces` of some huge pages each can be had as such. Raises ConfigError without memory.
    """
    total = nbytes * max(1, len(pieces))
    whole = os.memfd_create("kvkeep-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(whole, total)
        memory = pages.map_shared(whole, total)
        for number, fd in enumerate(pieces or [whole]):
            place = pages.address(memory) + number * nbytes
            if pieces:
                os.ftruncate(fd, nbytes)
                pages.map_over(place, fd, nbytes)
            pages.allocate(fd, place, 0, nbytes)
    except OSError as error:
        what = f"no arena of {total / 2**20:.0f} MiB: {error.strerror}; ask for less"
        raise ConfigError(what) from error
    finally:
        os.close(whole)
    pages.populate(pages.address(memory), total)
    return memory


class Bed:
    """What is moved in a round, by a tier and by its raw medium: `count` chunks to send, random bytes, and
    places for as many to come back to. Like a keeper's, all lie in one mapping, which a tier can `attach`;
    how pages lie decides how fast a device or a copy moves them, so both are to use these."""

    def __init__(self, chunk_bytes: int, count: int, depth: int) -> None:
        """`depth`: chunks under way at a time, and pieces of memory. Raises ConfigError without memory."""
        self.chunk_bytes, self.count, self.depth = chunk_bytes, count, depth
        self.nbytes = chunk_bytes * count
        self.sources, self.targets = (
            tuple(os.memfd_create("kvkeep-bench") for _ in range(depth)) for _ in range(2)
        )
        """Descriptors of the pieces, each of some chunks and a few pages; what is in them is not kept."""
        each = -(-count // depth) * chunk_bytes + 4 * mmap.PAGESIZE
        huge = pages.huge_size() or mmap.PAGESIZE
        each = -(-each // huge) * huge
        self.memory = arena(each, self.sources + self.targets)
        half = each * depth
        self.sent, self.back = (self._chunks(self.memory[at : at + half], each) for at in (0, half))
        for chunk in self.sent:
            chunk[:] = os.urandom(len(chunk))

    def _chunks(self, memory: memoryview, each: int) -> list[memoryview]:
        """Chunks that lie in the pieces, of `each` bytes, in turn."""
        size, places = self.chunk_bytes, [divmod(number, self.depth) for number in range(self.count)]
        return [memory[(at := piece * each + turn * size) : at + size] for turn, piece in places]

    def spoil(self) -> None:
        """Change each page that is read into, so that what does not come back is noticed."""
        for chunk in self.back:
            np.frombuffer(chunk[: len(chunk) // 8 * 8], np.uint64)[::512] ^= 1

    def whole(self) -> bool:
        """Whether all came back; by numpy, which is fifteen times as fast as memoryviews are."""
        views = zip(self.sent, self.back, strict=True)
        return all(
            np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)) for one, two in views
        )

    def close(self) -> None:
        """Let go of the memory's descriptors."""
        for fd in self.sources + self.targets:
            os.close(fd)
