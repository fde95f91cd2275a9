"""Mooncake's own client without a tier: what the mooncake tier is compared with.

Registered memory, one `batch_put_from` and one `batch_get_into` for all values; no deadlines, no memory
between, no checksums. Reads what it wrote, and compares it.
"""

from __future__ import annotations

import time

from kvbench.memory import Bed
from kvbench.raw import Raw
from kvkeep import pages
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.mooncake_client import connect, mooncake_options
from kvkeep.tiers.url import TierURL

__all__ = ["RawMooncake"]


class RawMooncake(Raw):
    """A client of the store of a mooncake:// URL, which moves the bed's chunks.

    Raises ConfigError where there is no store, TierUnavailable where it does not take or give all.
    """

    name = "mooncake batch_put_from and batch_get_into, registered memory"

    def __init__(self, url: TierURL, bed: Bed) -> None:
        self._store, self._bed = connect(url, mooncake_options(url)), bed
        self._sizes = [bed.chunk_bytes] * bed.count
        self._names = [f"kvkeep-raw/{number:08d}" for number in range(bed.count)]
        self._sent, self._back = (list(map(pages.address, chunks)) for chunks in (bed.sent, bed.back))
        self._done([self._store.register_buffer(pages.address(bed.memory), len(bed.memory))], [0])
        self.forget()

    def put(self) -> float:
        """Seconds that all values took."""
        self.forget()  # what is held would be left as it is
        began = time.perf_counter()
        codes = self._store.batch_put_from(self._names, self._sent, self._sizes)
        took = time.perf_counter() - began
        self._done(codes, [0] * len(codes))
        return took

    def get(self) -> float:
        """Seconds that all values took; they are compared afterwards."""
        self._bed.spoil()
        began = time.perf_counter()
        codes = self._store.batch_get_into(self._names, self._back, self._sizes)
        took = time.perf_counter() - began
        self._done(codes, self._sizes)
        if not self._bed.whole():
            raise TierUnavailable("other bytes came back")
        return took

    def forget(self) -> None:
        """Remove what was put."""
        self._store.batch_remove(self._names, True)

    def close(self) -> None:
        """Leave nothing behind."""
        self.forget()
        self._store.close()

    def _done(self, codes: list[int], expected: list[int]) -> None:
        if codes != expected:
            raise TierUnavailable(f"the store answers {sorted(set(codes))}, not {expected[0]}")
