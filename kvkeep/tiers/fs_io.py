"""Whole files in and out of the caller's memory, past the page cache where that can be.

O_DIRECT takes memory and lengths of whole pages, which the arena's are; it saves a copy by the CPU, and
the page cache from being filled with what the arena holds anyway. What it cannot do is done without.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np

from kvkeep.tiers.base import Buffer

__all__ = ["sync_directory", "takes_direct", "transfer", "write_file"]

_PAGE = 4096


def transfer(call: Callable[..., int], fd: int, view: Buffer, direct: bool) -> int:
    """Move all of `view` by `os.preadv` or `os.pwritev`, from offset 0; returns how much could be moved.

    `direct`: past the page cache, where `view` and the file system allow it. Raises OSError.
    """
    at = 0
    direct = direct and _is_aligned(view) and _set_direct(fd, True)
    while at < len(view):
        try:
            moved = call(fd, [view[at:]], at)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = _set_direct(fd, False)
            continue
        if not moved:
            break
        at += moved
        if direct and at % _PAGE:  # cut short between two pages
            direct = _set_direct(fd, False)
    return at


def write_file(path: str, value: Buffer, direct: bool, used_at: int, sync: bool) -> None:
    """Write a new file whose mtime is `used_at` ns. Raises OSError, also where only a part was taken."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if transfer(os.pwritev, fd, value, direct) != len(value):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.utime(fd, ns=(used_at, used_at))
        if sync:
            os.fdatasync(fd)
    finally:
        os.close(fd)


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
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.link(path, f"{path}-link")
        os.unlink(f"{path}-link")
        return _set_direct(fd, True) and os.pwrite(fd, page, 0) == _PAGE
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(fd)
        os.unlink(path)


def _is_aligned(view: Buffer) -> bool:
    if len(view) % _PAGE or not len(view):
        return False
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % _PAGE == 0


def _set_direct(fd: int, wanted: bool) -> bool:
    """Switch O_DIRECT of an open file; whether it is on now. (At open(2), a refusal leaves a file behind.)"""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT if wanted else 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return wanted
