"""Whole files in and out of the caller's memory, past the page cache where that can be.

O_DIRECT takes memory and lengths of whole pages, which the arena's are; it saves a copy by the CPU, and
the page cache from being filled with what the arena holds anyway. What it cannot do is done without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import numpy as np

from kvkeep.tiers.base import Buffer

__all__ = [
    "in_turn",
    "is_aligned",
    "opened",
    "rename_new",
    "sync_directory",
    "takes_direct",
    "transfer",
    "write_file",
]

_PAGE = 4096
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def opened(path: str, flags: int, direct: bool) -> Iterator[tuple[int, bool]]:
    """A descriptor, and whether it goes past the page cache, as `direct` asks. Raises OSError."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0), 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:
            raise
        direct = False
        fd = os.open(path, (flags | os.O_CLOEXEC) & ~os.O_EXCL, 0o600)  # a refusal leaves the new file behind
    try:
        yield fd, direct
    finally:
        os.close(fd)


def transfer(call: Callable[..., int], fd: int, view: Buffer, direct: bool) -> int:
    """Move all of `view` by `os.preadv` or `os.pwritev`, from offset 0; returns how much could be moved.

    `direct`: `fd` goes past the page cache; what cannot be moved so goes through it. Raises OSError.
    """
    at = 0
    while at < len(view):
        try:
            moved = call(fd, [view[at:]], at)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = _through_cache(fd)
            continue
        if not moved:
            break
        at += moved
        if direct and at % _PAGE:  # cut short between two pages
            direct = _through_cache(fd)
    return at


def in_turn(name: str, depth: int) -> Callable[..., int]:
    """`os.preadv` or `os.pwritev`, by so many threads at a time: whoever waits for a turn has its file open
    already, so that the medium is not kept waiting for that."""
    turns = SimpleQueue[None]()
    for _ in range(depth):
        turns.put(None)

    def call(fd: int, views: list[Buffer], at: int) -> int:
        turns.get()
        try:
            return int(getattr(os, name)(fd, views, at))
        finally:
            turns.put(None)

    return call


def write_file(
    path: str, value: Buffer, write: Callable[..., int], direct: bool, used_at: int, sync: bool, new: bool
) -> None:
    """Write a file whose mtime is `used_at` ns by `os.pwritev`: a `new` one, or over one of the same length.
    Raises OSError, also if only a part was taken."""
    flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if new else 0)
    with opened(path, flags, direct and is_aligned(value)) as (fd, past_cache):
        if transfer(write, fd, value, past_cache) != len(value):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.utime(fd, ns=(used_at, used_at))
        if sync:
            os.fdatasync(fd)


def rename_new(source: str, target: str) -> bool:
    """Give a file a name that nobody has, in one call; False: this file system cannot. Raises OSError."""
    names = os.fsencode(source), os.fsencode(target)
    if not _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # EINVAL: NFS, for one
        return False
    raise OSError(number, os.strerror(number), source, None, target)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def takes_direct(directory: str) -> bool:
    """Whether files there can be written past the page cache. Raises OSError, also without hard links."""
    path, page = os.path.join(directory, "probe"), mmap.mmap(-1, _PAGE)
    try:
        with opened(path, os.O_WRONLY | os.O_CREAT, True) as (fd, direct):
            os.link(path, f"{path}-link")
            os.unlink(f"{path}-link")
            return direct and os.pwrite(fd, page, 0) == _PAGE
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.unlink(path)


def is_aligned(view: Buffer) -> bool:
    """Whether O_DIRECT takes this memory."""
    if len(view) % _PAGE or not len(view):
        return False
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % _PAGE == 0


def _through_cache(fd: int) -> bool:
    """Switch O_DIRECT of an open file off: False, as it is now."""
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    return False
