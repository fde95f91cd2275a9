"""A trace through a model of the keeper: its policies as they are, its books at their least, and a disk.

What each step follows: a lookup, `Keeper.lookup`; a save, `Keeper.reserve`; a fetch, `Fetches.plan`; what is
written below and when, `FlushQueue`; how a directory makes room, `kvkeep.tiers.fs_space.Space`. Requests come
one after the other, and what is to be written below is there before the next one comes.
"""

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from kvbench.trace import Trace
from kvkeep.keeper.policy import Policy
from kvkeep.keeper.policy.base import NO_IDS, Flags, Ids

__all__ = ["Disk", "Replay", "Replayer"]

_R = TypeVar("_R")
_FAN_OUT = 256
_SAMPLE, _OLDEST = 256, 8  # as in kvkeep.tiers.fs_space


class Replay(NamedTuple):
    """What one replay counted, in blocks (but for `hit_tokens`); and the time spent in the policy, in ns."""

    hits: int
    hit_tokens: int
    """What the hits spare the engine: a prompt's last block may hold fewer tokens than the others."""
    disk_hits: int
    """Those of the hits that were read from disk."""
    saved: int
    disk_read: int
    disk_written: int
    policy_ns: int


class Disk:
    """A file-system tier with room for so many blocks: what it holds, and what it gives up."""

    def __init__(self, room: int, unique: int, second_touch: bool = False, seed: int = 0) -> None:
        """Start empty; blocks are 0 to `unique` - 1."""
        self.second_touch = second_touch
        self.holds = np.zeros(unique, np.bool_)
        self.written = 0
        self._room, self._now, self._count = room, 0, 0
        self._used_at = np.zeros(unique, np.int64)
        # Keys are hashes: which directory a block lies in is chance.
        rng = np.random.default_rng(seed)
        self._bucket_of: list[int] = rng.integers(0, _FAN_OUT, unique).tolist()
        self._buckets = [set[int]() for _ in range(_FAN_OUT)]
        self._turn = int(rng.integers(0, _FAN_OUT))
        self._victims: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return self._count

    def use(self, blocks: Ids) -> None:
        """Blocks that it holds have been read, or were written: of one batch, the first is the newest."""
        self._now += 1
        self._used_at[blocks] = (self._now << 32) - np.arange(len(blocks))

    def write(self, blocks: Ids) -> None:
        """Take those that it does not hold, as far as they fit, after making room for them."""
        new = blocks[~self.holds[blocks]][: self._room]
        while (short := self._count + len(new) - self._room) > 0:
            self._give_up(short)
        self.use(new)
        self.holds[new] = True
        self._count += len(new)
        self.written += len(new)
        for block in new.tolist():
            self._buckets[self._bucket_of[block]].add(block)

    def _give_up(self, count: int) -> None:
        if not self._victims:
            self._sample()
        for _ in range(min(count, len(self._victims))):
            used_at, block = self._victims.popleft()
            if self.holds[block] and self._used_at[block] == used_at:  # else it was used since
                self.holds[block] = False
                self._buckets[self._bucket_of[block]].discard(block)
                self._count -= 1

    def _sample(self) -> None:
        found = list[int]()
        for _ in range(_FAN_OUT):
            found += self._buckets[self._turn]
            self._turn = (self._turn + 1) % _FAN_OUT
            if len(found) >= _SAMPLE:
                break
        oldest = sorted(zip(self._used_at[found].tolist(), found, strict=True))
        self._victims.extend(oldest[: -(-len(oldest) // _OLDEST)])


class Replayer:
    """One keeper: which record holds which block, which records are free, what lies below."""

    def __init__(
        self, policy: Policy, trace: Trace, room: int, disk: Disk | None = None, worth: float = np.inf
    ) -> None:
        """Start empty, with `room` blocks of memory.

        `worth`: the most blocks that are read from disk for each one that need not be computed.
        """
        self._policy, self._room, self._disk, self._worth = policy, room, disk, worth
        # Newcomers need records before room is made for them, as in the keeper.
        records = room + max(map(len, trace.chains))
        self._record_of = np.full(trace.unique, -1, np.int64)
        self._block_of = np.full(records, -1, np.int64)
        self._free = np.arange(records)[::-1].copy()
        self._free_count = records
        self._evictable = np.ones(records, np.bool_)
        self._marked = np.zeros(records, np.bool_)
        self._stored = np.zeros(records, np.bool_)  # the keeper's belief: the disk may have dropped it since
        self._epoch = 0
        self._hits = self._hit_tokens = self._disk_hits = self._saved = self._disk_read = self._policy_ns = 0

    def run(self, trace: Trace, request_done: Callable[[], object] = lambda: None) -> Replay:
        """Replay all requests, one after the other."""
        requests = zip(trace.chains, trace.asked, trace.local, trace.lengths, strict=True)
        for chain, asked, local, length in requests:
            end = self._request(chain, asked, local)
            self._hit_tokens += min(length, end * trace.block_tokens) - min(
                length, local * trace.block_tokens
            )
            request_done()
        written = self._disk.written if self._disk is not None else 0
        found = (self._hits, self._hit_tokens, self._disk_hits, self._saved, self._disk_read)
        return Replay(*found, written, self._policy_ns)

    def _request(self, chain: Ids, asked: int, local: int) -> int:
        """Look up, fetch, save; returns where the hits end."""
        self._epoch += 1
        leased = self._look_up(chain, asked, local, 0, NO_IDS)
        end = local + len(leased)
        if self._disk is not None and end < asked:
            fetched = self._fetch(self._disk, chain[:asked], local, end)
            leased = self._look_up(chain, asked, local, end, fetched)
            end = local + len(leased)
            self._evictable[fetched] = True
            self._evictable[leased] = False
            self._disk_hits += int(self._among(fetched, leased).sum())
        self._hits += len(leased)
        self._save(chain, end if len(leased) else 0)
        self._evictable[leased] = True
        return end

    def _look_up(self, chain: Ids, asked: int, local: int, used: int, brought: Ids) -> Ids:
        """Use and lease what is held behind the engine's own blocks; returns those records. What the request
        has used before (its first `used` blocks) or brought is not used a second time."""
        records = self._record_of[chain[:asked]]
        end = local + _leading(records[local:] >= 0)
        places = np.flatnonzero(records[:end] >= 0)
        self._touch(records, places[(places >= used) & ~self._among(records[places], brought)])
        self._evictable[records[local:end]] = False
        return records[local:end]

    def _fetch(self, disk: Disk, chain: Ids, local: int, end: int) -> Ids:
        """Read what lengthens the run of hits, where that is worth it; returns its records, not evictable."""
        held = self._record_of[chain] >= 0
        usable = local + _leading((held | disk.holds[chain])[local:])
        places = np.flatnonzero(~held[:usable])
        places = places[places >= local]
        if usable <= end or len(places) > self._worth * (usable - end):
            return NO_IDS
        records = self._place(chain, places)
        records = records[records >= 0]
        self._evictable[records] = False
        self._stored[records] = True
        disk.use(self._block_of[records])
        self._disk_read += len(records)
        return records

    def _save(self, chain: Ids, first: int) -> None:
        """Offer all blocks from `first` on, the answer's too; what is held is used once more."""
        held = self._record_of[chain[first:]] >= 0
        self._touch(self._record_of[chain], first + np.flatnonzero(held))
        placed = self._place(chain, first + np.flatnonzero(~held))
        placed = placed[placed >= 0]
        self._saved += len(placed)
        if self._disk is not None and not self._disk.second_touch:
            self._write(self._disk, placed)

    def _touch(self, records: Ids, positions: Ids) -> None:
        """Note a use of `records[positions]`."""
        for first, stop in _runs(positions):
            self._timed(self._policy.touch, records[first:stop], self._epoch, first)
        if self._disk is not None and self._disk.second_touch:
            self._write(self._disk, records[positions])

    def _write(self, disk: Disk, records: Ids) -> None:
        new = records[~self._stored[records]]
        if len(new):
            self._stored[new] = True
            disk.write(self._block_of[new])

    def _place(self, chain: Ids, positions: Ids) -> Ids:
        """Records for blocks that are not held; -1 where nothing older could go."""
        if not len(positions):
            return NO_IDS
        records = self._take(chain[positions])
        at = 0
        for first, stop in _runs(positions):
            run = records[at : at + stop - first]
            self._timed(self._policy.insert, run, chain[first:stop].tolist(), self._epoch, first)
            at += stop - first
        short = len(self._policy) - self._room
        if short <= 0:
            return records
        victims = self._timed(self._policy.victims, short, self._evictable)
        # Leased blocks alone always fit, so there are victims enough.
        assert len(victims) == short, f"{self._policy.name} found no room"
        own = self._among(victims, records)
        self._drop(victims[~own], True)
        self._drop(victims[own], False)
        return np.where(self._block_of[records] >= 0, records, -1)

    def _drop(self, records: Ids, evicted: bool) -> None:
        if len(records):
            self._timed(self._policy.remove, records, evicted)
            self._record_of[self._block_of[records]] = -1
            self._block_of[records] = -1
            self._free[self._free_count : self._free_count + len(records)] = records
            self._free_count += len(records)

    def _take(self, blocks: Ids) -> Ids:
        self._free_count -= len(blocks)
        records: Ids = self._free[self._free_count : self._free_count + len(blocks)].copy()
        self._record_of[blocks] = records
        self._block_of[records] = blocks
        self._stored[records] = False
        return records

    def _among(self, records: Ids, others: Ids) -> Flags:
        """Which of the records are among the others; np.isin took a quarter of all time."""
        self._marked[others] = True
        flags: Flags = self._marked[records]
        self._marked[others] = False
        return flags

    def _timed(self, call: Callable[..., _R], *args: object) -> _R:
        start = time.perf_counter_ns()
        result = call(*args)
        self._policy_ns += time.perf_counter_ns() - start
        return result


def _leading(flags: Flags) -> int:
    """How many are set before the first one that is not."""
    return len(flags) if flags.all() else int(np.argmin(flags))


def _runs(positions: Ids) -> list[tuple[int, int]]:
    """First and stop of each run of positions that follow on each other."""
    if not len(positions):
        return []
    if positions[-1] - positions[0] + 1 == len(positions):  # as nearly always
        return [(int(positions[0]), int(positions[-1]) + 1)]
    cuts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return [(int(positions[start]), int(positions[stop - 1]) + 1) for start, stop in pairwise(cuts)]
