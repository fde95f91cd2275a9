"""Faults on purpose: latency, a slow wire, failures, flipped bits, a hang. For drills and tests.

`faulty+redis://…?fault_latency=2s` wraps the real tier, as `faulty+` does with any scheme.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Buffer, Check, Got, Key, Put, Seal, Tier
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import Wrapper

__all__ = ["Faults", "Faulty"]

_VERBS = frozenset({"contains", "get", "put", "delete"})


@dataclass
class Faults:
    """What goes wrong; may be changed while the tier is in use."""

    latency: float = 0.0
    """Seconds added to every verb."""
    bandwidth: float = 0.0
    """Bytes per second that values pass at, at most; 0: as fast as they go."""
    error_rate: float = 0.0
    """Share of verbs that raise TierUnavailable."""
    flip_rate: float = 0.0
    """Share of values in which one bit is wrong when they come back."""
    hang: bool = False
    """Verbs do not come back before `Faulty.release`, and then fail."""
    verbs: frozenset[str] = _VERBS
    """Those that it happens to; the others are as well as ever."""

    @classmethod
    def of(cls, url: TierURL) -> Faults:
        """From a URL's options fault_latency, fault_bandwidth, fault_errors, fault_flips, fault_hang, and
        fault_verbs, a list with commas."""
        return cls(
            latency=url.take_seconds("fault_latency", 0.0),
            bandwidth=float(url.take_bytes("fault_bandwidth", 0) or 0),
            error_rate=url.take("fault_errors", float, 0.0),
            flip_rate=url.take("fault_flips", float, 0.0),
            hang=url.take_flag("fault_hang", False),
            verbs=url.take("fault_verbs", _verbs, _VERBS),
        )


class Faulty(Wrapper):
    """A tier that fails as it is told to."""

    def __init__(self, inner: Tier, faults: Faults, seed: int = 0) -> None:
        super().__init__(inner)
        self.faults = faults
        self._random = random.Random(seed)
        self._released = threading.Event()

    def release(self) -> None:
        """End all hangs, those under way and later ones."""
        self._released.set()

    def overlap(self, seal: Seal, check: Check) -> bool:
        return False  # bits are flipped here, so the check must come later

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        self._suffer("contains", 0)
        return self.inner.contains(keys)

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        self._suffer("get", sum(map(len, buffers)))
        results = self.inner.get(keys, buffers)
        for buffer, result in zip(buffers, results, strict=True):
            if result is Got.HIT and self._random.random() < self.faults.flip_rate:
                buffer[self._random.randrange(len(buffer))] ^= 1 << self._random.randrange(8)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        self._suffer("put", sum(map(len, buffers)))
        return self.inner.put(keys, buffers)

    def delete(self, keys: Sequence[Key]) -> None:
        self._suffer("delete", 0)
        self.inner.delete(keys)

    def close(self) -> None:
        self.release()
        self.inner.close()

    def _suffer(self, verb: str, nbytes: int) -> None:
        faults = self.faults
        if verb not in faults.verbs:
            return
        if faults.hang:
            self._released.wait()
            raise TierUnavailable("fault injection: it hung")
        wait = faults.latency + (nbytes / faults.bandwidth if faults.bandwidth else 0.0)
        if wait:
            time.sleep(wait)
        if self._random.random() < faults.error_rate:
            raise TierUnavailable("fault injection: it failed")


def _verbs(text: str) -> frozenset[str]:
    verbs = frozenset(text.split(","))
    if not verbs <= _VERBS:
        raise ValueError(f"write some of {', '.join(sorted(_VERBS))}")
    return verbs
