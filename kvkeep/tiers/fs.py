"""Values as files: local disks and distributed file systems (NFS, Lustre, CephFS, 3FS) by their mounts.

    fs:///data/kv?capacity=500GiB&fsync=no&direct=auto&depth=8&mount=no&readonly=no

A value is written to a temporary and moved into its place, so there is no time at which a part of it
can be read. Nothing is remembered between verbs: the directory is the index, the files' mtime says when
they were used last, `usage` how much there is (fs_space.py), the locks who is at work (fs_root.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Buffer, Capabilities, Got, Key, Listing, Put, Tier, Usage, unchecked
from kvkeep.tiers.fs_io import (
    in_turn,
    is_aligned,
    opened,
    rename_new,
    sync_directory,
    takes_direct,
    transfer,
    write_file,
)
from kvkeep.tiers.fs_root import Membership, leftovers, prepare, remedy, value_path
from kvkeep.tiers.fs_space import Space, footprint
from kvkeep.tiers.threads import Threads
from kvkeep.tiers.url import TierURL

__all__ = ["FsTier", "open_fs"]

log = logging.getLogger("kvkeep.tiers")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PUBLISH_TRIES = 100
_CLOSE_WAIT = 30.0
_TELL_EVERY = 60.0
_LOOKS_ALONE = 16  # so many looks of `contains` are timed before threads are asked to help
_SLOW_LOOK = 50e-6
_AHEAD = 2  # threads that open and close files while the others read or write theirs


def open_fs(url: TierURL) -> Tier:
    """The tier of fs:///directory. Raises ConfigError with what to do where it cannot be used."""
    if url.netloc or not url.path.strip("/"):
        raise ConfigError(f"{url}: write the directory with three slashes: fs:///data/kv")
    root = os.path.normpath("/" + url.path.strip("/"))
    direct = url.take_choice("direct", ("auto", "yes", "no"), "auto")
    depth, fsync = url.take_count("depth", 8), url.take_flag("fsync", False)
    mount, readonly = url.take_flag("mount", False), url.take_flag("readonly", False)
    space = Space(root, prepare(root, url.take_bytes("capacity", None), mount, readonly))
    try:
        members, direct_works = (None, True) if readonly else _join(root, space)
    except (OSError, TierUnavailable) as error:
        space.close()
        raise ConfigError(f"{root}: {remedy(error) if isinstance(error, OSError) else error}") from error
    tier = FsTier(root, space, members, direct != "no" and direct_works, fsync, depth)
    if direct == "yes" and not direct_works:
        tier.close()
        raise ConfigError(f"{root} is on a file system without O_DIRECT: leave out direct=yes")
    return tier


def _join(root: str, space: Space) -> tuple[Membership, bool]:
    members = Membership(root, space.start)
    try:
        space.settle_doubts(members.alone)
        return members, takes_direct(members.directory)
    except BaseException:
        members.leave(clean=True)
        raise


class FsTier(Tier, Listing):
    """A directory of values. Owns its threads, and a place among the directory's members."""

    overlaps = True

    def __init__(
        self, root: str, space: Space, members: Membership | None, direct: bool, fsync: bool, depth: int
    ) -> None:
        self.direct = direct
        """Whether aligned buffers bypass the page cache."""
        self._root, self._space, self._members, self._fsync = root, space, members, fsync
        self._depth = depth
        self._preadv = in_turn("preadv", depth)
        self._pwritev = in_turn("pwritev", depth)
        self._threads = Threads(depth + _AHEAD, "kvkeep-fs")
        self._state = threading.Condition()
        self._closed, self._under_way = False, 0
        self._tell_full_at = 0.0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(shared=True, persistent=True, max_value_bytes=self._space.capacity)

    @property
    def counting(self) -> bool:
        """Whether the books are being made again; writes are put off until that is done."""
        return self._space.counting

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        if not keys:
            return []
        found = [False] * len(keys)

        def look(place: int) -> None:
            found[place] = os.access(value_path(self._root, keys[place]), os.F_OK)

        with self._verb():
            os.stat(self._root + "/kvkeep.json")  # access() takes a mount that is gone for a miss
            began, alone = time.perf_counter(), min(len(keys), _LOOKS_ALONE)
            for place in range(alone):
                look(place)
            if time.perf_counter() - began > alone * _SLOW_LOOK:  # a network: round trips overlap
                self._threads.each(range(alone, len(keys)), look)
            else:
                for place in range(alone, len(keys)):
                    look(place)
        return found

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self._get(keys, buffers, used=self._members is not None)

    def peek(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self._get(keys, buffers, used=False)

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        results = [Put.REFUSED] * len(keys)
        if not keys or self._members is None:
            return results
        now, members = time.time_ns(), self._members
        with self._verb(), self._space.writing() as may_write:
            if not may_write:
                return [Put.LATER] * len(keys)
            promised, spares = list[int](), dict[int, str]()

            def promise() -> Iterator[int]:  # makes room for a few, while the threads write others
                for some in self._space.reserve([len(buffer) for buffer in buffers], members.new_name):
                    promised.extend(some.places)
                    spares.update(some.spares)
                    yield from some.places

            def store(place: int) -> None:
                spare = spares.pop(place, None)
                if self._store(keys[place], buffers[place], now - 1000 * place, spare):
                    results[place] = Put.STORED

            try:
                self._threads.each(promise(), store)
                left = [place for place in promised if results[place] is Put.REFUSED]
                if left:  # the file system is full of something else: live in the room that it leaves us
                    self._space.give_way(sum(footprint(len(buffers[place])) for place in left))
                    self._threads.each(left, store)
            finally:
                self._space.drop(spares.values())
                unused = [len(buffers[place]) for place in promised if results[place] is Put.REFUSED]
                self._space.settle(sum(map(footprint, unused)), len(unused))
            if self._fsync:
                self._sync_names([keys[place] for place in promised if results[place] is Put.STORED])
            if self._space.counting:  # the books have turned out wrong, and with them the want of room
                results = [Put.LATER if result is Put.REFUSED else result for result in results]
        return results

    def delete(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        with self._verb():
            if self._members is None:
                raise TierUnavailable(f"{self._root} was opened with readonly=yes")
            self._space.remove([value_path(self._root, key) for key in keys])

    def gone(self) -> list[Key]:
        keys = list[Key]()
        for _ in range(len(self._space.gone)):
            space, _fan_out, name = self._space.gone.popleft().split("/")[-3:]
            with contextlib.suppress(ValueError):
                keys.append(bytes.fromhex(space + name))
        return [key for key in keys if len(key) == 24]  # else not a name of ours

    def usage(self) -> Usage:
        with self._verb():
            return self._space.usage()

    def close(self) -> None:
        with self._state:
            closed, self._closed = self._closed, True
            drained = self._state.wait_for(lambda: not self._under_way, _CLOSE_WAIT)
        if closed:
            return
        self._threads.close(wait_for_it=drained)
        self._space.close()
        if self._members is not None:
            self._members.leave(clean=drained and self._space.exact)

    # For fsck

    def keys(self) -> Iterator[tuple[Key, int]]:
        with self._verb():
            for entry, namespace in self._space.all():
                with contextlib.suppress(FileNotFoundError, ValueError):
                    yield bytes.fromhex(namespace + entry.name), entry.stat(follow_symlinks=False).st_size

    def recount(self, correct: bool) -> Usage:
        with self._verb():
            return self._space.recount() if correct else self._space.scan()

    def leftovers(self) -> int:
        with self._verb():
            return leftovers(self._root) if self._members is None else self._members.swept

    # Reading

    def _get(self, keys: Sequence[Key], buffers: Sequence[Buffer], used: bool) -> list[Got]:
        results = [Got.MISS] * len(keys)
        if not keys:
            return results
        now, errors = time.time_ns(), list[OSError]()

        def read(place: int) -> None:
            try:
                results[place] = self._read(keys[place], buffers[place], now - 1000 * place if used else None)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ESTALE):
                    raise
                # One file that cannot be read is damaged, or was removed by another host under our
                # hands. Where nothing can be read it is more than that.
                results[place] = Got.DAMAGED if error.errno == errno.EIO else Got.MISS
                errors.append(error)
                if len(errors) >= self._depth and Got.HIT not in results:
                    raise

        with self._verb():
            self._threads.each(range(len(keys)), read)
            if errors and Got.HIT not in results:
                raise errors[0]
        return results

    def _read(self, key: Key, into: Buffer, used_at: int | None) -> Got:
        path = value_path(self._root, key)
        try:
            with opened(path, os.O_RDONLY, self.direct and is_aligned(into)) as (fd, direct):
                seen = os.fstat(fd)
                if seen.st_size != len(into):
                    return Got.DAMAGED
                if used_at is not None:  # before it is read: so it is no victim while we read it
                    with contextlib.suppress(OSError):
                        os.utime(fd, ns=(used_at, used_at))
                whole = transfer(self._preadv, fd, into, direct) == len(into)
        except FileNotFoundError:
            return Got.MISS
        whole = whole and self.check_value(key, into)
        # Evicted and overwritten while we read it: not there any more, rather than damaged.
        if (not whole or self.check_value is unchecked) and not _is_there(path, seen):
            return Got.MISS
        return Got.HIT if whole else Got.DAMAGED

    # Writing

    def _store(self, key: Key, value: Buffer, used_at: int, spare: str | None) -> bool:
        """Store one value for which there is room in the books; False: the medium has none."""
        assert self._members is not None
        self.seal_value(key, value)
        temporary, stored = spare or self._members.new_name(), False
        try:
            write_file(temporary, value, self._pwritev, self.direct, used_at, self._fsync, new=spare is None)
            self._publish(temporary, value_path(self._root, key))
            stored = True
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if time.monotonic() > self._tell_full_at:
                self._tell_full_at = time.monotonic() + _TELL_EVERY
                log.warning("%s: %s: the tier gives way, and refuses values", self._root, error.strerror)
        finally:
            if not stored:
                self._space.drop([temporary])
        return stored

    def _publish(self, temporary: str, path: str) -> None:
        """Move a temporary to its place; a value that is there goes, with what it took."""
        for _ in range(_PUBLISH_TRIES):
            try:
                if not rename_new(temporary, path):
                    os.link(temporary, path)
                    self._space.drop([temporary])
            except FileExistsError:
                if not self._space.replace(temporary, path):
                    continue
                self._space.drop([temporary])  # NFS: the link was there already
            except FileNotFoundError:  # the first one there, or an evictor has just removed what was empty
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                continue
            return
        raise OSError(errno.EBUSY, f"{path} comes and goes")

    def _sync_names(self, keys: Sequence[Key]) -> None:
        """Make the names of values durable, and those of the directories that they lie in."""
        folders = {os.path.dirname(value_path(self._root, key)) for key in keys}
        every = [*folders, *{os.path.dirname(folder) for folder in folders}, self._root]

        def sync(number: int) -> None:
            with contextlib.suppress(FileNotFoundError):  # evicted, with what it lay in
                sync_directory(every[number])

        self._threads.each(range(len(every) if keys else 0), sync)

    @contextlib.contextmanager
    def _verb(self) -> Iterator[None]:
        """What all verbs have in common: they end before `close` does, and fail as tiers fail."""
        with self._state:
            if self._closed:
                raise TierUnavailable(f"{self._root} is closed")
            self._under_way += 1
        try:
            yield
        except OSError as error:
            raise TierUnavailable(f"{self._root}: {error.strerror}") from error
        finally:
            with self._state:
                self._under_way -= 1
                self._state.notify_all()


def _is_there(path: str, seen: os.stat_result) -> bool:
    """Whether the file that was opened as `path` still has that name."""
    try:
        return os.path.samestat(os.stat(path), seen)
    except FileNotFoundError:
        return False
