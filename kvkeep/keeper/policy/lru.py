"""Least recently used, tails of chains first."""

import numpy as np
import numpy.typing as npt

from kvkeep.keeper.policy.base import NO_IDS, Flags, Ids, Policy, grown

_POSITION_BITS = 20
_LAST_POSITION = (1 << _POSITION_BITS) - 1
_ABSENT = int(np.iinfo(np.int64).max)
# A batch of 1/64 of all makes the scan that fills it cost about 64 elements of a vector operation per
# victim, and keeps the batch itself at a quarter of a byte per chunk.
_BATCH_MIN, _BATCH_SHARE = 1024, 64
_SAMPLE = 16384


class LruPolicy(Policy):
    """Gives up the chunk of the oldest request and, of one request's chunks, the last in the chain.

    Each chunk carries one stamp: the epoch above, the position counted downwards below, so that at
    one epoch a parent is newer than its children. State is 8 bytes per record id, plus 16 per entry
    of the batch: the oldest chunks in order, read from the front. A stamp is never lowered, so the
    batch needs no upkeep on a touch: an entry whose stamp is no longer the one noted is dropped when
    it is met. Only a chunk stamped at or below the batch's newest stamp (the horizon) has to be merged.

    Source: the usual LRU; stamps with lazy deletion stand in for its linked list.
    """

    name = "lru"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._stamps: npt.NDArray[np.int64] = np.full(_BATCH_MIN, _ABSENT)
        self._count = 0
        self._forget_batch()

    def __len__(self) -> int:
        return self._count

    def insert(self, ids: Ids, keys: list[int], epoch: int, first: int) -> None:
        self._stamps = grown(self._stamps, ids, _ABSENT)
        self._count += len(ids)
        self._stamp(ids, _stamps_of(len(ids), epoch, first))

    def touch(self, ids: Ids, epoch: int, first: int) -> None:
        # The maximum: a late touch by an old request does not make a chunk older.
        self._stamp(ids, np.maximum(self._stamps[ids], _stamps_of(len(ids), epoch, first)))

    def victims(self, count: int, evictable: Flags) -> Ids:
        if count > self._count:
            return NO_IDS.copy()
        if self._late.size:
            self._merge_late()
        window = 2 * count + 64
        while True:
            oldest = self._oldest(window)
            chosen = oldest[evictable[oldest]][:count]
            if len(chosen) == count:
                return chosen
            missing = count - len(chosen)
            if self._cursor + window >= len(self._batch) and not self._extend(missing, evictable):
                return NO_IDS.copy()
            window *= 2

    def remove(self, ids: Ids, evicted: bool) -> None:
        self._count -= int(np.count_nonzero(self._stamps[ids] != _ABSENT))
        self._stamps[ids] = _ABSENT

    def check_integrity(self) -> None:
        held = np.flatnonzero(self._stamps != _ABSENT)
        assert len(held) == self._count, f"{len(held)} stamps for {self._count} chunks"
        batch, noted = self._batch[self._cursor :], self._noted[self._cursor :]
        assert (np.diff(noted) >= 0).all(), "the batch is out of order"
        live = batch[self._stamps[batch] == noted]
        below = held[self._stamps[held] <= self._horizon]
        assert set(below.tolist()) <= {*live.tolist(), *self._late.tolist()}, (
            "an old chunk is not in the batch"
        )
        assert self._late.size or len(set(live.tolist())) == len(live), "a chunk is twice in the batch"

    def _forget_batch(self) -> None:
        self._batch, self._noted, self._late = NO_IDS, NO_IDS, NO_IDS
        self._cursor, self._horizon = 0, -1

    def _batch_size(self) -> int:
        return max(_BATCH_MIN, self._count // _BATCH_SHARE)

    def _stamp(self, ids: Ids, stamps: npt.NDArray[np.int64]) -> None:
        self._stamps[ids] = stamps
        late = ids[stamps <= self._horizon]
        if late.size:
            self._late = np.concatenate((self._late, late))
            if len(self._late) > self._batch_size():
                self._forget_batch()  # A new batch costs less than merging so many.

    def _merge_late(self) -> None:
        """Put the chunks that were stamped below the horizon in their places in the batch."""
        late, self._late = np.unique(self._late), NO_IDS
        stamps = self._stamps[late]
        # Hidden for a moment, so that entries of the same chunks under the same stamps count as dropped:
        # they stay behind when a chunk is removed and comes back in one epoch.
        self._stamps[late] = _ABSENT
        live = self._stamps[self._batch] == self._noted
        live[: self._cursor] = False
        self._stamps[late] = stamps
        below = np.flatnonzero(stamps <= self._horizon)
        below = below[np.argsort(stamps[below], kind="stable")]
        noted = self._noted[live]
        places = np.searchsorted(noted, stamps[below])
        self._batch = np.insert(self._batch[live], places, late[below])
        self._noted = np.insert(noted, places, stamps[below])
        self._cursor = 0

    def _oldest(self, window: int) -> Ids:
        """Return the live entries among the batch's next `window`, which moves past the dead ones."""
        stop = min(self._cursor + window, len(self._batch))
        batch, noted = self._batch[self._cursor : stop], self._noted[self._cursor : stop]
        live = self._stamps[batch] == noted
        # Closing up towards the end, not the front, costs only the window.
        start = stop - int(np.count_nonzero(live))
        if start != self._cursor:
            self._batch[start:stop], self._noted[start:stop] = batch[live], noted[live]
            self._cursor = start
        return self._batch[start:stop]

    def _extend(self, missing: int, evictable: Flags) -> bool:
        """Append the next oldest chunks to the batch; False if too few evictable ones are left."""
        beyond = (self._stamps > self._horizon) & (self._stamps != _ABSENT)
        if np.count_nonzero(beyond[: len(evictable)] & evictable[: len(beyond)]) < missing:
            return False
        # Doubling bounds the scans of one call where nearly everything is leased.
        limit = self._limit(max(self._batch_size(), len(self._batch) - self._cursor))
        ids = np.flatnonzero(beyond & (self._stamps <= limit))
        stamps = self._stamps[ids]
        order = np.argsort(stamps, kind="stable")
        self._batch = np.concatenate((self._batch[self._cursor :], ids[order]))
        self._noted = np.concatenate((self._noted[self._cursor :], stamps[order]))
        self._cursor, self._horizon = 0, int(self._noted[-1])
        return True

    def _limit(self, size: int) -> int:
        """Return a stamp that about `size` chunks beyond the horizon, and at least one, do not pass."""
        # Sorting out a sample instead of all takes a third of the time, and the size need not be exact.
        # The stride is odd, to be out of step with ids handed out by powers of two.
        stride = len(self._stamps) // _SAMPLE | 1
        sample = self._stamps[::stride]
        sample = sample[(sample > self._horizon) & (sample != _ABSENT)]
        rank = size // stride
        return int(np.partition(sample, rank)[rank]) if rank < len(sample) else _ABSENT - 1


def _stamps_of(count: int, epoch: int, first: int) -> npt.NDArray[np.int64]:
    newest = (epoch << _POSITION_BITS) + _LAST_POSITION - first
    stamps = np.arange(newest, newest - count, -1)
    if first + count > _LAST_POSITION:
        np.maximum(stamps, epoch << _POSITION_BITS, out=stamps)
    return stamps
