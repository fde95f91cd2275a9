"""What other keepers may read of this one: committed chunks, leased while they are read. State only, no I/O.

To be read by a peer is no use of a chunk: it has a copy then, and this one is the one to go.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.errors import RequestRefused
from kvkeep.identity import KEY_BYTES, SPACE_BYTES
from kvkeep.keeper.chains import check_distinct
from kvkeep.keeper.index import Records
from kvkeep.keeper.keeper import Keeper

__all__ = ["BUSY", "MISSING", "OTHER_LENGTH", "PEERS", "Lender", "Loan"]

PEERS = "~peers"
"""The session that holds what is lent."""
MISSING, OTHER_LENGTH, BUSY = -1, -2, -3
"""Instead of an offset: not held; held, and longer or shorter; there is no more to be lent at once."""
_SHARE = 4  # of the arena that may be lent at once, one in so many: what is leased cannot be evicted
_NAME_BYTES = SPACE_BYTES + KEY_BYTES


class Loan(NamedTuple):
    """What a peer reads, until it is given back."""

    lease: int
    """0: nothing."""
    offsets: list[int]
    """Per key that was asked for, where its value lies in the arena, or why not."""
    sealed: list[bool]
    """Per key, whether its value has its seal already."""


class Lender:
    """The loans of one keeper. The event loop's, like the keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._prefixes = np.zeros(0, np.uint64)
        self._most = keeper.arena.nbytes // _SHARE
        self._out: dict[int, tuple[Records, int]] = {}
        self.lent_bytes = 0
        keeper.attach(PEERS)

    def held(self, names: bytes) -> bytes:
        """A byte per key (as tiers name chunks): 1 where it can be lent now."""
        return (self._find(names) >= 0).astype(np.uint8).tobytes()

    def lend(self, names: bytes, lengths: list[int]) -> Loan:
        """Lease what is held of these, each if it is as long as said, earlier keys first where not all may be
        lent. Raises RequestRefused on a key that is named twice."""
        records = self._find(names)
        check_distinct(records[records >= 0])
        out = np.full(len(records), MISSING, np.int64)
        here = np.flatnonzero(records >= 0)
        sizes = self._keeper.slot_bytes(records[here])
        fits = sizes == np.array(lengths, np.int64)[here]
        out[here[~fits]] = OTHER_LENGTH
        here, sizes = here[fits], sizes[fits]
        # A value that is more than the share by itself is lent alone.
        free = np.cumsum(sizes) <= max(self._most - self.lent_bytes, 0)
        if not self.lent_bytes and len(free):
            free[0] = True
        out[here[~free]] = BUSY
        here, lent = here[free], int(sizes[free].sum())
        sealed = np.zeros(len(records), np.bool_)
        if not len(here):
            return Loan(0, out.tolist(), sealed.tolist())
        chosen, chunks = records[here], self._keeper.chunks
        out[here], sealed[here] = chunks.offset[chosen], chunks.sealed[chosen]
        lease = self._keeper.hold(PEERS, chosen)
        self._out[lease] = (chosen, lent)
        self.lent_bytes += lent
        return Loan(lease, out.tolist(), sealed.tolist())

    def back(self, lease: int, sealed: int) -> None:
        """End a loan; the first `sealed` of its values have got their seals. Unknown ones are ignored."""
        if lease in self._out:
            records, lent = self._out.pop(lease)
            self.lent_bytes -= lent
            self._keeper.chunks.sealed[records[:sealed]] = True
            self._keeper.release(PEERS, lease, None)

    def _find(self, names: bytes) -> Records:
        """Records of committed chunks of the namespaces that the keys name; -1 for others."""
        if len(names) % _NAME_BYTES:
            raise RequestRefused(f"keys are {_NAME_BYTES} bytes each")
        rows: npt.NDArray[np.uint64] = np.frombuffer(names, "<u8").reshape(-1, 3)
        chunks, spaces = self._keeper.chunks, self._keeper.namespaces
        records = chunks.readable(np.ascontiguousarray(rows[:, 1:]))
        if len(self._prefixes) < len(spaces):
            self._prefixes = np.frombuffer(b"".join(space.prefix for space in spaces), "<u8")
        here = np.flatnonzero(records >= 0)
        good = self._prefixes[chunks.namespace[records[here]]] == rows[here, 0]
        records[here[~good]] = MISSING
        return records
