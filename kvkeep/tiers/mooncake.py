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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Buffer, Capabilities, Got, Key, Put, Tier, key_name
from kvkeep.tiers.calls import Calls
from kvkeep.tiers.landing import Landing, Landings, address_of, groups, offsets
from kvkeep.tiers.mooncake_client import (
    SETUP_SECONDS,
    MooncakeOptions,
    ReplicateConfig,
    connect,
    mooncake_options,
)
from kvkeep.tiers.url import TierURL

__all__ = ["MooncakeOptions", "MooncakeTier", "open_mooncake"]

log = logging.getLogger("kvkeep.tiers")

_GROUP = 32 << 20  # bytes that one call moves: half of them are slower, all of a batch not faster
_LANDINGS = 4  # two gets at once, each copying one group while the next one lands
_MOST_OUT = 16
_UNFINISHED_SECONDS = 55.0  # after 60 the client returns from a transfer that may still be going on
_CLOSE_SECONDS = 2.0

# Codes of the store, from its enum ErrorCode.
_ABSENT, _FULL, _EXISTS, _INVALID = -704, -200, -705, -600
_DAMAGED = 0  # ours: no value is as short
_OF_A_KEY = {_ABSENT, _FULL, _EXISTS, _INVALID, -10, -101, -703, -707, -714}  # others: of the place


class _Transfer(NamedTuple):
    """A call under way that moves the values of `places` in the batch."""

    future: Future[list[int]]
    places: range
    names: list[str]
    landing: Landing | None
    """Where they lie one behind the other; None: in the caller's memory."""
    begun: float


class MooncakeTier(Tier):
    """One client of the store. Owns it, its threads and its landings."""

    overlaps = True

    def __init__(self, store: Any, options: MooncakeOptions) -> None:
        """Raises ConfigError where its memory cannot be registered; `store` is then still the caller's."""
        self._store, self._options = store, options
        self._calls = Calls("mooncake", _MOST_OUT)
        self._config = ReplicateConfig()
        self._config.replica_num = options.replicas
        self._attached = range(0)
        self._closed = False
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
        try:
            code = self._calls.run(lambda: self._store.register_buffer(start, len(memory)), SETUP_SECONDS)
        except TierUnavailable as error:
            log.warning("%s: while the arena was registered; puts are copied", error)
            return
        if code:
            log.warning("mooncake: the arena cannot be registered (%d); puts are copied", code)
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

        def prepare(places: range, landing: Landing | None) -> Callable[[], list[int]]:
            assert landing is not None
            names, sizes = _named(keys, places), [len(buffers[place]) for place in places]
            into = [landing.address + at for at in offsets(sizes)]
            return lambda: list(self._store.batch_get_into(names, into, sizes))

        def finish(transfer: _Transfer, found: list[int]) -> None:
            self._land(transfer, found, keys, buffers, codes)

        self._pump(keys, buffers, lambda _: True, prepare, finish)
        results = [self._got(*found) for found in zip(keys, buffers, codes, strict=True)]
        if Got.HIT not in results:
            _raise_if_failed(codes)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the interface says, except that a key that is held keeps its value."""
        codes = [_FULL] * len(keys)

        def prepare(places: range, landing: Landing | None) -> Callable[[], list[int]]:
            names, some = _named(keys, places), [buffers[place] for place in places]
            sizes = [len(buffer) for buffer in some]
            for place in places:
                self.seal_value(keys[place], buffers[place])
            starts = [address_of(buffer) for buffer in some]
            if landing is not None:
                starts = [landing.address + at for at in offsets(sizes)]
                for at, buffer in zip(offsets(sizes), some, strict=True):
                    landing.array[at : at + len(buffer)] = np.frombuffer(buffer, np.uint8)
            return lambda: list(self._store.batch_put_from(names, starts, sizes, self._config))

        def finish(transfer: _Transfer, found: list[int]) -> None:
            codes[transfer.places.start : transfer.places.stop] = found

        self._pump(keys, buffers, lambda places: not self._are_attached(buffers, places), prepare, finish)
        if 0 not in codes:
            _raise_if_failed(codes)
        return [Put.STORED if code in (0, _EXISTS) else Put.REFUSED for code in codes]

    def delete(self, keys: Sequence[Key]) -> None:
        """By force: what was just read is leased for seconds, and could not be removed otherwise."""
        if keys:
            names = [key_name(key) for key in keys]
            _raise_if_failed(self._ask(lambda: list(self._store.batch_remove(names, True))))

    def close(self) -> None:
        back = self._calls.close(_CLOSE_SECONDS)
        if self._closed:
            return
        self._closed = True
        if back:
            self._store.close()  # nothing calls it any more, which would crash
        else:  # and so would closing it under a thread that is inside
            _left.append((self._store, self._landings))

    def _ask(self, work: Callable[[], list[int]]) -> list[int]:
        return self._calls.run(work, self._options.timeout)

    def _register(self, landing: Landing) -> None:
        size = self._options.buffer
        code = self._calls.run(lambda: self._store.register_buffer(landing.address, size), SETUP_SECONDS)
        if code:
            raise ConfigError(f"buffer of {size} bytes cannot be registered ({code})")

    def _are_attached(self, buffers: Sequence[Buffer], places: range) -> bool:
        starts = (address_of(buffers[place]) for place in places)
        return all(
            start in self._attached and start + len(buffers[place]) - 1 in self._attached
            for start, place in zip(starts, places, strict=True)
        )

    def _pump(
        self,
        keys: Sequence[Key],
        buffers: Sequence[Buffer],
        lands: Callable[[range], bool],
        prepare: Callable[[range, Landing | None], Callable[[], list[int]]],
        finish: Callable[[_Transfer, list[int]], None],
    ) -> None:
        """Move a batch in groups, one call at a time: while it is out, the next group is prepared and the
        one before finished. Values longer than a landing are left out."""
        under_way: list[_Transfer] = []  # one, or none

        def end() -> list[tuple[_Transfer, list[int]]]:
            return [(transfer, self._end(transfer)) for transfer in under_way]

        def settle(ended: list[tuple[_Transfer, list[int]]]) -> None:
            for transfer, found in ended:
                finish(transfer, found)
                self._settle(transfer)

        try:
            for places in groups(buffers, min(_GROUP, self._options.buffer)):
                if len(buffers[places.start]) > self._options.buffer:
                    continue  # it is alone
                landing = self._landings.take_free() if lands(places) else None
                if landing is None and lands(places):  # who waits for one must not keep one
                    settle(end())
                    under_way.clear()
                    landing = self._landings.take(self._options.timeout)
                try:
                    work = prepare(places, landing)
                    ended = end()
                    future = self._calls.begin(work)
                except TierUnavailable:
                    if landing is not None:
                        self._landings.give(landing)
                    raise
                under_way[:] = [_Transfer(future, places, _named(keys, places), landing, time.monotonic())]
                settle(ended)
            settle(end())
            under_way.clear()
        finally:
            for transfer in under_way:
                transfer.future.add_done_callback(partial(self._come_back_late, transfer))

    def _end(self, transfer: _Transfer) -> list[int]:
        left = transfer.begun + self._options.timeout - time.monotonic()
        return self._calls.end(transfer.future, max(0.0, left))

    def _land(
        self,
        transfer: _Transfer,
        found: list[int],
        keys: Sequence[Key],
        buffers: Sequence[Buffer],
        codes: list[int],
    ) -> None:
        """Copy what came to where it belongs, and note what became of each value."""
        assert transfer.landing is not None
        array = transfer.landing.array
        sizes = [len(buffers[place]) for place in transfer.places]
        for place, at, size, code in zip(transfer.places, offsets(sizes), sizes, found, strict=True):
            codes[place] = code
            if code != size:
                continue
            value = array[at : at + size]
            if not self.check_value(keys[place], value.data):
                codes[place] = _DAMAGED
            else:
                np.frombuffer(buffers[place], np.uint8)[:] = value  # without the GIL

    def _settle(self, transfer: _Transfer) -> None:
        """The call is over."""
        if transfer.landing is None:
            return
        if time.monotonic() - transfer.begun < _UNFINISHED_SECONDS:
            self._landings.give(transfer.landing)
        elif self._landings.lose(transfer.landing):
            with contextlib.suppress(TierUnavailable, ConfigError):
                self._landings.add()

    def _come_back_late(self, transfer: _Transfer, _: Future[list[int]]) -> None:
        """What was sent from the caller's memory after the verb had ended may be garbled: it is removed. Its
        seal would say so too."""
        if transfer.landing is None:
            with contextlib.suppress(TierUnavailable):
                self._calls.begin(lambda: self._store.batch_remove(transfer.names, True))
        self._settle(transfer)

    def _got(self, key: Key, buffer: Buffer, code: int) -> Got:
        if code >= 0:
            return Got.HIT if code == len(buffer) else Got.DAMAGED
        if code == _INVALID:  # longer than the buffer, or anything else that the client takes for wrong
            size = self._calls.run(lambda: self._store.get_size(key_name(key)), self._options.timeout)
            return Got.DAMAGED if size >= 0 else Got.MISS
        return Got.MISS


_left: list[object] = []  # what threads that did not come back still use


def _named(keys: Sequence[Key], places: range) -> list[str]:
    return [key_name(keys[place]) for place in places]


def _raise_if_failed(codes: Sequence[int]) -> None:
    """Raise TierUnavailable if one of these is a fault of the place, not of a key."""
    for code in codes:
        if code < 0 and code not in _OF_A_KEY:
            what = {-800: "a transfer failed", -900: "no master", -901: "the master does not answer"}
            raise TierUnavailable(f"mooncake: {what.get(code, 'error')} ({code})")


def open_mooncake(url: TierURL) -> MooncakeTier:
    """A tier from `mooncake://master:port?…`; see docs/tiers-mooncake.md. Raises ConfigError."""
    options = mooncake_options(url)
    store = connect(url, options)
    try:
        return MooncakeTier(store, options)
    except (ConfigError, TierUnavailable) as error:
        _left.append(store)  # not closed: a call may be out
        raise ConfigError(f"{url}: {error}") from error
