"""Every policy keeps its contract under any sequence of operations; LRU is exact."""

from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.keeper.policy import DEFAULT_POLICY, POLICIES, Policy, lru, make_policy
from kvkeep.keeper.policy.base import Flags, Ids

RECORDS = 40


def ids_of(chunks: list[int]) -> Ids:
    return np.array(chunks, dtype=np.int64)


def all_evictable(records: int = RECORDS) -> Flags:
    return np.ones(records, dtype=np.bool_)


class PolicyMachine(RuleBasedStateMachine):
    """Drives one policy as the keeper would, and worse: any epochs, any pieces, any leases."""

    policy_name: ClassVar[str]

    @initialize(capacity=st.integers(1, 30))
    def start(self, capacity: int) -> None:
        self.policy = make_policy(self.policy_name, capacity)
        self.keys: dict[int, int] = {}
        self.stamps: dict[int, tuple[int, int]] = {}

    @rule(data=st.data(), epoch=st.integers(0, 12), first=st.integers(0, 6))
    def insert(self, data: st.DataObject, epoch: int, first: int) -> None:
        free = [chunk for chunk in range(RECORDS) if chunk not in self.keys]
        chunks = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=8)) if free else []
        fresh = [key for key in range(80) if key not in self.keys.values()]
        keys = data.draw(st.permutations(fresh))[: len(chunks)]
        self.policy.insert(ids_of(chunks), keys, epoch, first)
        self.keys.update(zip(chunks, keys, strict=True))
        self.stamps.update((chunk, (epoch, -first - depth)) for depth, chunk in enumerate(chunks))

    @rule(data=st.data(), epoch=st.integers(0, 12), first=st.integers(0, 6), times=st.integers(1, 3))
    def touch(self, data: st.DataObject, epoch: int, first: int, times: int) -> None:
        chunks = self.some_held(data)
        for _ in range(times):
            self.policy.touch(ids_of(chunks), epoch, first)
        for depth, chunk in enumerate(chunks):
            self.stamps[chunk] = max(self.stamps[chunk], (epoch, -first - depth))

    @rule(data=st.data(), count=st.integers(0, 12), take=st.booleans())
    def evict(self, data: st.DataObject, count: int, take: bool) -> None:
        evictable = all_evictable()
        evictable[self.some_held(data)] = False
        victims = self.policy.victims(count, evictable).tolist()
        candidates = [chunk for chunk in self.keys if evictable[chunk]]
        assert len(victims) == (count if count <= len(candidates) else 0)
        assert len(set(victims)) == len(victims)
        assert set(victims) <= set(candidates)
        assert self.policy.victims(count, evictable).tolist() == victims, "asking changed something"
        self.judge(victims, candidates)
        if take:
            self.policy.remove(ids_of(victims), evicted=True)
            self.forget(victims)

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        chunks = self.some_held(data)
        self.policy.remove(ids_of(chunks), evicted=False)
        self.forget(chunks)

    @precondition(lambda self: hasattr(self, "policy"))
    @invariant()
    def books_balance(self) -> None:
        self.policy.check_integrity()
        assert len(self.policy) == len(self.keys)

    def judge(self, victims: list[int], candidates: list[int]) -> None:
        """Whether these are the right victims; only an exact model can say."""

    def some_held(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.keys)), unique=True)) if self.keys else []

    def forget(self, chunks: list[int]) -> None:
        for chunk in chunks:
            del self.keys[chunk], self.stamps[chunk]


class LruMachine(PolicyMachine):
    """Batches of a few chunks, so that every way through them is taken."""

    policy_name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.small = mock.patch.multiple(lru, _BATCH_MIN=3, _SAMPLE=10)
        self.small.start()

    def teardown(self) -> None:
        self.small.stop()

    def judge(self, victims: list[int], candidates: list[int]) -> None:
        stamps = sorted(self.stamps[chunk] for chunk in candidates)
        assert [self.stamps[chunk] for chunk in victims] == stamps[: len(victims)]


class ArcMachine(PolicyMachine):
    policy_name = "arc"


class S3FifoMachine(PolicyMachine):
    policy_name = "s3fifo"


_SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLru = LruMachine.TestCase
TestArc = ArcMachine.TestCase
TestS3Fifo = S3FifoMachine.TestCase
TestLru.settings = TestArc.settings = TestS3Fifo.settings = _SETTINGS


def test_lru_is_exact_over_many_batches() -> None:
    random, size = np.random.default_rng(7), 6000
    policy, stamps = make_policy("lru", size), np.full(size + 64, -1)
    for step in range(600):
        epoch = max(0, step - int(random.integers(0, 40)))
        free = np.flatnonzero(stamps < 0)
        piece = random.permutation(free)[: int(random.integers(1, 64))]
        policy.insert(piece, [0] * len(piece), epoch, 0)
        stamps[piece] = (epoch + 1 << 20) - np.arange(len(piece))
        again = random.permutation(np.flatnonzero(stamps >= 0))[:32]
        policy.touch(again, epoch, 0)
        stamps[again] = np.maximum(stamps[again], (epoch + 1 << 20) - np.arange(len(again)))
        evictable = random.random(len(stamps)) < (0.02 if step % 50 == 0 else 0.9)
        candidates = np.sort(stamps[evictable & (stamps >= 0)])
        victims = policy.victims(min(40, len(candidates)), evictable)
        assert stamps[victims].tolist() == candidates[: len(victims)].tolist()
        policy.remove(victims, evicted=True)
        stamps[victims] = -1
    policy.check_integrity()


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param, 4)


def test_a_long_prompt_does_not_evict_its_own_head(policy: Policy) -> None:
    policy.insert(np.arange(10), list(range(10)), 0, 0)
    assert sorted(policy.victims(6, all_evictable()).tolist()) == [4, 5, 6, 7, 8, 9]


def test_all_or_nothing(policy: Policy) -> None:
    policy.insert(np.arange(4), list(range(4)), 0, 0)
    evictable = all_evictable()
    evictable[1] = False
    assert policy.victims(4, evictable).tolist() == []
    assert sorted(policy.victims(3, evictable).tolist()) == [0, 2, 3]


@pytest.mark.parametrize("name", ["arc", "s3fifo"])
@pytest.mark.parametrize("evicted", [True, False])
def test_what_was_evicted_and_comes_back_outlives_a_scan(name: str, evicted: bool) -> None:
    policy = make_policy(name, 4)
    policy.insert(np.arange(4), [0, 1, 2, 3], 0, 0)
    for epoch in (1, 2):
        policy.touch(ids_of([2, 3]), epoch, 2)
    policy.insert(ids_of([4]), [4], 3, 0)
    assert policy.victims(1, all_evictable()).tolist() == [1]
    policy.remove(ids_of([1]), evicted=evicted)
    policy.insert(ids_of([5]), [1], 4, 0)
    for scanned in range(10, 30):
        policy.insert(ids_of([scanned]), [scanned], scanned, 0)
        victims = policy.victims(len(policy) - policy.capacity, all_evictable())
        policy.remove(victims, evicted=False)
        if 5 in victims.tolist():
            assert not evicted
            return
    assert evicted


def test_arc_makes_room_for_recent_chunks_when_they_come_back() -> None:
    policy = make_policy("arc", 4)
    policy.insert(np.arange(4), [0, 1, 2, 3], 0, 0)
    policy.touch(ids_of([0, 1]), 1, 0)
    for chunk, key, victim in [(4, 4, 3), (5, 3, 2)]:
        policy.insert(ids_of([chunk]), [key], chunk, 0)
        assert policy.victims(1, all_evictable()).tolist() == [victim]
        policy.remove(ids_of([victim]), evicted=True)
    # The second ghost to come back: room for two recent chunks is now meant, and only one is held.
    policy.insert(ids_of([6]), [2], 6, 0)
    assert policy.victims(1, all_evictable()).tolist() == [1]


def arc_full_of_frequent_chunks() -> Policy:
    """Eight chunks that were all used again, so the target is 0: no room is meant for newcomers."""
    policy = make_policy("arc", 8)
    policy.insert(np.arange(8), list(range(8)), 0, 0)
    policy.touch(np.arange(8), 1, 0)
    return policy


def test_arc_admits_newcomers_where_all_was_used_again() -> None:
    policy = arc_full_of_frequent_chunks()
    policy.insert(ids_of([10, 11]), [10, 11], 2, 0)
    assert policy.victims(2, all_evictable()).tolist() == [7, 6]
    policy.remove(ids_of([7, 6]), evicted=True)
    # The next request's come instead of the last one's, which is over the target.
    policy.insert(ids_of([12]), [12], 3, 0)
    assert policy.victims(1, all_evictable()).tolist() == [11]


def test_arc_refuses_newcomers_where_nothing_else_can_go() -> None:
    policy, evictable = arc_full_of_frequent_chunks(), all_evictable()
    evictable[[0, 1, 2, 3, 4, 5]] = False
    policy.insert(ids_of([10, 11, 12]), [10, 11, 12], 2, 0)
    assert policy.victims(3, evictable).tolist() == [7, 6, 12]


@pytest.mark.parametrize("forward", [True, False])
def test_arc_gives_up_a_prompt_s_tail_first_however_it_came(forward: bool) -> None:
    policy = make_policy("arc", 4)
    for first in (0, 2, 4) if forward else (4, 2, 0):
        policy.insert(ids_of([first, first + 1]), [first, first + 1], 7, first)
    assert policy.victims(2, all_evictable()).tolist() == [5, 4]
    policy.insert(ids_of([9]), [9], 8, 0)
    assert policy.victims(3, all_evictable()).tolist() == [5, 4, 3]


def test_s3fifo_turns_its_main_queue() -> None:
    policy = make_policy("s3fifo", 10)
    policy.insert(np.arange(4), [0, 1, 2, 3], 0, 0)
    for epoch in (1, 2):
        policy.touch(np.arange(4), epoch, 0)
    policy.insert(ids_of([4]), [4], 3, 0)
    assert policy.victims(1, all_evictable()).tolist() == [4]
    policy.remove(ids_of([4]), evicted=True)
    policy.touch(ids_of([3]), 4, 3)
    evictable = all_evictable()
    evictable[2] = False
    assert policy.victims(2, evictable).tolist() == [1, 0]
    assert policy.victims(4, all_evictable()).tolist() == [2, 1, 0, 3]
    policy.remove(ids_of([2, 1]), evicted=True)
    assert policy.victims(2, all_evictable()).tolist() == [0, 3]


def test_positions_past_the_stamp_are_the_oldest_of_their_epoch_only() -> None:
    policy = make_policy("lru", 4)
    policy.insert(ids_of([0, 1]), [0, 1], 5, 0)
    policy.insert(ids_of([2, 3]), [2, 3], 5, 2**20 - 1)
    policy.insert(ids_of([4]), [4], 4, 0)
    assert policy.victims(1, all_evictable()).tolist() == [4]
    assert sorted(policy.victims(3, all_evictable()).tolist()) == [2, 3, 4]


def test_names() -> None:
    assert DEFAULT_POLICY in POLICIES
    assert list(POLICIES) == ["lru", "arc", "s3fifo"]
    with pytest.raises(ValueError, match="'clock'; the known ones are lru, arc, s3fifo"):
        make_policy("clock", 4)


def test_no_policy_without_room(policy: Policy) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_policy(policy.name, 0)
