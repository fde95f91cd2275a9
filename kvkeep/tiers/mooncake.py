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
import numpy.typing as npt

from kvkeep.errors import ConfigError, TierStillReads, TierUnavailable
from kvkeep.tiers.base import Buffer, Capabilities, Got, Key, Put, Tier, key_name
from kvkeep.tiers.calls import Calls
from kvkeep.tiers.landing import Landing, Landings, address_of, groups, offsets
from kvkeep.tiers.mooncake_client import (
    MOST_SECONDS,
    SETUP_SECONDS,
    MooncakeOptions,
    ReplicateConfig,
    connect,
    mooncake_options,
)
from kvkeep.tiers.url import TierURL

__all__ = ["MooncakeOptions", "MooncakeTier", "open_mooncake"]

log = logging.getLogger("kvkeep.tiers")

_GROUP, _ATTACHED_GROUP = 32 << 20, 128 << 20
"""Bytes that one call moves: through a landing, the next ones land while these are copied."""
_LANDINGS = 4  # two gets at once, each copying one group while the next one lands
_MOST_OUT = 16
_CLOSE_SECONDS = 2.0

# Codes of the store, from its enum ErrorCode.
_ABSENT, _FULL, _EXISTS, _INVALID = -704, -200, -705, -600
_DAMAGED = 0  # ours: no value is as short
_OF_A_KEY = {_ABSENT, _FULL, _EXISTS, _INVALID, -10, -101, -703, -707, -714}  # others: of the place


class _Transfer(NamedTuple):
    """A call under way that moves the values of `places` in the batch."""

    places: range
    names: list[str]
    views: list[npt.NDArray[np.uint8]]
    """Where they are on this side: in the caller's memory, or in the landing."""
    landing: Landing | None
    begun: float = 0.0

    @property
    def arguments(self) -> tuple[list[str], list[int], list[int]]:
        """As the client takes them."""
        return self.names, list(map(address_of, self.views)), list(map(len, self.views))


_Finish = Callable[[_Transfer, list[int]], None]


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

        def prepare(transfer: _Transfer) -> Callable[[], list[int]]:
            return lambda: list(self._store.batch_get_into(*transfer.arguments))

        def finish(transfer: _Transfer, found: list[int]) -> None:
            for place, code, view in zip(transfer.places, found, transfer.views, strict=True):
                codes[place], whole = code, code == len(view)
                if whole and not self.check_value(keys[place], view.data):
                    codes[place] = _DAMAGED
                elif whole and transfer.landing is not None:
                    np.frombuffer(buffers[place], np.uint8)[:] = view  # without the GIL

        self._pump(keys, buffers, prepare, finish, into=True)
        results = [self._got(*found) for found in zip(keys, buffers, codes, strict=True)]
        if Got.HIT not in results:
            _raise_if_failed(codes)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the interface says, except that a key that is held keeps its value."""
        codes = [_FULL] * len(keys)

        def prepare(transfer: _Transfer) -> Callable[[], list[int]]:
            for place, view in zip(transfer.places, transfer.views, strict=True):
                self.seal_value(keys[place], buffers[place])
                if transfer.landing is not None:
                    view[:] = np.frombuffer(buffers[place], np.uint8)
            return lambda: list(self._store.batch_put_from(*transfer.arguments, self._config))

        def finish(transfer: _Transfer, found: list[int]) -> None:
            codes[transfer.places.start : transfer.places.stop] = found

        self._pump(keys, buffers, prepare, finish, into=False)
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

    def _are_attached(self, buffers: Sequence[Buffer]) -> bool:
        spans = [(address_of(buffer), len(buffer)) for buffer in buffers]
        return all(at in self._attached and at + size - 1 in self._attached for at, size in spans)

    def _pump(
        self,
        keys: Sequence[Key],
        buffers: Sequence[Buffer],
        prepare: Callable[[_Transfer], Callable[[], list[int]]],
        finish: _Finish,
        into: bool,
    ) -> None:
        """Move a batch in groups, one call at a time: while it is out, the next group is prepared and the
        one before finished. Values longer than a landing are left out. `into`: the buffers are written to."""
        attached, over = self._are_attached(buffers), Future[None]()
        under_way: list[tuple[_Transfer, Future[list[int]]]] = []  # one, or none

        def end() -> Callable[[], None]:
            ended = [(transfer, self._end(transfer, future)) for transfer, future in under_way]
            return lambda: self._settle(ended, finish)

        try:
            for places in groups(buffers, _ATTACHED_GROUP if attached else min(_GROUP, self._options.buffer)):
                if len(buffers[places.start]) > self._options.buffer:
                    continue  # it is alone
                landing = None if attached else self._landings.take_free()
                if landing is None and not attached:  # who waits for one must not keep one
                    end()()
                    under_way.clear()
                    landing = self._landings.take(self._options.timeout)
                transfer = _transfer(keys, buffers, places, landing)
                try:
                    work = prepare(transfer)
                    settle = end()
                    future = self._calls.begin(work)
                except TierUnavailable:
                    if landing is not None:
                        self._landings.give(landing)
                    raise
                under_way[:] = [(transfer._replace(begun=time.monotonic()), future)]
                settle()
            end()()
            under_way.clear()
        except Exception as error:
            if under_way and attached and into:
                raise TierStillReads(str(error), over) from error
            raise
        finally:
            for transfer, future in under_way:
                future.add_done_callback(partial(self._come_back, transfer, into, over))

    def _settle(self, ended: list[tuple[_Transfer, list[int]]], finish: _Finish) -> None:
        for transfer, found in ended:
            finish(transfer, found)
            if transfer.landing is not None:
                self._landings.give(transfer.landing)

    def _end(self, transfer: _Transfer, future: Future[list[int]]) -> list[int]:
        left = transfer.begun + self._options.timeout - time.monotonic()
        return self._calls.end(future, max(0.0, left))

    def _come_back(self, transfer: _Transfer, into: bool, over: Future[None], _: Future[list[int]]) -> None:
        """The call of a verb that had ended is back. What was sent from the caller's memory may be garbled:
        it is removed. Its seal would say so too."""
        goes_on, landing = time.monotonic() - transfer.begun > MOST_SECONDS, transfer.landing
        if landing is None and not into:
            with contextlib.suppress(TierUnavailable):
                self._calls.begin(lambda: self._store.batch_remove(transfer.names, True))
        elif landing is None and not goes_on:
            over.set_result(None)
        elif landing is None:
            log.warning("mooncake: a read that went on for too long keeps %d slots", len(transfer.views))
        elif not goes_on:
            self._landings.give(landing)
        elif self._landings.lose(landing):
            with contextlib.suppress(TierUnavailable, ConfigError):
                self._landings.add()

    def _got(self, key: Key, buffer: Buffer, code: int) -> Got:
        if code >= 0:
            return Got.HIT if code == len(buffer) else Got.DAMAGED
        if code == _INVALID:  # longer than the buffer, or anything else that the client takes for wrong
            size = self._calls.run(lambda: self._store.get_size(key_name(key)), self._options.timeout)
            return Got.DAMAGED if size >= 0 else Got.MISS
        return Got.MISS


_left: list[object] = []  # what threads that did not come back still use


def _transfer(
    keys: Sequence[Key], buffers: Sequence[Buffer], places: range, landing: Landing | None
) -> _Transfer:
    """Of these places, straight or through a landing."""
    views = [np.frombuffer(buffers[place], np.uint8) for place in places]
    if landing is not None:
        sizes = list(map(len, views))
        views = [landing.array[at : at + size] for at, size in zip(offsets(sizes), sizes, strict=True)]
    return _Transfer(places, [key_name(keys[place]) for place in places], views, landing)


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
