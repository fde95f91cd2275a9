"""Memory as a keeper hands it out: a memfd with all its pages, mapped and touched."""

from __future__ import annotations

import contextlib
import mmap
import os

from kvkeep.errors import ConfigError

__all__ = ["arena"]


def arena(nbytes: int, fd: int | None = None, huge: bool = False) -> mmap.mmap:
    """Map a memfd of `nbytes`: a new one, or `fd`, which stays the caller's. Raises ConfigError.

    `huge`: of huge pages where the kernel has them. A device moves what lies side by side up to twice as
    fast, and how ordinary pages lie is chance.
    """
    own = os.memfd_create("kvkeep-bench", os.MFD_CLOEXEC) if fd is None else fd
    try:
        os.ftruncate(own, nbytes)
        memory = mmap.mmap(own, nbytes)
        if huge:
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            os.posix_fallocate(own, 0, nbytes)
    except OSError as error:
        what = f"no arena of {nbytes / 2**20:.0f} MiB: {error.strerror}; ask for less"
        raise ConfigError(what) from error
    finally:
        if fd is None:
            os.close(own)
    view = memoryview(memory)
    for at in range(0, nbytes, mmap.PAGESIZE):
        view[at] = 0
    return memory
