"""The directory of a file-system tier: whether it is ours, how large it may get, who has it open.

```
kvkeep.json            format and default capacity; its presence makes the directory ours
members, writers       empty files, locked by who opens or closes, and by who writes
usage                  the books: see fs_space.py
tmp/<uuid>/lock        locked as long as that process has the tier open
tmp/<uuid>/<number>    values on their way in
<namespace>/<2 hex digits of the chunk key>/<chunk key>
```

All locks are flock: on NFS v4, Lustre (mounted with `flock`) and CephFS they hold between hosts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Key

__all__ = ["Membership", "flock", "leftovers", "locked", "prepare", "remedy", "value_path", "values"]

log = logging.getLogger("kvkeep.tiers")

_META = "kvkeep.json"
_FORMAT = 1
_KIND = "kvkeep fs tier"
_NAMESPACE, _FAN_OUT, _CHUNK = 16, 2, 32  # hexadecimal digits
_OPEN_WAIT = 30.0


def prepare(path: str, capacity: int | None, mount: bool, readonly: bool) -> int:
    """Make `path` a directory of ours, if it is none yet, and return the bound that holds for it, in bytes.

    Raises ConfigError with what to do; what is in a directory that is not ours is not touched.
    """
    try:
        if mount and not _on_a_mount(path):
            raise ConfigError(f"{path} is not on a mounted file system: mount it, or leave out mount=yes")
        if not readonly:
            _create(path, capacity)
        return _capacity(path, capacity)
    except OSError as error:
        raise ConfigError(f"{path}: {remedy(error)}") from error


def _create(path: str, capacity: int | None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    names = [name for name in os.listdir(path) if not name.startswith(f".{_META}") and name != "lost+found"]
    if not names:
        space = os.statvfs(path)
        bound = capacity or space.f_bavail * space.f_frsize // 2
        if capacity is None:
            log.info("%s: no capacity given, so half of what is free: %.1f GiB", path, bound / 2**30)
        meta = {"kind": _KIND, "format": _FORMAT, "capacity_bytes": bound}
        temporary = os.path.join(path, f".{_META}.{uuid.uuid4().hex}")
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(meta, file)
        with contextlib.suppress(FileExistsError):  # another process was quicker: its figures count
            os.link(temporary, os.path.join(path, _META))
        os.unlink(temporary)
    elif _META not in names:
        raise ConfigError(f"{path} is not empty and not a kvkeep directory: give an empty or a new one")


def _capacity(path: str, capacity: int | None) -> int:
    try:
        with open(os.path.join(path, _META), encoding="utf-8") as file:
            meta = json.load(file)
        kind, version, recorded = meta["kind"], meta["format"], int(meta["capacity_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}/{_META} is not one of kvkeep's: give another directory") from error
    if (kind, version) != (_KIND, _FORMAT):
        raise ConfigError(
            f"{path} was written in format {version} of {kind!r}, and this version reads {_FORMAT}: use the "
            "kvkeep that wrote it, give another directory, or delete this one if nobody uses it"
        )
    bound = recorded if capacity is None else capacity
    space = os.statvfs(path)
    total = space.f_blocks * space.f_frsize
    if bound < 1 or (total and bound > total):  # some network file systems do not tell: 0
        raise ConfigError(
            f"a capacity of {bound / 2**30:.1f} GiB, where {path} is on a file system of {total / 2**30:.1f} "
            "GiB: set the option capacity, and leave some of it free"
        )
    return bound


def _on_a_mount(path: str) -> bool:
    """Whether `path`, or what it lies in, is a mount point other than the root's."""
    while (parent := os.path.dirname(path)) != path:
        if os.path.ismount(path):
            return True
        path = parent
    return False


def remedy(error: OSError) -> str:
    """What went wrong when a directory was opened, and what to do about it."""
    known = {
        errno.ENOENT: "it is not there: create the directory, or mount what holds it",
        errno.ENOTDIR: "it, or something above it, is not a directory: give a directory",
        errno.EACCES: "no permission: give this process's user the right to read and write there",
        errno.EROFS: "mounted read-only: mount it writable, or set readonly=yes to read only",
        errno.ENOSPC: "the file system is full: free some space",
        errno.EDQUOT: "the quota is used up: raise it, or free some space",
        errno.ESTALE: "stale file handle: mount it again",
        **dict.fromkeys(
            (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK),
            "the file system refuses hard links or locks: mount it with them, or give one that has them",
        ),
    }
    reason = known.get(error.errno or 0, error.strerror)
    return f"{reason} ({error.filename})" if error.filename else f"{reason}"


def value_path(root: str, key: Key) -> str:
    """Where the value of `key` lies."""
    name = key.hex()
    return f"{root}/{name[:_NAMESPACE]}/{name[_NAMESPACE : _NAMESPACE + _FAN_OUT]}/{name[_NAMESPACE:]}"


def values(root: str, fan_out: int, prune: bool = False) -> Iterator[tuple[os.DirEntry[str], str]]:
    """All values of all namespaces whose chunk keys begin with the byte `fan_out`, as entries with the
    namespace's name; `prune`: remove directories that are empty. Keys are hashes, so this is a uniform
    sample of what the tier holds."""
    for namespace in os.listdir(root):
        if len(namespace) != _NAMESPACE:
            continue
        path, count = f"{root}/{namespace}/{fan_out:02x}", 0
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for count, entry in enumerate(entries, 1):  # noqa: B007
                if len(entry.name) == _CHUNK:
                    yield entry, namespace
        if prune and not count:
            with contextlib.suppress(OSError):  # somebody else did it, or it is the last one's turn to stay
                os.rmdir(path)
            with contextlib.suppress(OSError):
                os.rmdir(f"{root}/{namespace}")


def flock(fd: int, how: int, seconds: float, stop: Callable[[], object] = bool) -> bool:
    """Lock `fd`, polling for at most `seconds` or until `stop()`; whether it is locked now.

    Polled, since a wait in the kernel has no bound: the holder may be stopped, or its host gone.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline or stop():
                return False
            time.sleep(random.uniform(0.0002, 0.001))
        else:
            return True


@contextlib.contextmanager
def locked(path: str, seconds: float) -> Iterator[int]:
    """Hold `path` (created if need be) locked for ourselves; gives its descriptor.

    Raises TierUnavailable where somebody else holds it for longer than `seconds`; OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not flock(fd, fcntl.LOCK_EX, seconds):
            raise TierUnavailable(f"{path} has been locked by another process for {seconds:g} s")
        yield fd
    finally:
        os.close(fd)


class Membership:
    """Our place among those that have the directory open; owns tmp/<uuid>.

    Joining and leaving are serialised by a lock, so that nobody takes a newcomer for dead.
    """

    def __init__(self, root: str, begin: Callable[[int], None]) -> None:
        """Join, and remove what dead members left; `begin` is told of their number before that.
        Raises OSError, TierUnavailable."""
        self._root = root
        self.directory = os.path.join(root, "tmp", uuid.uuid4().hex)
        with locked(os.path.join(root, "members"), _OPEN_WAIT):
            dead, alive = _others(root)
            begin(len(dead))
            self.alone = not alive
            """Whether nobody else had it open when we came."""
            self.swept = sum(_remove(os.path.join(root, "tmp", name)) for name in dead)
            """Temporaries that dead members had left."""
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.join(root, "tmp"), 0o700)
            os.mkdir(self.directory, 0o700)
            lock = os.path.join(self.directory, "lock")
            self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not flock(self._fd, fcntl.LOCK_EX, 1):
                raise TierUnavailable(f"{lock} is locked: does this file system keep locks?")

    def leave(self, clean: bool) -> None:
        """Give up our place; unless `clean`, what stays behind makes the next one count again."""
        with contextlib.suppress(OSError, TierUnavailable):
            if clean:
                with locked(os.path.join(self._root, "members"), _OPEN_WAIT):
                    _remove(self.directory)
        os.close(self._fd)


def leftovers(root: str) -> int:
    """Temporaries of dead members that are there now."""
    dead, _ = _others(root)
    return sum(len(os.listdir(os.path.join(root, "tmp", name))) - 1 for name in dead)


def _others(root: str) -> tuple[list[str], list[str]]:
    """Names of dead and of living members."""
    dead, alive = list[str](), list[str]()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(os.path.join(root, "tmp")):
            (dead if _is_dead(os.path.join(root, "tmp", name, "lock")) else alive).append(name)
    return dead, alive


def _is_dead(lock: str) -> bool:
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return flock(fd, fcntl.LOCK_SH, 0)
    finally:
        os.close(fd)


def _remove(directory: str) -> int:
    """Remove a member's directory, its lock last; how many temporaries it held."""
    count = 0
    for name in os.listdir(directory):
        if name != "lock":
            os.unlink(os.path.join(directory, name))
            count += 1
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, "lock"))
    os.rmdir(directory)
    return count
