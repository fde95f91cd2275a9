"""A keeper's socket: one keeper per path, and nobody else's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from kvkeep.errors import ConfigError

__all__ = ["discard", "listen", "locked"]

_LOCK_WAIT, _LOCK_POLL = 30.0, 0.01  # seconds; to start a keeper may take 20


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600; a dead keeper's socket is replaced. Raises ConfigError."""
    try:
        # Before the umask, under which nobody but root could enter the new directory.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of two keepers that start at once, both could find a dead one's socket, and the slower one
        # would remove what the faster one has just bound.
        with locked(_lock_path(path)):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    raise ConfigError(
                        f"{path} exists and is not a socket: choose another --socket, or remove it"
                    )
                if _answers(path):
                    raise ConfigError(
                        f"another keeper serves {path}: choose another --socket, or stop that one"
                    )
                path.unlink()
            return _bind(path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error


def discard(path: Path) -> None:
    """Remove a socket that nobody serves. Raises OSError: a keeper is starting on it, or not ours."""
    with locked(_lock_path(path), wait=0.0):
        if stat.S_ISSOCK(path.lstat().st_mode) and not _answers(path):
            path.unlink()


@contextlib.contextmanager
def locked(path: Path, wait: float = _LOCK_WAIT) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is there only meanwhile.

    Raises BlockingIOError where another process still holds it after `wait` seconds: it may be stopped.
    """
    deadline = time.monotonic() + wait
    while (fd := _lock(path)) is None:
        if time.monotonic() >= deadline:
            raise BlockingIOError(errno.EAGAIN, f"another process holds {path}")
        time.sleep(_LOCK_POLL)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _lock(path: Path) -> int | None:
    """The file at `path`, locked; None where another process holds it, or has removed it meanwhile."""
    with contextlib.ExitStack() as stack:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, fd)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.lstat()):
                stack.pop_all()
                return fd
    return None


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


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
