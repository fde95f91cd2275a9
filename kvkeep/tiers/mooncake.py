"""Chunks in a Mooncake Store: memory of many hosts, whose books a master keeps.

Its client is native code whose calls take up to a minute to give up and cannot be cancelled, so they
are made on threads that are left behind at our deadline (`calls.py`). What such a call may still write
to must not be the caller's: **a get lands in memory of ours and is copied from there**, and the landing
is not used again before the call is back. A put is sent from the caller's memory where that was
registered (`attach`), else through a landing too; the sealed copy of a put that came back late is
removed, since the caller's memory may have changed under it.

Objects there are immutable: a put of a key that is held leaves the first value, and counts as STORED.
Replacing (`upsert`) writes in place under readers, so it is not used.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Buffer, Capabilities, Got, Key, Put, Tier, key_name
from kvkeep.tiers.calls import Calls
from kvkeep.tiers.landing import Landing, Landings, address_of, groups, offsets
from kvkeep.tiers.url import TierURL

try:
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig
except ModuleNotFoundError:
    raise
except ImportError as error:  # the package is there, a library that it needs is not
    raise ConfigError(f"mooncake: {error}: apt-get install libibverbs1 libnuma1 libcurl4") from error

__all__ = ["MooncakeOptions", "MooncakeTier", "open_mooncake"]

log = logging.getLogger("kvkeep.tiers")

_GROUP = 16 << 20  # bytes that one call moves: enough for full speed, few enough to copy them meanwhile
_LANDINGS = 4  # two gets at once, each copying one group while the next one lands
_MOST_OUT = 16
_SETUP_SECONDS = 30.0  # the client's own tries take up to 90
_UNFINISHED_SECONDS = 55.0  # after 60 the client returns from a transfer that may still be going on
_LEAST_SEGMENT = 16 << 20

# Codes of the store, from its enum ErrorCode.
_ABSENT, _FULL, _EXISTS, _INVALID = -704, -200, -705, -600
_OF_A_KEY = {
    _ABSENT,
    _FULL,
    _EXISTS,
    _INVALID,
    -10,
    -101,
    -703,
    -707,
    -714,
}  # all others are faults of the place


@dataclass(frozen=True)
class MooncakeOptions:
    """How a client of ours takes part."""

    master: str
    """host:port."""
    hostname: str
    """Ours, as the other hosts reach it."""
    metadata: str
    protocol: str
    device: str
    """RDMA devices, separated by commas."""
    segment: int
    """Bytes of this process's memory that the store may use; 0: none."""
    buffer: int
    """Bytes of each landing, and of the longest value."""
    replicas: int
    timeout: float
    """Seconds that one call may take."""


class _Transfer(NamedTuple):
    """A call that uses a landing: the values of `places` in the batch, one behind the other."""

    future: Future[list[int]]
    landing: Landing
    places: range
    begun: float


class MooncakeTier(Tier):
    """One client of the store. Owns it, its threads and its landings."""

    def __init__(self, store: Any, options: MooncakeOptions) -> None:
        self._store, self._options = store, options
        self._calls = Calls("mooncake", _MOST_OUT)
        self._config = ReplicateConfig()
        self._config.replica_num = options.replicas
        self._attached = range(0)
        self._landings = Landings("mooncake", options.buffer, _LANDINGS, self._register)

    @property
    def capabilities(self) -> Capabilities:
        """Not persistent with a segment: what lies there ends with this process."""
        return Capabilities(
            shared=True, persistent=not self._options.segment, max_value_bytes=self._options.buffer
        )

    def attach(self, memory: Buffer) -> None:
        """Register `memory`, so that puts are sent from it; it must stay mapped until `close`."""
        start = address_of(memory)
        code = self._calls.run(lambda: self._store.register_buffer(start, len(memory)), _SETUP_SECONDS)
        if code:
            log.warning("mooncake: the arena cannot be registered (%d): puts are copied", code)
        else:
            self._attached = range(start, start + len(memory))

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        if not keys:
            return []
        codes = self._ask(lambda: self._store.batch_is_exist([key_name(key) for key in keys]))
        _raise_if_failed(codes)
        return [code == 1 for code in codes]

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        """As the interface says; a value whose host is gone is a MISS while others are hit."""
        codes = [_ABSENT] * len(keys)
        under_way: list[_Transfer] = []
        try:
            for places in self._groups(buffers):
                landing = self._landings.take_free() if under_way else None
                if under_way and (landing is None or len(under_way) == 2):
                    self._finish_get(under_way.pop(0), buffers, codes)
                landing = landing or self._landings.take(self._options.timeout)
                under_way.append(self._begin_get(keys, buffers, places, landing))
            while under_way:  # one was copied while the next one landed
                self._finish_get(under_way.pop(0), buffers, codes)
        finally:
            for transfer in under_way:
                self._leave(transfer)
        results = [self._got(*found) for found in zip(keys, buffers, codes, strict=True)]
        if Got.HIT not in results:
            _raise_if_failed(codes)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the interface says, except that a key that is held keeps its value."""
        codes = [_FULL] * len(keys)
        for places in self._groups(buffers):
            codes[places.start : places.stop] = self._put_group(
                [key_name(keys[place]) for place in places], [buffers[place] for place in places]
            )
        if 0 not in codes:
            _raise_if_failed(codes)
        return [Put.STORED if code in (0, _EXISTS) else Put.REFUSED for code in codes]

    def delete(self, keys: Sequence[Key]) -> None:
        """By force: what was just read is leased for seconds, and could not be removed otherwise."""
        if keys:
            _raise_if_failed(self._ask(partial(self._remove, [key_name(key) for key in keys])))

    def close(self) -> None:
        if self._store is None or not self._calls.close(self._options.timeout):
            return  # a thread is inside the client: closing it under that thread would crash
        store, self._store = self._store, None
        store.close()

    def _ask(self, work: Callable[[], list[int]]) -> list[int]:
        return self._calls.run(work, self._options.timeout)

    def _remove(self, names: list[str]) -> list[int]:
        return list(self._store.batch_remove(names, True))

    def _register(self, landing: Landing) -> None:
        size = self._options.buffer
        code = self._calls.run(lambda: self._store.register_buffer(landing.address, size), _SETUP_SECONDS)
        if code:
            raise ConfigError(f"mooncake: buffer of {size} bytes cannot be registered ({code})")

    def _groups(self, buffers: Sequence[Buffer]) -> Iterator[range]:
        """What one call moves; values that are longer than a landing are left out."""
        limit = self._options.buffer
        return (
            places
            for places in groups(buffers, min(_GROUP, limit))
            if len(buffers[places.start]) <= limit  # longer ones are alone
        )

    def _begin_get(
        self, keys: Sequence[Key], buffers: Sequence[Buffer], places: range, landing: Landing
    ) -> _Transfer:
        names, sizes = [key_name(keys[place]) for place in places], [len(buffers[place]) for place in places]
        into = [landing.address + at for at in offsets(sizes)]
        return self._begin(lambda: self._store.batch_get_into(names, into, sizes), landing, places)

    def _finish_get(self, transfer: _Transfer, buffers: Sequence[Buffer], codes: list[int]) -> None:
        try:
            found = self._end(transfer)
            sizes = [len(buffers[place]) for place in transfer.places]
            for place, at, code in zip(transfer.places, offsets(sizes), found, strict=True):
                codes[place] = code
                if code == len(buffers[place]):
                    into = np.frombuffer(buffers[place], np.uint8)
                    into[:] = transfer.landing.array[at : at + code]  # without the GIL
        finally:
            self._leave(transfer)

    def _put_group(self, names: list[str], buffers: Sequence[Buffer]) -> list[int]:
        sizes = [len(buffer) for buffer in buffers]
        starts = [address_of(buffer) for buffer in buffers]
        if all(self._is_attached(start, size) for start, size in zip(starts, sizes, strict=True)):
            return self._put_attached(names, starts, sizes)
        landing = self._landings.take(self._options.timeout)
        places = list(offsets(sizes))
        for at, buffer in zip(places, buffers, strict=True):
            landing.array[at : at + len(buffer)] = np.frombuffer(buffer, np.uint8)
        starts = [landing.address + at for at in places]
        transfer = self._begin(partial(self._put_from, names, starts, sizes), landing, range(0))
        try:
            return self._end(transfer)
        finally:
            self._leave(transfer)

    def _put_attached(self, names: list[str], starts: list[int], sizes: list[int]) -> list[int]:
        future = self._calls.begin(partial(self._put_from, names, starts, sizes))
        try:
            return self._calls.end(future, self._options.timeout)
        except TierUnavailable:
            future.add_done_callback(lambda _: self._remove_late(names))
            raise

    def _put_from(self, names: list[str], starts: list[int], sizes: list[int]) -> list[int]:
        return list(self._store.batch_put_from(names, starts, sizes, self._config))

    def _remove_late(self, names: list[str]) -> None:
        """What was sent from the caller's memory after we had given it back may be garbled. Its seal would
        say so too."""
        with contextlib.suppress(TierUnavailable):
            self._calls.begin(partial(self._remove, names))

    def _is_attached(self, start: int, size: int) -> bool:
        return start in self._attached and start + size - 1 in self._attached

    def _begin(self, work: Callable[[], list[int]], landing: Landing, places: range) -> _Transfer:
        try:
            return _Transfer(self._calls.begin(work), landing, places, time.monotonic())
        except TierUnavailable:
            self._landings.give(landing)
            raise

    def _end(self, transfer: _Transfer) -> list[int]:
        left = transfer.begun + self._options.timeout - time.monotonic()
        return self._calls.end(transfer.future, max(0.0, left))

    def _leave(self, transfer: _Transfer) -> None:
        """Give the landing back once the call is over, which it may be already."""
        transfer.future.add_done_callback(lambda _: self._settle(transfer))

    def _settle(self, transfer: _Transfer) -> None:
        if time.monotonic() - transfer.begun < _UNFINISHED_SECONDS:
            self._landings.give(transfer.landing)
        elif self._landings.lose(transfer.landing):
            with contextlib.suppress(TierUnavailable, ConfigError):
                self._landings.add()

    def _got(self, key: Key, buffer: Buffer, code: int) -> Got:
        if code >= 0:
            return Got.HIT if code == len(buffer) else Got.DAMAGED
        if code == _INVALID:  # longer than the buffer, or anything else that the client takes for wrong
            size = self._calls.run(partial(self._store.get_size, key_name(key)), self._options.timeout)
            return Got.DAMAGED if size >= 0 else Got.MISS
        return Got.MISS


def _raise_if_failed(codes: Sequence[int]) -> None:
    """Raise TierUnavailable if one of these is a fault of the place, not of a key."""
    for code in codes:
        if code < 0 and code not in _OF_A_KEY:
            what = {-800: "a transfer failed", -900: "no master", -901: "the master does not answer"}
            raise TierUnavailable(f"mooncake: {what.get(code, 'error')} ({code})")


def open_mooncake(url: TierURL) -> MooncakeTier:
    """A tier from `mooncake://master:port?…`; see docs/tiers-mooncake.md. Raises ConfigError."""
    port = url.port or 50051
    timeout = url.take_seconds("timeout", 5.0)
    options = MooncakeOptions(
        master=f"{url.host}:{port}",
        hostname=url.take("hostname", str, ""),
        metadata=url.take("metadata", str, "P2PHANDSHAKE"),
        protocol=url.take_choice("protocol", ("tcp", "rdma"), "tcp"),
        device=url.take("device", str, ""),
        segment=url.take_bytes("segment", 0) or 0,
        buffer=url.take_bytes("buffer", 64 << 20) or 0,
        replicas=url.take_count("replicas", 1),
        timeout=timeout,
    )
    if not url.host or url.path not in ("", "/"):
        raise ConfigError(f"{url}: write it as mooncake://master:port")
    if timeout <= 0 or options.buffer < mmap.PAGESIZE:
        raise ConfigError(f"{url}: timeout must be more than 0, and buffer a page or more")
    if 0 < options.segment < _LEAST_SEGMENT:
        raise ConfigError(f"{url}: segment must be 0, or 16 MiB and more")
    hostname = options.hostname or _our_address(url, (url.host, port), timeout)
    return MooncakeTier(_connected(url, options, hostname), options)


def _our_address(url: TierURL, master: tuple[str, int], timeout: float) -> str:
    """The address from which we reach the master; also, whether we do: its client tries for 90 s."""
    try:
        with socket.create_connection(master, timeout) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"{url}: no master answers at {master[0]}:{master[1]} ({error}): start mooncake_master there"
        ) from error


def _connected(url: TierURL, options: MooncakeOptions, hostname: str) -> Any:
    store, calls = MooncakeDistributedStore(), Calls("mooncake", 1)
    setup = calls.begin(
        lambda: store.setup(
            hostname,
            options.metadata,
            options.segment,
            0,  # for calls that we do not use
            options.protocol,
            options.device,
            options.master,
        )
    )
    try:
        code = calls.end(setup, _SETUP_SECONDS)
    except TierUnavailable as error:
        setup.add_done_callback(lambda _: store.close())
        raise ConfigError(f"{url}: Mooncake's client does not get ready: {error}") from error
    finally:
        calls.close(0)
    if code:
        raise ConfigError(
            f"{url}: Mooncake's client does not start ({code}): its log on standard error says why; are "
            "protocol=, device=, metadata= and hostname= right?"
        )
    return store
