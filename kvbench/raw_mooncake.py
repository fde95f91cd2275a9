"""Mooncake's own client without a tier: what the mooncake tier is compared with.

Registered memory, one `batch_put_from` and one `batch_get_into` for all values; no deadlines, no memory
between, no checksums. Reads what it wrote, and compares it.
"""

from __future__ import annotations

import mmap
import time

import numpy as np

from kvbench.raw import Raw
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.mooncake_client import connect, mooncake_options
from kvkeep.tiers.url import TierURL

__all__ = ["RawMooncake"]


class RawMooncake(Raw):
    """A client of the store of a mooncake:// URL, with memory for `count` values of `chunk_bytes` twice.

    Raises ConfigError where there is no store, TierUnavailable where it does not take or give all.
    """

    name = "mooncake batch_put_from and batch_get_into, registered memory"

    def __init__(self, url: TierURL, chunk_bytes: int, count: int) -> None:
        self._store = connect(url, mooncake_options(url))
        self._sizes = [chunk_bytes] * count
        self._names = [f"kvkeep-raw/{number:08d}" for number in range(count)]
        self._sent, self._back = (
            np.frombuffer(mmap.mmap(-1, chunk_bytes * count), np.uint8) for _ in range(2)
        )
        self._sent[:] = np.random.default_rng(0).integers(0, 256, len(self._sent), np.uint8)
        self._back[:] = 0
        for array in (self._sent, self._back):
            self._done([self._store.register_buffer(array.ctypes.data, len(array))], [0])
        self.forget()

    def put(self) -> float:
        """Seconds that all values took."""
        began = time.perf_counter()
        codes = self._store.batch_put_from(self._names, self._places(self._sent), self._sizes)
        took = time.perf_counter() - began
        self._done(codes, [0] * len(codes))
        return took

    def get(self) -> float:
        """Seconds that all values took; they are compared afterwards."""
        self._back[::512] ^= 1
        began = time.perf_counter()
        codes = self._store.batch_get_into(self._names, self._places(self._back), self._sizes)
        took = time.perf_counter() - began
        self._done(codes, self._sizes)
        if not np.array_equal(self._sent, self._back):
            raise TierUnavailable("other bytes came back")
        return took

    def forget(self) -> None:
        """Remove what was put."""
        self._store.batch_remove(self._names, True)

    def close(self) -> None:
        """Leave nothing behind."""
        self.forget()
        self._store.close()

    def _places(self, array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> list[int]:
        step = self._sizes[0]
        return [array.ctypes.data + at for at in range(0, len(array), step)]

    def _done(self, codes: list[int], expected: list[int]) -> None:
        if codes != expected:
            raise TierUnavailable(f"the store answers {sorted(set(codes))}, not {expected[0]}")
