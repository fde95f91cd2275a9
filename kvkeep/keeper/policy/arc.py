"""Adaptive replacement cache."""

from collections import OrderedDict
from itertools import chain

import numpy as np

from kvkeep.keeper.policy.base import NO_IDS, Flags, Ids, Policy


class ArcPolicy(Policy):
    """Keeps chunks seen once apart from chunks seen again, and learns how to share the room.

    Two LRU lists of chunks (`recent`: T1, `frequent`: T2), and for each the keys of what was lately
    evicted from it (`ghosts`: B1, B2). A key that comes back while in a ghost list moves `target`,
    the room meant for T1, towards that list. Differences from the paper: eviction is a step of its
    own, after the insertion and for many chunks at once, so ghost lists are trimmed at `remove`;
    chunks that are not evictable are passed over. And where T1 is over its target only by what the
    newest request brought (`newest`), T2 gives first: the paper evicts before it inserts, so a
    newcomer is never its own victim, and here one is only when nothing else can go. Otherwise newcomers
    could be refused for ever, with T2 full and a target of 0.

    State is Python objects: about 175 bytes a chunk, and up to 300 more for ghosts.

    Source: N. Megiddo, D. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.
    """

    name = "arc"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # T1 is `recent` (id -> key, the oldest first) and then `newest`, what the newest request has
        # brought so far, in chain order: it goes from its end.
        self._recent: OrderedDict[int, int] = OrderedDict()
        self._newest: dict[int, int] = {}
        self._newest_epoch, self._newest_first = -1, 0
        self._frequent: OrderedDict[int, int] = OrderedDict()
        self._recent_ghosts: OrderedDict[int, None] = OrderedDict()  # keys
        self._frequent_ghosts: OrderedDict[int, None] = OrderedDict()
        self._target = 0.0

    def __len__(self) -> int:
        return len(self._recent) + len(self._newest) + len(self._frequent)

    def insert(self, ids: Ids, keys: list[int], epoch: int, first: int) -> None:
        # Tail to head, here and below, so that the head ends most recent.
        pieces = list(zip(ids.tolist(), keys, strict=True))
        again = {chunk: key for chunk, key in reversed(pieces) if self._adapt(key)}
        piece = {chunk: key for chunk, key in pieces if chunk not in again}
        self._frequent.update(again)
        if epoch != self._newest_epoch:
            self._recent.update(reversed(self._newest.items()))
            self._newest, self._newest_epoch = piece, epoch
        elif first < self._newest_first:
            self._newest = piece | self._newest
        else:
            self._newest.update(piece)
        self._newest_first = first

    def touch(self, ids: Ids, epoch: int, first: int) -> None:
        for chunk in reversed(ids.tolist()):
            key = self._pop_recent(chunk)
            if key is None:
                self._frequent.move_to_end(chunk)
            else:
                self._frequent[chunk] = key

    def victims(self, count: int, evictable: Flags) -> Ids:
        older = (chunk for chunk in self._recent if evictable[chunk])
        newest = (chunk for chunk in reversed(self._newest) if evictable[chunk])
        otherwise = chain((chunk for chunk in self._frequent if evictable[chunk]), older, newest)
        left, chosen = len(self._recent) + len(self._newest), list[int]()
        while len(chosen) < count:
            victim = next(older, None) if left > self._target else None
            left -= victim is not None
            victim = next(otherwise, None) if victim is None else victim
            if victim is None:
                return NO_IDS.copy()
            chosen.append(victim)
        return np.array(chosen, dtype=np.int64)

    def remove(self, ids: Ids, evicted: bool) -> None:
        for chunk in ids.tolist():
            key = self._pop_recent(chunk)
            ghosts = self._frequent_ghosts if key is None else self._recent_ghosts
            key = self._frequent.pop(chunk) if key is None else key
            if evicted:
                ghosts[key] = None
        self._trim_ghosts()

    def check_integrity(self) -> None:
        lists = (self._recent, self._newest, self._frequent)
        held = {key for chunks in lists for key in chunks.values()}
        assert len({chunk for chunks in lists for chunk in chunks}) == len(self), "a chunk is in two lists"
        assert not self._recent_ghosts.keys() & self._frequent_ghosts.keys(), "a ghost is in both lists"
        ghosts = self._recent_ghosts.keys() | self._frequent_ghosts.keys()
        assert not ghosts & held, "a chunk is held and a ghost"
        assert 0 <= self._target <= self.capacity, "the target is out of bounds"
        assert len(self._recent_ghosts) <= self.capacity, "too many ghosts of recent chunks"
        assert len(ghosts) <= 2 * self.capacity, "too many ghosts"

    def _pop_recent(self, chunk: int) -> int | None:
        """Take a chunk out of T1; its key, or None if it is in T2."""
        key = self._recent.pop(chunk, None)
        return self._newest.pop(chunk, None) if key is None else key

    def _adapt(self, key: int) -> bool:
        """Move the target if `key` is a ghost, which it is no longer then; say whether it was."""
        recent, frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if key in self._recent_ghosts:
            self._target = min(self._target + max(1.0, frequent / recent), self.capacity)
            del self._recent_ghosts[key]
        elif key in self._frequent_ghosts:
            self._target = max(self._target - max(1.0, recent / frequent), 0.0)
            del self._frequent_ghosts[key]
        else:
            return False
        return True

    def _trim_ghosts(self) -> None:
        room = max(0, self.capacity - len(self._recent) - len(self._newest))
        while len(self._recent_ghosts) > room:
            self._recent_ghosts.popitem(last=False)
        room = max(0, 2 * self.capacity - len(self) - len(self._recent_ghosts))
        while len(self._frequent_ghosts) > room:
            self._frequent_ghosts.popitem(last=False)
