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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import KEY_BYTES, Buffer, Capabilities, Got, Key, Put, Tier, key_name
from kvkeep.tiers.infinistore_wire import FULL, LONGEST, Link
from kvkeep.tiers.pool import Pool
from kvkeep.tiers.threads import BATCHES, Threads
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

    overlaps = True

    def __init__(self, host: str, port: int, timeout: float, concurrency: int) -> None:
        """Raises OSError where nobody listens."""
        self._address = (host, port)
        self._threads = Threads(concurrency, "kvkeep-infinistore")
        self._pool: Pool[tuple[str, int], Link] = Pool(
            lambda address: Link(*address, timeout), keep=BATCHES * concurrency
        )
        with self._pool.link(self._address):
            pass  # it can be reached

    capabilities = Capabilities(shared=True, persistent=True, max_value_bytes=LONGEST)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        with self._link() as link:
            return link.exist([_name(key) for key in keys])

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        results = [Got.MISS] * len(keys)

        def work(place: int) -> None:
            with self._link() as link:
                results[place] = self._get(link, keys[place], buffers[place])

        self._threads.each(range(len(keys)), work)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the interface says; a value that replaces another one is a miss for a moment."""
        results = [Put.REFUSED] * len(keys)
        held = self.contains(keys)

        def work(place: int) -> None:
            if len(buffers[place]) <= LONGEST:
                results[place] = self._put(keys[place], buffers[place], held[place])

        self._threads.each(range(len(keys)), work)
        return results

    def delete(self, keys: Sequence[Key]) -> None:
        with self._link() as link:
            held = link.exist([_name(key) for key in keys])
            for key, there in zip(keys, held, strict=True):
                if there:
                    _forget(link, key)

    def close(self) -> None:
        self._pool.close()
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
        if length != len(buffer) or not self.check_value(key, buffer):
            return Got.DAMAGED
        return Got.HIT

    def _put(self, key: Key, buffer: Buffer, held: bool) -> Put:
        self.seal_value(key, buffer)
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

    @contextmanager
    def _link(self) -> Iterator[Link]:
        """A connection for one exchange. Raises TierUnavailable."""
        try:
            with self._pool.link(self._address) as link:
                yield link
        except OSError as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            raise TierUnavailable(f"infinistore: {why}") from error


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
    timeout = url.take_timeout(10.0)
    concurrency = url.take_count("concurrency", 4)
    if not url.host or url.path not in ("", "/") or url.user is not None:
        raise ConfigError(f"{url}: write it as infinistore://host:port; it has no users")
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
