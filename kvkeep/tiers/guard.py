"""Retries with back-off, and a circuit breaker: a place that fails is left alone until it is well."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvkeep.errors import TierUnavailable
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


class Guarded(Wrapper):
    """Tries again what may work the second time, and switches the tier off while it does not.

    Three failures in a row switch it off with one warning: every verb raises at once, so no request
    waits for a dead store. After 1 s, doubling up to 30, one `probe` is let through; its success switches
    the tier on again. Source: M. Nygard, "Release It!", the circuit breaker.
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
        self._lock = threading.Lock()
        self._failures = 0
        self._closed_for = 0.0
        self._retry_at: float | None = None
        self.last_error: str | None = None
        """Why it was switched off the last time."""

    @property
    def available(self) -> bool:
        """Whether verbs are let through now."""
        return self._retry_at is None

    @property
    def probe_due(self) -> bool:
        """Whether it is switched off, and it is time to see if the place is well again."""
        return self._retry_at is not None and self._clock() >= self._retry_at

    def probe(self) -> None:
        """Ask the place for a key that nobody has; switches the tier on again if it answers."""
        with contextlib.suppress(TierUnavailable):
            self._judged(lambda: self.inner.contains([random.randbytes(KEY_BYTES)]))

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        return self._read(lambda: self.inner.contains(keys))

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self._read(lambda: self.inner.get(keys, buffers))

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        return self._write(lambda: self.inner.put(keys, buffers))

    def delete(self, keys: Sequence[Key]) -> None:
        self._write(lambda: self.inner.delete(keys))

    def _read(self, verb: Callable[[], _T]) -> _T:
        began = self._clock()
        try:
            return self._once(verb)
        except TierUnavailable:
            if self._clock() - began > _READ_RETRY_WITHIN or not self.available:
                raise
            return self._once(verb)

    def _write(self, verb: Callable[[], _T]) -> _T:
        for attempt in range(_WRITE_TRIES - 1):
            try:
                return self._once(verb)
            except TierUnavailable:
                if not self.available:
                    raise
                self._sleep(_BACK_OFF * 4**attempt * random.uniform(0.5, 1.5))
        return self._once(verb)

    def _once(self, verb: Callable[[], _T]) -> _T:
        if not self.available:
            raise TierUnavailable(f"{self._name} is switched off: {self.last_error}")
        return self._judged(verb)

    def _judged(self, verb: Callable[[], _T]) -> _T:
        try:
            result = verb()
        except TierUnavailable as error:
            self._failed(error)
            raise
        except Exception as error:
            # The edge to clients of stores, other people's tiers among them: a bug of theirs is as good as a
            # store that is away, and must not end a mover's thread, which would pin slots for good.
            log.exception("tier %s: an unexpected error", self._name)
            broken = TierUnavailable(f"{type(error).__name__}: {error}")
            self._failed(broken)
            raise broken from error
        if self._failures:
            self._succeeded()
        return result

    def _failed(self, error: TierUnavailable) -> None:
        with self._lock:
            self._failures += 1
            self.last_error = str(error)
            if self._failures < _FAILURES_TO_OPEN:
                return
            first = self._retry_at is None
            self._closed_for = _OPEN_FIRST if first else min(2 * self._closed_for, _OPEN_MOST)
            self._retry_at = self._clock() + self._closed_for
        if first:
            log.warning("tier %s is switched off until it answers again: %s", self._name, error)

    def _succeeded(self) -> None:
        with self._lock:
            was_off, self._retry_at, self._failures = self._retry_at is not None, None, 0
        if was_off:
            log.info("tier %s is back", self._name)
