"""What each tier has yet to be told: chunks on their way down, oldest first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.identity import SPACE_BYTES
from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.index import Keys, Records
from kvkeep.keeper.keeper import Keeper

__all__ = ["MOVERS", "Flush", "FlushQueue", "Move", "moves_of"]

_MOST_WAITING = 1 << 20  # 16 MiB of keys: what waits while a tier is away for long
_PIECE, _MOST_SOUGHT = 512, 1 << 15  # keys looked up at a time, and by one call: some milliseconds
_NEWEST = 16
MOVERS = "~movers"
"""The session that holds the movers' own claims."""


class Move(NamedTuple):
    """One value between the arena and a tier."""

    key: bytes
    """As tiers name it: 8 bytes of the namespace's fingerprint, 16 of the chunk key."""
    offset: int
    length: int


class Flush(NamedTuple):
    """One batch to write; its records are leased until `FlushQueue.done`."""

    records: Records
    lease: int
    moves: list[Move]


class FlushQueue:
    """The queue of one tier: keys of chunks, not their bytes, so that it holds nothing in the arena.

    What is evicted before its turn is lost to the tier, and counted. A key may be in it several times, of
    chunks that were forgotten and saved again: of records, those whose bit in `queued` is set wait. No I/O:
    movers take batches.
    """

    def __init__(self, keeper: Keeper, tier: int, *, through: bool, second_touch: bool) -> None:
        self._keeper = keeper
        self._bit = np.uint16(1 << tier)
        self._through = through
        self._second_touch = second_touch
        self._waiting: deque[Keys] = deque()
        self._count = 0  # of keys in it: asked for at every commit, when it may be a million long
        self.lost = 0
        """Chunks that were gone from memory before they could be written."""
        self.newest: list[bytes] = []
        """Some of what the tier took last, by its names there."""

    def __len__(self) -> int:
        return self._count

    def committed(self, records: Records) -> None:
        """Chunks have become readable."""
        if self._through:
            self.add(records)

    def used(self, records: Records) -> None:
        """A request has asked for chunks that are held."""
        if self._second_touch:
            self.add(records[self._keeper.chunks.state[records] == ChunkState.COMMITTED])

    def next(self, most_bytes: int) -> Flush | None:
        """The next batch, of at least one chunk and at most about `most_bytes`; None if there is none, or
        none among the _MOST_SOUGHT oldest keys, which are gone from the queue then."""
        chunks, taken, nbytes, sought = self._keeper.chunks, [], 0, 0
        while self._waiting and nbytes < most_bytes and sought < _MOST_SOUGHT:
            keys = self._pop(_PIECE)
            sought += len(keys)
            found = chunks.table.find(keys)
            self.lost += int((found < 0).sum())
            found = found[found >= 0]
            found = found[(chunks.queued[found] & self._bit) != 0]
            records = found[np.sort(np.unique(found, return_index=True)[1])]
            ends = nbytes + np.cumsum(self._keeper.slot_bytes(records))
            count = min(len(records), int(np.searchsorted(ends, most_bytes)) + 1)
            if count < len(records):
                self._waiting.appendleft(chunks.table.keys_of(records[count:]))
                self._count += len(records) - count
            if count:
                nbytes = int(ends[count - 1])
                chunks.queued[records[:count]] &= ~self._bit
                taken.append(records[:count])
        if not taken:
            return None
        together = np.concatenate(taken)
        return Flush(together, self._keeper.hold(MOVERS, together), moves_of(self._keeper, together))

    def done(self, flush: Flush, stored: npt.NDArray[np.bool_], again: npt.NDArray[np.bool_]) -> None:
        """A batch has been tried: what is in the tier now, and what is to be queued anew."""
        chunks, written = self._keeper.chunks, flush.records[stored]
        if len(written):
            self.newest = [flush.moves[at].key for at in np.flatnonzero(stored)[-_NEWEST:]]
        chunks.stored[written] |= self._bit
        chunks.queued[written] &= ~self._bit  # where one was used in the meantime
        if self._keeper.journal is not None:
            self._keeper.journal.note(written)
        missing = flush.records[again & (chunks.state[flush.records] == ChunkState.COMMITTED)]
        missing = missing[(chunks.queued[missing] & self._bit) == 0]
        if len(missing):
            chunks.queued[missing] |= self._bit
            self._waiting.appendleft(chunks.table.keys_of(missing))
            self._count += len(missing)
        self._keeper.release(MOVERS, flush.lease, None)

    def gone(self, names: Sequence[bytes]) -> None:
        """The tier has given up values, by their names there: whoever put them, and whether or not memory has
        them too."""
        chunks, journal = self._keeper.chunks, self._keeper.journal
        spaces = {space.prefix: space for space in self._keeper.namespaces}
        keys = np.frombuffer(b"".join(name[SPACE_BYTES:] for name in names), "<u8").reshape(-1, 2)
        records = chunks.table.find(keys)
        held = records[records >= 0]
        chunks.stored[held] &= ~self._bit
        if journal is not None:
            journal.note(held)
            for name, record in zip(names, records.tolist(), strict=True):
                if record < 0 and (space := spaces.get(name[:SPACE_BYTES])) is not None:
                    journal.probed(space, [name], [-1])

    def forgotten(self, first: int = 0) -> int:
        """The tier has lost what it had, as one in memory does when it starts again: what is held is written
        once more. Goes through _MOST_SOUGHT records from `first`; returns where to go on, 0 at the end."""
        chunks, end = self._keeper.chunks, first + _MOST_SOUGHT
        had = (chunks.stored[first:end] & self._bit) != 0
        held = first + np.flatnonzero(had & (chunks.state[first:end] == ChunkState.COMMITTED))
        chunks.stored[held] &= ~self._bit
        if self._keeper.journal is not None:
            self._keeper.journal.note(held)
        if self._through or self._second_touch:
            self.add(held)
        return end if end < len(chunks.state) else 0

    def add(self, records: Records) -> None:
        """Queue readable chunks, but for those that the tier has or that wait already."""
        chunks = self._keeper.chunks
        new = records[((chunks.stored[records] | chunks.queued[records]) & self._bit) == 0]
        if len(new):
            chunks.queued[new] |= self._bit
            keys = chunks.table.keys_of(new)
            self._count += len(new)
            if self._waiting and len(self._waiting[-1]) + len(new) <= _PIECE:  # decode commits one by one
                keys = np.concatenate((self._waiting.pop(), keys))
            self._waiting.append(keys)
        while self._count > _MOST_WAITING:
            given_up = chunks.table.find(self._pop(self._count - _MOST_WAITING))
            self.lost += len(given_up)
            chunks.queued[given_up[given_up >= 0]] &= ~self._bit

    def _pop(self, most: int) -> Keys:
        """Take up to so many of the oldest keys out of the queue; they come in pieces, so perhaps fewer."""
        keys = self._waiting.popleft()
        if len(keys) > most:
            self._waiting.appendleft(keys[most:])
        self._count -= min(len(keys), most)
        return keys[:most]


def moves_of(keeper: Keeper, records: Records) -> list[Move]:
    """Where the bytes of records lie, and what tiers call them."""
    chunks = keeper.chunks
    keys = chunks.table.keys_of(records)
    return [
        Move(keeper.namespaces[space].prefix + key.tobytes(), offset, length)
        for space, key, offset, length in zip(
            chunks.namespace[records].tolist(),
            keys,
            chunks.offset[records].tolist(),
            keeper.slot_bytes(records).tolist(),
            strict=True,
        )
    ]
