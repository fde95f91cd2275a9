"""Chunks in an InfiniStore server, over TCP.

Its server shows a value from the moment that a put begins, and dies of a read or delete of one that is
not whole. So a value has a name of its own at each put, and another small one, written in one segment
when the value is whole, says which: readers go by that, and see whole values only.

- `namespace/chunk`: `kvkeep`, 0, 1; the 8 bytes that end the value's name; its length, little-endian
- `namespace/chunk.<suffix in hexadecimal>`: the value
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import KEY_BYTES, Buffer, Capabilities, Check, Got, Key, Put, Seal, Tier, key_name
from kvkeep.tiers.infinistore_wire import FULL, LONGEST, Link
from kvkeep.tiers.threads import Threads
from kvkeep.tiers.url import TierURL

__all__ = ["InfiniStoreTier", "Marker", "open_infinistore"]

_MARKER = struct.Struct("<8s8sQ")
_MAGIC = b"kvkeep\x00\x01"
_PORT = 22345


class Marker(NamedTuple):
    """Which value is a key's."""

    suffix: bytes
    length: int

    def packed(self) -> bytes:
        return _MARKER.pack(_MAGIC, self.suffix, self.length)

    def value_name(self, key: Key) -> bytes:
        return _name(key) + b"." + self.suffix.hex().encode()


class InfiniStoreTier(Tier):
    """One server. Owns its connections and threads."""

    def __init__(self, host: str, port: int, timeout: float, concurrency: int) -> None:
        """Raises OSError where nobody listens."""
        self._address, self._timeout = (host, port), timeout
        self._threads = Threads(concurrency, "kvkeep-infinistore")
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._busy: set[Link] = set()
        self._closed = False
        self._seal: Seal | None = None
        self._check: Check | None = None
        self._idle.append(Link(host, port, timeout))

    capabilities = Capabilities(shared=True, persistent=True, max_value_bytes=LONGEST)

    def overlap(self, seal: Seal, check: Check) -> bool:
        """Each value is sealed and checked on the thread that moves it."""
        self._seal, self._check = seal, check
        return True

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        with self._link() as link:
            return link.exist([_name(key) for key in keys])

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        results = [Got.MISS] * len(keys)

        def work(place: int) -> None:
            with self._link() as link:
                results[place] = self._get(link, keys[place], buffers[place])

        self._each(len(keys), work)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the interface says; a value that replaces another one is a miss for a moment."""
        results = [Put.REFUSED] * len(keys)
        held = self.contains(keys)

        def work(place: int) -> None:
            if len(buffers[place]) <= LONGEST:
                results[place] = self._put(keys[place], buffers[place], held[place])

        self._each(len(keys), work)
        return results

    def delete(self, keys: Sequence[Key]) -> None:
        with self._link() as link:
            held = link.exist([_name(key) for key in keys])
            for key, there in zip(keys, held, strict=True):
                if there:
                    _forget(link, key)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for link in busy:
            link.shut()
        for link in idle:
            link.drop()
        self._threads.close(wait_for_it=False)

    def _get(self, link: Link, key: Key, buffer: Buffer) -> Got:
        marker = _marker(link, key)
        if marker is None or isinstance(marker, Got):
            return marker or Got.MISS
        if marker.length != len(buffer):
            return Got.DAMAGED
        length = link.get(marker.value_name(key), buffer)
        if length < 0:
            return Got.MISS  # evicted before what points to it
        if length != len(buffer) or (self._check is not None and not self._check(key, buffer)):
            return Got.DAMAGED
        return Got.HIT

    def _put(self, key: Key, buffer: Buffer, held: bool) -> Put:
        if self._seal is not None:
            self._seal(key, buffer)
        marker = Marker(random.randbytes(8), len(buffer))
        with self._link() as link:
            if held:
                _forget(link, key)
            if link.put(marker.value_name(key), buffer) == FULL:
                return self._refused(link)
            if link.put_small(_name(key), marker.packed()) == FULL:
                return self._refused(link)
        return Put.STORED

    def _refused(self, link: Link) -> Put:
        """The server takes a value that it had no room for to be requests, and hangs up."""
        link.shut()
        return Put.REFUSED

    def _each(self, count: int, work: Callable[[int], None]) -> None:
        self._threads.each(range(count), work)

    @contextmanager
    def _link(self) -> Iterator[Link]:
        """A connection for one exchange; kept if that goes well. Raises TierUnavailable."""
        link = self._take()
        try:
            yield link
        except OSError as error:
            link.drop()
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            raise TierUnavailable(f"infinistore: {why}") from error
        except TierUnavailable:
            link.drop()
            raise
        else:
            self._give(link)
        finally:
            with self._lock:
                self._busy.discard(link)

    def _take(self) -> Link:
        while (link := self._take_idle()) is not None:
            if not link.stale:
                return link
            link.drop()
            with self._lock:
                self._busy.discard(link)
        try:
            link = Link(*self._address, self._timeout)
        except OSError as error:
            raise TierUnavailable(f"infinistore: {error}") from error
        with self._lock:
            self._busy.add(link)
            if self._closed:
                link.shut()  # who uses it finds out
        return link

    def _take_idle(self) -> Link | None:
        with self._lock:
            if self._closed:
                raise TierUnavailable("infinistore: the tier is closed")
            if not self._idle:
                return None
            link = self._idle.pop()
            self._busy.add(link)
            return link

    def _give(self, link: Link) -> None:
        with self._lock:
            if not self._closed and link.usable:
                self._idle.append(link)
                return
        link.drop()


def _name(key: Key) -> bytes:
    return key_name(key).encode()


def _marker(link: Link, key: Key) -> Marker | Got | None:
    """What the key points to; None: nothing, DAMAGED: something that is not ours."""
    data = memoryview(bytearray(_MARKER.size))
    length = link.get(_name(key), data)
    if length < 0:
        return None
    magic, suffix, size = _MARKER.unpack(data)
    if length != _MARKER.size or magic != _MAGIC:
        return Got.DAMAGED
    return Marker(suffix, size)


def _forget(link: Link, key: Key) -> None:
    marker = _marker(link, key)
    if marker is not None:
        value = [marker.value_name(key)] if isinstance(marker, Marker) else []
        link.delete([_name(key), *value])


def open_infinistore(url: TierURL) -> InfiniStoreTier:
    """A tier from `infinistore://host:port?…`; see docs/tiers-infinistore.md. Raises ConfigError."""
    timeout = url.take_seconds("timeout", 10.0)
    concurrency = url.take_count("concurrency", 4)
    if not url.host or url.path not in ("", "/") or url.user is not None:
        raise ConfigError(f"{url}: write it as infinistore://host:port; it has no users")
    if timeout <= 0:
        raise ConfigError(f"{url}: timeout must be more than 0")
    address = (url.host, url.port or _PORT)
    try:
        tier = InfiniStoreTier(*address, timeout, concurrency)
    except OSError as error:
        raise ConfigError(
            f"{url}: nobody answers at {address[0]}:{address[1]} ({error}): start InfiniStore's server there"
        ) from error
    try:
        tier.contains([random.randbytes(KEY_BYTES)])
    except TierUnavailable as error:
        tier.close()
        raise ConfigError(f"{url}: what answers there is not InfiniStore, or not well: {error}") from error
    return tier
