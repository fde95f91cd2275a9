"""Room in a file-system tier: books that all its processes share, eviction, and counting again.

The file `usage` says how many values and bytes there are or are promised. Whoever writes first adds what
it is going to write, and whoever removes subtracts afterwards, each under the file's lock: so the books
never say less than there is, and a process that is killed leaves them too high by a batch at most.
Removals, and replacements of values, happen under that lock too, so that each value is subtracted exactly
once; new values come in by a rename that fails where there is one, and need no lock.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
_AT_ONCE = 16  # values that are removed under one hold of the lock, or for which room is made
_CRASHES_TO_COUNT = 16  # though others are at work: until then the books are too high by a batch for each
_UNKNOWN = 2**64 - 1
_Keep = Callable[[str, int], bool]


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
    length: int
    path: str


@dataclass
class Promise:
    """Room for a few values of a batch; it is in the books already."""

    places: list[int]
    """Their places in the batch."""
    spares: dict[int, str] = field(default_factory=dict)
    """Evicted values as long as theirs, under names that are ours: to overwrite one in place takes less than
    half the time of removing it and writing a new file. Whoever takes one out of here owns it."""


def _fitting(costs: Mapping[int, int], room: int) -> list[int]:
    """The places of those that go into `room`, the first ones first."""
    places = list[int]()
    for place, cost in costs.items():
        if cost <= room:
            places.append(place)
            room -= cost
    return places


class Space:
    """Shared by all verbs of one tier; thread-safe. Raises OSError and TierUnavailable."""

    def __init__(self, root: str, capacity: int) -> None:
        self.capacity, self._root = capacity, root
        self._usage, self._writers = os.path.join(root, "usage"), os.path.join(root, "writers")
        self._mutex = threading.Lock()  # one thread at a time asks for the file's lock
        self._evicting = threading.Lock()
        self._victims, self._fan_out = deque[_Victim](), random.randrange(256)
        self._chores = ThreadPoolExecutor(1, thread_name_prefix="kvkeep-fs-chores")
        self.gone: deque[str] = deque(maxlen=1 << 16)  # paths of values that this process has removed
        self._stop = threading.Event()
        self._last_asked = -_COUNT_WAIT
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

    def reserve(self, lengths: Sequence[int], new_name: Callable[[], str]) -> Iterator[Promise]:
        """Promise room for values of these lengths, a few at a time, evicting what is needed; where not all
        fit, for the first ones. What is evicted and as long as one is kept for it, under a `new_name`.
        `settle` must follow."""
        places = _fitting(dict(enumerate(map(footprint, lengths))), self.capacity)
        for at in range(0, len(places), _AT_ONCE):
            some = {place: lengths[place] for place in places[at : at + _AT_ONCE]}
            promise = self._promise(some, new_name)
            yield promise
            if len(promise.places) < len(some):
                return

    def _promise(self, lengths: dict[int, int], new_name: Callable[[], str]) -> Promise:
        promise = Promise(list(lengths))

        def keep(path: str, length: int) -> bool:
            same = (place for place, one in lengths.items() if one == length and place not in promise.spares)
            if (place := next(same, None)) is not None:
                os.rename(path, name := new_name())
                promise.spares[place] = name
            return place is not None

        try:
            self._fill(promise, {place: footprint(length) for place, length in lengths.items()}, keep)
        except (OSError, TierUnavailable):
            self.exact = self.exact and not promise.spares  # whose room stays in the books
            self.drop(promise.spares.values())
            raise
        return promise

    def _fill(self, promise: Promise, costs: dict[int, int], keep: _Keep) -> None:
        deadline, found = time.monotonic() + _LOCK_WAIT, True
        while True:
            costs |= dict.fromkeys(promise.spares, 0)  # those bring their room with them
            with self._books() as books:
                if books.crashes == _UNKNOWN:
                    self._ask_for_count()
                    promise.places = []
                    return
                missing = books.used + sum(costs.values()) - self.capacity
                if missing > 0 and not found:  # said to be full, and nothing there: removed by hand?
                    books.crashes += 1
                    self._ask_for_count()
                if missing <= 0 or not found or time.monotonic() > deadline:
                    promise.places = _fitting(costs, max(0, self.capacity - books.used))
                    books.add(sum(costs[place] for place in promise.places), len(promise.places))
                    return
            found = self._evict(missing, keep) is not None

    def settle(self, unused: int, count: int) -> None:
        """Give back what was promised to `count` values that were not stored, `unused` bytes together."""
        if count:
            with self._books() as books:
                books.add(-unused, -count)

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

    def drop(self, temporaries: Iterable[str]) -> None:
        """Remove what has these names of our own, if anything has."""
        for path in temporaries:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError:
                self.exact = False  # whoever opens the directory next removes it, and counts

    def remove(self, paths: Sequence[str]) -> None:
        """Remove values, and give back what they took. Absent ones are fine."""
        self._remove([_Victim(None, 0, path) for path in paths])

    def give_way(self, nbytes: int) -> None:
        """Evict so much, though the books have room: the medium has none."""
        deadline = time.monotonic() + _LOCK_WAIT
        while nbytes > 0 and time.monotonic() < deadline and (freed := self._evict(nbytes)) is not None:
            nbytes -= freed

    def _evict(self, nbytes: int, keep: _Keep | None = None) -> int | None:
        """Evict so much, or some of it; how many bytes that gave back, None where there is no value."""
        victims = self._choose(nbytes)
        freed, gone = self._remove(victims, keep)
        if victims and not gone:  # used since, all of them: who is the oldest now goes, in use or not
            victims = [victim._replace(used_at=None) for victim in self._choose(nbytes, anew=True)]
            freed, _ = self._remove(victims, keep)
        return freed if victims else None

    def _choose(self, nbytes: int, anew: bool = False) -> list[_Victim]:
        """Victims of so many bytes, or some of them; none where there is no value at all."""
        chosen = list[_Victim]()
        with self._evicting:
            if anew or not self._victims:
                self._victims.clear()
                self._sample()
            while self._victims and nbytes > 0:
                chosen.append(self._victims.popleft())
                nbytes -= footprint(chosen[-1].length)
        return chosen

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
                    found.append(_Victim(seen.st_mtime_ns, seen.st_size, entry.path))
            self._fan_out = (self._fan_out + 1) % 256
            if len(found) >= _SAMPLE:
                break
        found.sort()
        self._victims.extend(found[: -(-len(found) // _OLDEST)])

    def _remove(self, victims: Sequence[_Victim], keep: _Keep | None = None) -> tuple[int, int]:
        """Remove those that are still as they were seen; how many bytes that gave back, and how many went.

        What `keep` takes away, by path and length, stays in the books: it is its room from now on.
        """
        freed = gone = 0
        for start in range(0, len(victims), _AT_ONCE):
            with self._books() as books:
                for victim in victims[start : start + _AT_ONCE]:
                    with contextlib.suppress(FileNotFoundError):
                        seen = os.stat(victim.path)
                        if victim.used_at not in (None, seen.st_mtime_ns):
                            continue
                        size = 0
                        if keep is None or not keep(victim.path, seen.st_size):
                            os.unlink(victim.path)
                            size = footprint(seen.st_size)
                        books.add(-size, -1)
                        self.gone.append(victim.path)
                        freed, gone = freed + size, gone + 1
        return freed, gone

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
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._chores.submit(self._count)

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

    @contextlib.contextmanager
    def _books(self) -> Iterator[_Books]:
        """The books, for us alone; written back with what was changed, also where the work then failed."""
        if not self._mutex.acquire(timeout=_LOCK_WAIT):
            self.exact = False
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
