"""Key → record, for millions of chunks, looked up in bulk.

An open-addressing table in numpy: a batch of n keys costs a few array operations, whatever the
number of chunks held (a dict of bytes took four times as long cold, and twice the memory).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["KeyTable", "Keys", "Records"]

Keys = npt.NDArray[np.uint64]
"""uint64 [n, 2]: the 16 bytes of each chunk key."""
Records = npt.NDArray[np.int64]
"""int64 [n]: record numbers; -1 for none."""

_EMPTY = np.uint64(0)
_TOMBSTONE = np.uint64(1) << np.uint64(32)  # record field 0 (none), tag 1
_LOW = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_SHIFT = np.uint64(32)


class KeyTable:
    """Maps 16-byte keys to record numbers below 2^32 - 1. One owner, no locks.

    A table entry is (32 bits of the key, record number + 1); linear probing; the whole key is
    kept by record number and compared before a match counts. Grows by doubling at load 1/2.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._keys = np.zeros((capacity, 2), np.uint64)
        self._entries = np.zeros(2 * capacity, np.uint64)
        self._used = 0  # entries that are not empty, tombstones included
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory of the table, in bytes."""
        return self._keys.nbytes + self._entries.nbytes

    def keys_of(self, records: Records) -> Keys:
        """Keys under which `records` were inserted."""
        return self._keys[records]

    def find(self, keys: Keys) -> Records:
        """Record of each key, or -1."""
        out, _ = self._probe(keys)
        return out

    def insert(self, keys: Keys, records: Records) -> None:
        """Add keys that are absent and distinct; `records` are free record numbers."""
        if not len(keys):
            return
        self._reserve(len(keys), int(records.max()) + 1)
        self._keys[records] = keys
        self._place(keys, records)
        self._count += len(keys)

    def remove(self, records: Records) -> None:
        """Remove the keys of `records`, which must be present."""
        if not len(records):
            return
        found, positions = self._probe(self._keys[records])
        if not np.array_equal(found, records):
            raise AssertionError("removing a key that is not in the table")
        self._entries[positions] = _TOMBSTONE
        self._count -= len(records)

    def _probe(self, keys: Keys) -> tuple[Records, Records]:
        mask = np.int64(len(self._entries) - 1)
        position = (keys[:, 0] & np.uint64(mask)).astype(np.int64)
        tag = keys[:, 1] & ~_LOW
        out = np.full(len(keys), -1, np.int64)
        active = np.arange(len(keys))
        while len(active):
            entry = self._entries[position[active]]
            # Equal tags leave the record number + 1; minus 1, all else is _LOW or more: no match, empty
            # and tombstone by wrapping round.
            record = (entry ^ tag[active]) - _ONE
            match = np.flatnonzero(record < _LOW)
            going_on = entry != _EMPTY
            if len(match):
                chosen, hits = active[match], record[match].astype(np.int64)
                kept, asked = self._keys.take(hits, 0), keys.take(chosen, 0)  # half of [] for rows
                same = (kept[:, 0] == asked[:, 0]) & (kept[:, 1] == asked[:, 1])
                out[chosen[same]] = hits[same]
                going_on[match[same]] = False
            active = active[going_on]
            position[active] = (position[active] + 1) & mask
        return out, position

    def _place(self, keys: Keys, records: Records) -> None:
        mask = np.int64(len(self._entries) - 1)
        position = (keys[:, 0] & np.uint64(mask)).astype(np.int64)
        value = (keys[:, 1] >> _SHIFT << _SHIFT) | (records + 1).astype(np.uint64)
        while len(value):
            free = self._entries[position] == _EMPTY
            self._entries[position[free]] = value[free]
            # Of several keys that chose the same free entry the last one written has won.
            placed = free & (self._entries[position] == value)
            self._used += int(placed.sum())
            position, value = (position[~placed] + 1) & mask, value[~placed]

    def _reserve(self, extra: int, records: int) -> None:
        if records > len(self._keys):
            grown = np.zeros((max(records, 2 * len(self._keys)), 2), np.uint64)
            grown[: len(self._keys)] = self._keys
            self._keys = grown
        if 2 * (self._used + extra) <= len(self._entries):
            return
        live = self._live()
        size = len(self._entries)
        while 3 * (len(live) + extra) > size:
            size *= 2
        self._entries = np.zeros(size, np.uint64)
        self._used = 0
        self._place(self._keys[live], live)

    def _live(self) -> Records:
        record = (self._entries & _LOW).astype(np.int64)
        return record[record > 0] - 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless every key can be found and the counts agree."""
        live = self._live()
        assert len(live) == self._count, (len(live), self._count)
        assert len(np.unique(live)) == len(live)
        assert np.array_equal(self.find(self._keys[live]), live)
        assert self._used == int((self._entries != _EMPTY).sum())
