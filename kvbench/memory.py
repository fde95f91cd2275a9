"""Memory as a keeper hands it out: a memfd with all its pages, huge ones where it has them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvkeep import pages
from kvkeep.errors import ConfigError

__all__ = ["arena"]


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
