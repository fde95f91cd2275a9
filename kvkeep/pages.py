"""The arena's memory: one memfd, which the keeper and every rank of every engine map.

Of huge pages wherever they can be had. Ordinary ones lie where chance put them, and a device moves what lies
apart at up to half the speed; and each of them is entered into each process's page table, which takes ten
times as long as a copy. MADV_COLLAPSE (Linux 6.1) makes huge pages of what is allocated, without a privilege
and whatever `transparent_hugepage/shmem_enabled` says. A mapping has them only from a multiple of their size.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvkeep.background import Busy, GiveWay, never
from kvkeep.errors import ConfigError

__all__ = [
    "address",
    "allocate",
    "await_allocation",
    "create",
    "huge_size",
    "map_over",
    "map_shared",
    "populate",
    "prepare",
]

_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_PREPARE_STEP = 2 << 20
_MOST_HUGE = 32 << 20  # kernels with pages of 64 KiB have huge ones of 512 MiB, which nothing here fills
_LOOK_EVERY, _PATIENCE = 0.1, 10.0  # seconds

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def create(nbytes: int, huge_pages: bool, name: str = "kvkeep-arena", final: bool = True) -> int:
    """A memfd of fixed size: no client can shrink it under another's feet. Raises ConfigError.

    `huge_pages`: of those that the administrator has reserved, all of them at once. `final`: no more can be
    forbidden later.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge_pages else 0)
    try:
        fd = os.memfd_create(name, flags)
        os.ftruncate(fd, nbytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (fcntl.F_SEAL_SEAL if final else 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if huge_pages:
            os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        remedy = (
            "reserve huge pages (vm.nr_hugepages), or leave --huge-pages out"
            if huge_pages
            else "give --memory less"
        )
        raise ConfigError(
            f"cannot create an arena of {nbytes / 2**30:.2f} GiB: {error.strerror}; {remedy}"
        ) from error
    return fd


def huge_size() -> int:
    """Bytes of a huge page; 0 where the kernel has none that would do."""
    try:
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if size <= _MOST_HUGE else 0


def map_shared(fd: int, nbytes: int) -> memoryview:
    """Map a memfd where huge pages fit. Unmapped when nothing refers to it any more. Raises OSError."""
    align = huge_size() or mmap.PAGESIZE
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    begin = _map(None, nbytes + align, 0, reserve, -1)
    end = begin + nbytes + align
    start = -(-begin // align) * align
    try:
        map_over(start, fd, nbytes)
    except OSError:
        _libc.munmap(begin, end - begin)
        raise
    stop = -(-(start + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    for low, high in ((begin, start), (stop, end)):
        if low < high:
            _libc.munmap(low, high - low)
    owner = (ctypes.c_ubyte * nbytes).from_address(start)
    weakref.finalize(owner, _libc.munmap, start, nbytes).atexit = False  # threads may still use it then
    return memoryview(owner).cast("B")


def map_over(place: int, fd: int, nbytes: int) -> None:
    """Map a memfd over what the caller has mapped from address `place` on. Raises OSError."""
    _map(place, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def address(memory: memoryview) -> int:
    """Where a mapping begins."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def allocate(fd: int, place: int, at: int, nbytes: int, huge: bool = True) -> int:
    """Allocate these bytes of a memfd, which is mapped at address `place`, `huge` pages if they can be had.
    Returns how many bytes are: none where the kernel cannot, or finds no room that hangs together, or others
    have pinned them. Raises OSError without memory."""
    os.posix_fallocate(fd, at, nbytes)
    if not (huge and (size := huge_size())):
        return 0
    first, last = -(-at // size) * size, (at + nbytes) // size * size
    if first >= last or _libc.madvise(place + first, last - first, _MADV_COLLAPSE):
        return 0
    return last - first


def populate(
    place: int, nbytes: int, give_way: Callable[[], object] = never, stop: Callable[[], bool] = never
) -> bool:
    """Enter the pages from address `place` on into this process's page table. False after `stop()`, and on a
    kernel that cannot (before 5.14), or without memory: they come on first touch instead.

    In small steps, since each holds a lock that the process needs for its other memory.
    """
    for at in range(0, nbytes, _PREPARE_STEP):
        step = min(_PREPARE_STEP, nbytes - at)
        if stop() or _libc.madvise(place + at, step, _MADV_POPULATE_WRITE):
            return False
        give_way()
    return True


def prepare(
    memory: memoryview, fd: int, busy: Busy = never, closed: threading.Event | None = None
) -> threading.Thread:
    """Enter a mapping's pages into this process's page table, in the background, giving way.

    A first touch costs about ten times a copy of the same bytes, if pages are not huge; a copy that comes
    before its page was prepared just pays that. Never allocates a page: it begins once all of the memfd is
    allocated, and does not begin where the keeper does not allocate it ahead. The thread ends with its work,
    or with the process, or once `closed` is set. `fd` stays the caller's. `busy`: see `GiveWay`.
    """
    arguments = (memory, os.dup(fd), busy, closed or threading.Event())
    thread = threading.Thread(target=_prepare, args=arguments, name="kvkeep-prepare", daemon=True)
    thread.start()
    return thread


def _prepare(memory: memoryview, fd: int, busy: Busy, closed: threading.Event) -> None:
    give_way = GiveWay(busy=lambda: busy() and not closed.is_set())
    try:
        if not await_allocation(fd, len(memory), closed.is_set):
            return
    finally:
        os.close(fd)
    populate(address(memory), len(memory), give_way, closed.is_set)


def await_allocation(fd: int, nbytes: int, stop: Callable[[], bool] = never) -> bool:
    """Wait until all of a file is allocated; False once that has made no progress for a while, or `stop()`.

    By its count of blocks: SEEK_DATA takes what fallocate reserved for a hole until it is written.
    """
    allocated, since = -1, time.monotonic()
    while (now := os.fstat(fd).st_blocks * 512) < nbytes:
        if now != allocated:
            allocated, since = now, time.monotonic()
        if stop() or time.monotonic() - since > _PATIENCE:
            return False
        time.sleep(_LOOK_EVERY)
    return True
