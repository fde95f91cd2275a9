"""Retries with back-off, and a circuit breaker: a place that fails is left alone until it is well."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvkeep.errors import TierSwitchedOff, TierUnavailable
from kvkeep.tiers.base import KEY_BYTES, Buffer, Got, Key, Put, Tier
from kvkeep.tiers.wrap import Wrapper

__all__ = ["Guarded"]

log = logging.getLogger("kvkeep.tiers")

_T = TypeVar("_T")
_FAILURES_TO_OPEN = 3
_OPEN_FIRST, _OPEN_MOST = 1.0, 30.0
_READ_RETRY_WITHIN = 0.1  # a read is waited for: only a failure that came at once is worth a second try
_WRITE_TRIES = 3
_BACK_OFF = 0.05


class _Breaker:
    """Opens at the third failure in a row; a trial is due 1 s later, then after twice as long, up to 30 s.

    Source: M. Nygard, "Release It!", the circuit breaker.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures, self._open_for = 0, 0.0
        self._retry_at: float | None = None

    @property
    def open(self) -> bool:
        return self._retry_at is not None

    @property
    def due(self) -> bool:
        return self._retry_at is not None and self._clock() >= self._retry_at

    def failed(self, enough: int = _FAILURES_TO_OPEN) -> bool:
        """Note a failure; whether this one has opened it."""
        with self._lock:
            self._failures += 1
            if self._failures < enough and self._retry_at is None:
                return False
            first = self._retry_at is None
            self._open_for = _OPEN_FIRST if first else min(2 * self._open_for, _OPEN_MOST)
            self._retry_at = self._clock() + self._open_for
            return first

    def succeeded(self) -> bool:
        """Note a success; whether this one has closed it."""
        if not self._failures:
            return False
        with self._lock:
            was_open, self._retry_at, self._failures = self._retry_at is not None, None, 0
        return was_open


class Guarded(Wrapper):
    """Tries again what may work the second time, and switches the tier off while it does not.

    Three failures in a row switch it off with one warning: every verb raises at once, so no request
    waits for a dead store. Now and then one `probe` is let through; its success switches the tier on
    again. Where puts fail and reads do not (a disk mounted read-only, no right to write), only puts are
    switched off, until one that is let through succeeds.
    """

    def __init__(
        self,
        inner: Tier,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._name = name
        self._clock, self._sleep = clock, sleep
        self._place, self._writes = _Breaker(clock), _Breaker(clock)
        self.last_error: str | None = None
        """Why a verb failed the last time."""
        self.failures = 0
        """How many verbs have failed."""

    @property
    def available(self) -> bool:
        """Whether reads are let through now."""
        return not self._place.open

    @property
    def writable(self) -> bool:
        """Whether puts are let through now, and not only one to see if they work again."""
        return self.available and not self._writes.open

    @property
    def probe_due(self) -> bool:
        """Whether it is switched off, and it is time to see if the place is well again."""
        return self._place.due

    @property
    def put_due(self) -> bool:
        """Whether puts alone are switched off, and it is time to try one."""
        return self.available and self._writes.due

    def probe(self, keys: Sequence[Key] = (), enough: int = _FAILURES_TO_OPEN) -> list[bool]:
        """Ask the place which of `keys` it has (without any: about one that nobody has), also where it is
        switched off. Switches it on again if it answers; else returns nothing, and switches it off if that is
        the failure that is `enough`."""
        with contextlib.suppress(TierUnavailable):
            keys = keys or [random.randbytes(KEY_BYTES)]
            return self._asked(lambda: _each(keys, self.inner.contains(keys)), enough)
        return []

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        return self._read(lambda: _each(keys, self.inner.contains(keys)))

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self._read(lambda: _each(keys, self.inner.get(keys, buffers)))

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        for attempt in range(_WRITE_TRIES - 1):
            try:
                return self._put(keys, buffers)
            except TierUnavailable:
                if not self.writable:
                    raise
                self._sleep(_BACK_OFF * 4**attempt * random.uniform(0.5, 1.5))
        return self._put(keys, buffers)

    def delete(self, keys: Sequence[Key]) -> None:
        """Tried once, and no failure counts: where nothing may be deleted, values can still be put."""
        self._refuse_unless(self.available)
        self._called(lambda: self.inner.delete(keys))

    def gone(self) -> list[Key]:
        with contextlib.suppress(TierUnavailable):
            return self._called(self.inner.gone)
        return []

    def _read(self, verb: Callable[[], _T]) -> _T:
        self._refuse_unless(self.available)
        began = self._clock()
        try:
            return self._asked(verb)
        except TierUnavailable as error:
            late = error.over is not None or self._clock() - began > _READ_RETRY_WITHIN
            if late or not self.available:
                raise
            return self._asked(verb)

    def _put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        self._refuse_unless(self.writable or self.put_due)
        try:
            results = self._called(lambda: _each(keys, self.inner.put(keys, buffers)))
        except TierUnavailable:
            self._put_failed()
            raise
        if self._writes.succeeded():
            log.info("tier %(tier)s takes values again", {"tier": self._name})
        return results

    def _put_failed(self) -> None:
        if not self._writes.failed():
            return
        why = self.last_error
        self.probe(enough=1)  # is it the place that is away?
        if self.available:
            about = {"tier": self._name, "error": why}
            log.warning("tier %(tier)s is only read until it takes values again: %(error)s", about)
        else:
            self._writes.succeeded()

    def _asked(self, verb: Callable[[], _T], enough: int = _FAILURES_TO_OPEN) -> _T:
        try:
            result = self._called(verb)
        except TierUnavailable as error:
            if self._place.failed(enough):
                about = {"tier": self._name, "error": error}
                log.warning("tier %(tier)s is switched off until it answers again: %(error)s", about)
            raise
        if self._place.succeeded():
            log.info("tier %(tier)s is back", {"tier": self._name})
        return result

    def _called(self, verb: Callable[[], _T]) -> _T:
        try:
            return verb()
        except TierUnavailable as error:
            self.failures, self.last_error = self.failures + 1, str(error)
            raise
        except Exception as error:
            # The edge to clients of stores, other people's tiers among them: a bug of theirs is as good as a
            # store that is away, and must not end a mover's thread, which would pin slots for good.
            log.exception("tier %(tier)s: an unexpected error", {"tier": self._name})
            self.failures, self.last_error = self.failures + 1, f"{type(error).__name__}: {error}"
            raise TierUnavailable(self.last_error) from error

    def _refuse_unless(self, well: bool) -> None:
        if not well:
            raise TierSwitchedOff(f"{self._name} is switched off: {self.last_error}")


def _each(keys: Sequence[Key], results: list[_T]) -> list[_T]:
    """The results of a verb, one for each key; a third party's tier may have miscounted."""
    if len(results) != len(keys):
        raise ValueError(f"it gave {len(results)} results for {len(keys)} keys")
    return results
