"""S3-FIFO: three first-in first-out queues."""

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvkeep.keeper.policy.base import NO_IDS, Flags, Ids, Policy, grown

_SMALL_SHARE = 0.1
_USES_MAX = 3
_USES_TO_PROMOTE = 2


class S3FifoPolicy(Policy):
    """Filters chunks that are not used again through a small queue, and keeps the rest in a main one.

    A newcomer enters `small` (a tenth of the room), or `main` if its key is among the `ghosts` of
    chunks lately evicted from `small`. A use only counts, up to 3. The oldest of `small` moves to
    `main` if it was used twice or more, and is evicted otherwise; the oldest of `main` goes to its
    end with one use less, and is evicted once it has none. `victims` works these moves out, and
    `remove` makes them, so that asking changes nothing.

    State is Python objects: about 175 bytes a chunk, and up to 300 more for ghosts.

    Source: J. Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.
    """

    name = "s3fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small: OrderedDict[int, int] = OrderedDict()  # id -> key, the oldest first
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()  # keys
        self._uses: npt.NDArray[np.uint8] = np.zeros(1024, dtype=np.uint8)
        self._moves: list[int] = []  # to the end of main, in this order, at the next eviction
        self._uses_after: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def insert(self, ids: Ids, keys: list[int], epoch: int, first: int) -> None:
        self._forget_moves()
        self._uses = grown(self._uses, ids, 0)
        self._uses[ids] = 0
        # Tail to head, so that the tail is the first to go.
        for chunk, key in zip(reversed(ids.tolist()), reversed(keys), strict=True):
            if key in self._ghosts:
                del self._ghosts[key]
                self._main[chunk] = key
            else:
                self._small[chunk] = key

    def touch(self, ids: Ids, epoch: int, first: int) -> None:
        self._forget_moves()
        self._uses[ids] = np.minimum(self._uses[ids] + 1, _USES_MAX)

    def victims(self, count: int, evictable: Flags) -> Ids:
        self._forget_moves()
        small = (chunk for chunk in self._small if evictable[chunk])
        main = _then(iter(self._main), self._moves)
        left, chosen = len(self._small), list[int]()
        while len(chosen) < count:
            chunk = next(small, None) if left >= _SMALL_SHARE * self.capacity else None
            if chunk is None:
                victim = self._next_of_main(main, evictable)
                chunk = next(small, None) if victim is None else None
                if victim is None and chunk is None:
                    self._forget_moves()
                    return NO_IDS.copy()
                if victim is not None:
                    chosen.append(victim)
            if chunk is not None:
                left -= 1
                if self._uses[chunk] >= _USES_TO_PROMOTE:
                    self._moves.append(chunk)
                    self._uses_after[chunk] = 0
                else:
                    chosen.append(chunk)
        return np.array(chosen, dtype=np.int64)

    def remove(self, ids: Ids, evicted: bool) -> None:
        if evicted:
            self._make_moves()
        self._forget_moves()
        for chunk in ids.tolist():
            key = self._small.pop(chunk, None)
            if key is None:
                del self._main[chunk]
            elif evicted:
                self._ghosts[key] = None
        self._trim_ghosts()

    def check_integrity(self) -> None:
        assert not self._small.keys() & self._main.keys(), "a chunk is in both queues"
        held = {*self._small.values(), *self._main.values()}
        assert not self._ghosts.keys() & held, "a chunk is held and a ghost"
        assert len(self._ghosts) <= self.capacity, "too many ghosts"
        assert int(self._uses.max()) <= _USES_MAX, "a use count is out of bounds"
        assert self._uses_after.keys() == set(self._moves), "the moves do not balance"

    def _next_of_main(self, main: Iterator[int | None], evictable: Flags) -> int | None:
        """Turn the main queue, in thought, until its oldest evictable chunk has no uses left."""
        for chunk in main:
            if chunk is None:
                return None
            if not evictable[chunk]:
                continue
            uses = self._uses_after.get(chunk)
            uses = int(self._uses[chunk]) if uses is None else uses
            if uses == 0:
                return chunk
            self._moves.append(chunk)
            self._uses_after[chunk] = uses - 1
        return None

    def _make_moves(self) -> None:
        for chunk in self._moves:
            key = self._small.pop(chunk, None)
            self._main[chunk] = self._main.pop(chunk) if key is None else key
        self._uses[list(self._uses_after)] = list(self._uses_after.values())

    def _forget_moves(self) -> None:
        self._moves.clear()
        self._uses_after.clear()

    def _trim_ghosts(self) -> None:
        while len(self._ghosts) > (1 - _SMALL_SHARE) * self.capacity:
            self._ghosts.popitem(last=False)


def _then(queue: Iterator[int], moves: list[int]) -> Iterator[int | None]:
    """Yield the queue, then what was moved to its end, and None for as long as there is no more."""
    yield from queue
    done = 0
    while True:
        if done == len(moves):
            yield None  # For now: the caller may move more.
        else:
            yield moves[done]
            done += 1
