"""Every chunk the keeper knows, as a structure of arrays indexed by record number.

About 70 bytes a chunk, all of them numpy, so that a batch of any size costs a few operations.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from kvkeep.keeper.index import Keys, KeyTable, Records
from kvkeep.presence import Presence

__all__ = ["ChunkState", "Chunks"]


class ChunkState(enum.IntEnum):
    """Life of a record: FREE → RESERVED → COMMITTED → FREE, or by way of DOOMED while leased."""

    FREE = 0
    RESERVED = 1
    """A writer owns the slot; nobody may read it."""
    COMMITTED = 2
    """Readable; never written again."""
    DOOMED = 3
    """Forgotten, no key finds it; its slot is freed with the last lease."""


class Chunks:
    """Keys, states, leases and places of chunks. One owner, no locks."""

    _GROW = 1024

    def __init__(self) -> None:
        self.table = KeyTable(self._GROW)
        self.presence: Presence | None = None
        """Told what the table has, where engines look."""
        self.state = np.zeros(0, np.uint8)
        self.leases = np.zeros(0, np.int32)
        self.offset = np.zeros(0, np.int64)
        self.epoch = np.zeros(0, np.int64)
        self.kind = np.zeros(0, np.int32)
        self.namespace = np.zeros(0, np.int32)
        self.tenant = np.zeros(0, np.uint16)
        self.position = np.zeros(0, np.int32)
        """Place in the chain: of one request's chunks the last ones go first."""
        self.evictable = np.zeros(0, np.bool_)
        self.pinned = np.zeros(0, np.bool_)
        """Readable, and passed over by eviction: see `pins`."""
        self.stored = np.zeros(0, np.uint16)
        """A bit for each tier that holds the chunk, as far as this keeper knows."""
        self.queued = np.zeros(0, np.uint16)
        """A bit for each tier that it waits to be written to."""
        self.sealed = np.zeros(0, np.bool_)
        """Its slot ends with its seal: it came from a tier, or was lent before."""
        self._columns = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        # By namespace and kind, and by namespace; kept, since counting a million took 30 ms.
        self._taken = np.zeros((0, 0), np.int64)
        self._readable = np.zeros(0, np.int64)
        self._free: list[int] = []
        self.coldest = np.zeros(0, np.int64)
        """By kind, an epoch that none of its slabs is older than: see `coldest_slab`."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Memory of the index, in bytes, the list of free records included."""
        columns = sum(getattr(self, name).nbytes for name in self._columns)
        return self.table.nbytes + int(columns) + 8 * len(self._free)

    def add(
        self, keys: Keys, namespace: int, kind: int, epoch: int, positions: Records, tenant: int
    ) -> Records:
        """New RESERVED records, without a place yet, for keys that are absent and distinct."""
        while len(self._free) < len(keys):
            self._grow()
        records = np.array(self._free[len(self._free) - len(keys) :][::-1], np.int64)
        del self._free[len(self._free) - len(keys) :]
        self.table.insert(keys, records)
        if self.presence is not None:
            self.presence.add(keys)
        self.state[records] = ChunkState.RESERVED
        self.leases[records] = 0
        self.offset[records] = -1
        self.epoch[records] = epoch
        self.kind[records] = kind
        self.namespace[records] = namespace
        self.tenant[records] = tenant
        self.position[records] = positions
        self.stored[records] = self.queued[records] = 0
        self.sealed[records] = False
        self._tally(namespace, kind)
        self._taken[namespace, kind] += len(records)
        return records

    def commit(self, records: Records) -> None:
        """Make reserved chunks readable."""
        self.state[records] = ChunkState.COMMITTED
        self.evictable[records] = self.leases[records] == 0
        self._cool(records)
        np.add.at(self._readable, self.namespace[records], 1)

    def pin(self, records: Records, pinned: bool) -> None:
        """Keep committed chunks from being evicted, or no longer."""
        self.pinned[records] = pinned
        self.evictable[records] = ~self.pinned[records] & (self.leases[records] == 0)
        self._cool(records)

    def lease(self, records: Records) -> None:
        """Keep committed chunks from being evicted until `unlease`."""
        self.leases[records] += 1
        self.evictable[records] = False

    def unlease(self, records: Records) -> Records:
        """End one lease of each record; returns the DOOMED ones that nobody reads any more."""
        self.leases[records] -= 1
        idle = records[self.leases[records] == 0]
        committed = self.state[idle] == ChunkState.COMMITTED
        self.evictable[idle[committed]] = ~self.pinned[idle[committed]]
        self._cool(idle)
        doomed: Records = idle[~committed]
        return doomed

    def forget(self, records: Records) -> None:
        """Take the keys of `records` out of the table; the records stay until `free`."""
        if self.presence is not None:
            self.presence.remove(self.table.keys_of(records))
        self.table.remove(records)
        readable = records[self.state[records] == ChunkState.COMMITTED]
        np.subtract.at(self._readable, self.namespace[readable], 1)
        self.state[records] = ChunkState.DOOMED
        self.evictable[records] = self.pinned[records] = False

    def free(self, records: Records) -> None:
        """Recycle forgotten records."""
        self.state[records] = ChunkState.FREE
        np.subtract.at(self._taken, (self.namespace[records], self.kind[records]), 1)
        self._free.extend(records.tolist())

    def readable(self, keys: Keys) -> Records:
        """Records of those keys whose chunks are COMMITTED; -1 for the others."""
        records = self.table.find(keys)
        records[~self.committed(records)] = -1
        return records

    def committed(self, records: Records) -> npt.NDArray[np.bool_]:
        """Which of these are COMMITTED; -1 is not."""
        flags: npt.NDArray[np.bool_] = records >= 0
        flags[flags] = self.state[records[flags]] == ChunkState.COMMITTED
        return flags

    def in_state(self, *states: ChunkState) -> Records:
        """Records that are in one of the states."""
        records: Records = np.flatnonzero(np.isin(self.state, states))
        return records

    def coldest_slab(self, kind: int, slabs: Records, slab_bytes: int) -> tuple[int, int]:
        """Of a kind's slabs, ascending, the one that was used longest ago; the epoch of that first, which is
        -1 for an empty one, and beyond all where something in each is in use.

        A scan of all records. `coldest` remembers the epoch: until slots come free, or something older is in
        use no longer, it can only rise."""
        newest = np.full(len(slabs), -1, np.int64)
        records = np.flatnonzero((self.kind == kind) & (self.state != ChunkState.FREE))
        where = np.searchsorted(slabs, self.offset[records] // slab_bytes)
        np.maximum.at(newest, where, self.epoch[records])
        newest[where[~self.evictable[records]]] = np.iinfo(np.int64).max
        coldest = int(newest.argmin())
        self.coldest[kind] = newest[coldest]
        return int(newest[coldest]), int(slabs[coldest])

    def usage(self, spaces: int, slot_bytes: list[int]) -> tuple[Records, Records]:
        """By namespace, readable chunks and bytes of slots that are taken; `slot_bytes` by kind."""
        rest = (0, spaces - len(self._readable))
        sizes = np.array(slot_bytes, np.int64)[: self._taken.shape[1]]
        return np.pad(self._readable, rest), np.pad(self._taken @ sizes, rest)

    def _cool(self, records: Records) -> None:
        """These are in use no longer, and their slabs as new as they are or newer."""
        np.minimum.at(self.coldest, self.kind[records], self.epoch[records])

    def _tally(self, namespace: int, kind: int) -> None:
        rows, columns = max(namespace + 1, len(self._readable)), max(kind + 1, self._taken.shape[1])
        if (rows, columns) != self._taken.shape:
            self._readable = np.pad(self._readable, (0, rows - len(self._readable)))
            self.coldest = np.pad(self.coldest, (0, columns - len(self.coldest)), constant_values=-1)
            grown = [(0, new - old) for new, old in zip((rows, columns), self._taken.shape, strict=True)]
            self._taken = np.pad(self._taken, grown)

    def _grow(self) -> None:
        old, new = len(self.state), max(self._GROW, 2 * len(self.state))
        for name in self._columns:
            column: npt.NDArray[np.generic] = getattr(self, name)
            grown = np.zeros(new, column.dtype)
            grown[:old] = column
            setattr(self, name, grown)
        self._free.extend(range(new - 1, old - 1, -1))

    def check_integrity(self) -> None:
        """Raise AssertionError unless states, keys and free records agree."""
        self.table.check_integrity()
        live = self.in_state(ChunkState.RESERVED, ChunkState.COMMITTED)
        assert np.array_equal(np.sort(self.table.find(self.table.keys_of(live))), live)
        assert len(live) == len(self.table)
        assert sorted(self._free) == self.in_state(ChunkState.FREE).tolist()
        assert (self.leases >= 0).all()
        committed = self.state == ChunkState.COMMITTED
        assert np.array_equal(self.evictable, committed & (self.leases == 0) & ~self.pinned)
        assert not (self.pinned & ~committed).any()
        taken, readable = np.zeros_like(self._taken), np.zeros_like(self._readable)
        used = np.flatnonzero(self.state != ChunkState.FREE)
        np.add.at(taken, (self.namespace[used], self.kind[used]), 1)
        np.add.at(readable, self.namespace[committed], 1)
        assert np.array_equal(taken, self._taken)
        assert np.array_equal(readable, self._readable)
