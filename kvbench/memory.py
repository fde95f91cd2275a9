"""Memory as a keeper hands it out: a memfd with all its pages, huge ones where it has them."""

from __future__ import annotations

import os

from kvkeep import pages
from kvkeep.errors import ConfigError

__all__ = ["arena"]


def arena(nbytes: int, fd: int | None = None) -> memoryview:
    """Map a memfd of `nbytes`: a new one, or `fd`, which stays the caller's. Raises ConfigError."""
    own = os.memfd_create("kvkeep-bench", os.MFD_CLOEXEC) if fd is None else fd
    try:
        os.ftruncate(own, nbytes)
        memory = pages.map_shared(own, nbytes)
        place = pages.address(memory)
        pages.allocate(own, place, 0, nbytes)
    except OSError as error:
        what = f"no arena of {nbytes / 2**20:.0f} MiB: {error.strerror}; ask for less"
        raise ConfigError(what) from error
    finally:
        if fd is None:
            os.close(own)
    pages.populate(place, nbytes)
    return memory
