"""What a keeper takes from the operating system before it serves: its socket and its memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from kvkeep.errors import ConfigError

__all__ = ["arena", "listen"]


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600; a dead keeper's socket is replaced. Raises ConfigError."""
    try:
        # Before the umask, under which nobody but root could enter the new directory.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} exists and is not a socket: choose another --socket, or remove it")
            if _answers(path):
                raise ConfigError(f"another keeper serves {path}: choose another --socket, or stop that one")
            path.unlink()
        return _bind(path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.listen(128)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def arena(nbytes: int, huge_pages: bool) -> int:
    """A memfd of fixed size: no client can shrink it under another's feet."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge_pages else 0)
    try:
        fd = os.memfd_create("kvkeep-arena", flags)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
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
