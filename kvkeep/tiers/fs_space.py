"""Room in a file-system tier: books that all its processes share, eviction, and counting again.

The file `usage` says how many values and bytes there are or are promised. Whoever writes first adds what
it is going to write, and whoever removes subtracts afterwards, each under the file's lock: so the books
never say less than there is, and a process that is killed leaves them too high by a batch at most.
Removals, and replacements of values, happen under that lock too, so that each value is subtracted exactly
once; new values come in by link(2), which fails where there is one, and need no lock.

Who writes holds `writers` shared; who counts again holds it alone, and writes are refused meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Usage
from kvkeep.tiers.fs_root import flock, locked, values

__all__ = ["Space", "footprint"]

log = logging.getLogger("kvkeep.tiers")

_BLOCK = 4096
_LOCK_WAIT = 10.0
_COUNT_WAIT = 60.0
_SAMPLE, _OLDEST = 256, 8  # of at least so many values, one of so many goes
_REMOVED_AT_ONCE = 16  # under one hold of the lock
_ROUNDS = 8
_MOST_AHEAD = 1 << 30
_CRASHES_TO_COUNT = 16  # though others are at work: until then the books are too high by a batch for each
_UNKNOWN = 2**64 - 1


def footprint(length: int) -> int:
    """What a value of `length` bytes takes of the capacity: whole blocks."""
    return -(-length // _BLOCK) * _BLOCK


@dataclass
class _Books:
    """The content of `usage`."""

    used: int = 0
    values: int = 0
    crashes: int = 0
    """Processes that were killed since the last count; _UNKNOWN: what is said here is not to be relied on."""

    LAYOUT: ClassVar = struct.Struct("<8sQQQ")
    MAGIC: ClassVar = b"kvusage1"

    @classmethod
    def read(cls, fd: int) -> _Books:
        data = os.pread(fd, cls.LAYOUT.size, 0)
        if len(data) != cls.LAYOUT.size or data[:8] != cls.MAGIC:
            return cls(crashes=_UNKNOWN)
        return cls(*cls.LAYOUT.unpack(data)[1:])

    def write(self, fd: int) -> None:
        # One pwrite inside one sector: a kill leaves the old or the new figures.
        os.pwrite(fd, self.LAYOUT.pack(self.MAGIC, self.used, self.values, self.crashes), 0)

    def add(self, nbytes: int, count: int) -> None:
        """Add or subtract; what was put there by hand was never added, so not below 0."""
        self.used, self.values = max(0, self.used + nbytes), max(0, self.values + count)


class _Victim(NamedTuple):
    used_at: int | None
    """In nanoseconds; who was used since is no victim any more. None: whenever that was."""
    size: int
    path: str


class Space:
    """Shared by all verbs of one tier; thread-safe. Raises OSError and TierUnavailable."""

    def __init__(self, root: str, capacity: int) -> None:
        self.capacity = capacity
        self._root = root
        self._usage, self._writers = os.path.join(root, "usage"), os.path.join(root, "writers")
        self._mutex = threading.Lock()  # one thread at a time asks for the file's lock
        self._evicting = threading.Lock()
        self._victims: deque[_Victim] = deque()
        self._fan_out = random.randrange(256)
        self._chores = ThreadPoolExecutor(1, thread_name_prefix="kvkeep-fs-chores")
        self._stop = threading.Event()
        self._last_asked = -_COUNT_WAIT
        self._freeing = False
        self.counting = False
        """Whether a count is due or under way; writes are refused until it is done."""
        self.exact = True
        """Whether the books have got all that this process did."""

    # Opening and closing

    def start(self, crashes: int) -> None:
        """Called while joining: begin the books of a new directory, and note that processes were killed."""
        with self._books() as books:
            if books.crashes != _UNKNOWN:
                books.crashes += crashes
            elif next(self.all(), None) is None:
                books.crashes = 0

    def settle_doubts(self, alone: bool) -> None:
        """Count again in the background where the books need it, and where it disturbs nobody else."""
        with self._books() as books:
            crashes = books.crashes
        if crashes >= _CRASHES_TO_COUNT or (crashes and alone):
            self._ask_for_count()

    def close(self) -> None:
        """End the background work; nobody else may be at work here any more."""
        self._stop.set()
        self._chores.shutdown(wait=True, cancel_futures=True)

    def usage(self) -> Usage:
        """What the books say, without waiting for anybody."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._usage, os.O_RDONLY | os.O_CLOEXEC)
            try:
                books = _Books.read(fd)
            finally:
                os.close(fd)
            if books.crashes != _UNKNOWN:
                return Usage(books.used, self.capacity, None if self.counting else books.values)
        return Usage(None, self.capacity, None)

    # Writing

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold off who wants to count; False: somebody is counting, so nothing may be written."""
        if self.counting:
            yield False
            return
        fd = os.open(self._writers, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield flock(fd, fcntl.LOCK_SH, 0)
        finally:
            os.close(fd)

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Promise room for values of these footprints, evicting what is needed; the places of those that
        may come. Where not all fit, it is the first ones. `settle` must follow."""
        wanted, need = self._fitting(sizes, self.capacity)
        dry = False
        for _ in range(_ROUNDS):
            with self._books() as books:
                if books.crashes == _UNKNOWN:
                    self._ask_for_count()
                    return []
                if books.used + need <= self.capacity:
                    books.add(need, len(wanted))
                    return wanted
                if dry:  # it is said to be full, and there is nothing: were values removed by hand?
                    books.crashes += 1
                    self._ask_for_count()
                    break
            dry = not self.evict(max(0, self.capacity - need - self._ahead(need)))
        with self._books() as books:
            wanted, need = self._fitting(sizes, max(0, self.capacity - books.used))
            books.add(need, len(wanted))
            return wanted

    def settle(self, reserved: int, unused: int, count: int) -> None:
        """Give back what was reserved for `count` values and not used, `unused` of the `reserved` bytes."""
        with self._books() as books:
            books.add(-unused, -count)
            used, limit = books.used, self.capacity - self._ahead(reserved)
        if used > limit:
            self.evict_soon(limit)

    def replace(self, temporary: str, path: str) -> bool:
        """Put `temporary` in the place of the value at `path`; False: there is none any more."""
        with self._books() as books:
            try:
                old = os.stat(path)
            except FileNotFoundError:
                return False
            if not os.path.samestat(old, os.stat(temporary)):  # NFS: our link(2) may be done, its reply lost
                os.rename(temporary, path)
                books.add(-footprint(old.st_size), -1)
        return True

    # Removing

    def remove(self, paths: Sequence[str]) -> None:
        """Remove values, and give back what they took. Absent ones are fine."""
        self._remove([_Victim(None, 0, path) for path in paths])

    def evict(self, limit: int) -> bool:
        """Remove what was not used for long, until no more than `limit` bytes are taken.

        False: there is nothing left to remove.
        """
        with self._evicting:
            used = self.usage().used_bytes or 0  # whoever had the lock may have done it for us
            while used > limit and not self._stop.is_set():
                if not self._victims:
                    self._sample()
                group, due = list[_Victim](), used - limit
                while self._victims and due > 0:
                    group.append(self._victims.popleft())
                    due -= group[-1].size
                if not group:
                    return False
                used = self._remove(group)
        return True

    def give_way(self, nbytes: int) -> None:
        """Evict so much, though the books have room: the medium has none."""
        self.evict(max(0, (self.usage().used_bytes or 0) - nbytes))

    def evict_soon(self, limit: int) -> None:
        """Evict in the background."""
        if not self._freeing:
            self._freeing = True
            self._chore(lambda: self._free(limit))

    def _free(self, limit: int) -> None:
        try:
            self.evict(limit)
        except (OSError, TierUnavailable) as error:
            log.warning("%s: eviction failed: %s", self._root, error)
        finally:
            self._freeing = False

    def _sample(self) -> None:
        """Choose the oldest of the next values around the circle as victims; none where there are none.

        Each step takes one fan-out directory of every namespace. So what it costs to find a victim does
        not depend on how many values there are: it is a few looks for each that goes.
        """
        found = list[_Victim]()
        for _ in range(256):
            for entry, _namespace in values(self._root, self._fan_out, prune=True):
                with contextlib.suppress(FileNotFoundError):
                    seen = entry.stat(follow_symlinks=False)
                    found.append(_Victim(seen.st_mtime_ns, footprint(seen.st_size), entry.path))
            self._fan_out = (self._fan_out + 1) % 256
            if len(found) >= _SAMPLE:
                break
        found.sort()
        self._victims.extend(found[: -(-len(found) // _OLDEST)])

    def _remove(self, victims: Sequence[_Victim]) -> int:
        """Remove those that are still as they were seen; how many bytes are taken after that."""
        used = 0
        for start in range(0, len(victims), _REMOVED_AT_ONCE):
            with self._books() as books:
                for victim in victims[start : start + _REMOVED_AT_ONCE]:
                    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                        seen = os.stat(victim.path)
                        if victim.used_at in (None, seen.st_mtime_ns):
                            os.unlink(victim.path)
                            books.add(-footprint(seen.st_size), -1)
                used = books.used
        return used

    # Counting again

    def scan(self) -> Usage:
        """What all values take, looked at one by one. Raises TierUnavailable if it is closed meanwhile."""
        nbytes = count = 0
        for entry, _namespace in self.all():
            if self._stop.is_set():
                raise TierUnavailable(f"{self._root} was closed")
            with contextlib.suppress(FileNotFoundError):
                nbytes += footprint(entry.stat(follow_symlinks=False).st_size)
                count += 1
        return Usage(nbytes, self.capacity, count)

    def recount(self, in_doubt: bool = False) -> Usage:
        """Hold off all writers, count, and put it into the books; `in_doubt`: unless somebody else has done
        so meanwhile. Raises TierUnavailable where they cannot be held off."""
        began = time.monotonic()
        fd = os.open(self._writers, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not flock(fd, fcntl.LOCK_EX, _COUNT_WAIT, self._stop.is_set):
                raise TierUnavailable(f"others write to {self._root} without a pause: not counted again")
            with self._books() as books:
                before = books.used, books.values
            if in_doubt and not books.crashes:
                return self.usage()
            found = self.scan()
            with self._books() as books:
                # Removals go on meanwhile: what was seen and is gone now is still in the sum, so that it is
                # high, never low; the next one to open the tier counts again.
                books.crashes = int((books.used, books.values) != before)
                books.used, books.values = found.used_bytes or 0, found.values or 0
        finally:
            os.close(fd)
        took = time.monotonic() - began
        log.info("%s: counted %d values in %.1f s; the books said %s", self._root, found.values, took, before)
        return found

    def _ask_for_count(self) -> None:
        if self.counting or time.monotonic() < self._last_asked + _COUNT_WAIT:
            return
        self.counting, self._last_asked = True, time.monotonic()
        self._chore(self._count)

    def _count(self) -> None:
        try:
            self.recount(in_doubt=True)
        except (OSError, TierUnavailable) as error:
            log.warning("%s: the count was given up: %s", self._root, error)
        finally:
            self.counting = False

    def all(self) -> Iterator[tuple[os.DirEntry[str], str]]:
        """All values, as entries with their namespace's name."""
        for fan_out in range(256):
            yield from values(self._root, fan_out)

    # Below

    def _ahead(self, need: int) -> int:
        """How much to free beyond what is needed now, so that the next batch need not wait for it."""
        return min(self.capacity // 8, max(need, min(self.capacity // 64, _MOST_AHEAD)))

    @staticmethod
    def _fitting(sizes: Sequence[int], room: int) -> tuple[list[int], int]:
        """The places of those that go into `room`, the first ones first, and the sum of their sizes."""
        places, need = list[int](), 0
        for place, size in enumerate(sizes):
            if need + size <= room:
                places.append(place)
                need += size
        return places, need

    def _chore(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._chores.submit(work)

    @contextlib.contextmanager
    def _books(self) -> Iterator[_Books]:
        """The books, for us alone; written back with what was changed, also where the work then failed."""
        if not self._mutex.acquire(timeout=_LOCK_WAIT):
            raise TierUnavailable(f"{self._usage} has been locked by this process for {_LOCK_WAIT:g} s")
        try:
            with locked(self._usage, _LOCK_WAIT) as fd:
                books = _Books.read(fd)
                before = replace(books)
                try:
                    yield books
                finally:
                    if books != before:
                        books.write(fd)
        except (OSError, TierUnavailable):
            self.exact = False
            raise
        finally:
            self._mutex.release()
