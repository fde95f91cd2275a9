"""What is asked of the tiers, what is fetched, what waits, and that the books balance meanwhile."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvkeep.identity import group_keys
from kvkeep.keeper.fetch import Batch, Fetch, Fetches, Stage
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.policy import POLICIES
from kvkeep.terms import GroupSpec
from tests.keeper.test_keeper import PAGE, SLABS, SLOTS, SMALL, chain_keys, opened, save

FULL = [GroupSpec(PAGE, None)]
HYBRID = [GroupSpec(PAGE, None), GroupSpec(PAGE, 3), GroupSpec(2 * PAGE, 2)]


class Below:
    """Tiers of the model: which positions of which groups each has. Answers what a fetch asks."""

    def __init__(self, space: Namespace, chain: int, length: int, *tiers: list[set[int]]) -> None:
        self.names = {}
        self.asked = 0
        for group in range(len(space.groups)):
            keys = group_keys(chain_keys(chain, length), space.fingerprint, group)
            for position, key in enumerate(keys):
                self.names[space.fingerprint[:8] + key.tobytes()] = (group, position)
        self.tiers = tiers

    def determine(self, fetch: Fetch) -> int:
        """Answer all questions; returns how many there were."""
        rounds = 0
        while keys := fetch.question():
            rounds += 1
            self.asked += len(keys)
            fetch.answer([self.tier_of(*self.names[key]) for key in keys])
            assert rounds < 20
        return rounds

    def tier_of(self, group: int, position: int) -> int:
        return next((number for number, held in enumerate(self.tiers) if position in held[group]), -1)


class Bench:
    def __init__(self, groups: list[GroupSpec], memory: int = SMALL, policy: str = "lru") -> None:
        self.keeper = Keeper(memory, policy)
        self.keeper.attach("s")
        self.keeper.attach("t")
        self.space = opened(self.keeper, "one", groups)
        self.fetches = Fetches(self.keeper)
        self.needs: dict[int, int] = {}

    def begin(self, chain: int, length: int, session: str = "s", first: int = 0) -> Fetch:
        keys = chain_keys(chain, length)
        found = self.keeper.lookup(session, self.space, keys, first)
        return self.fetches.begin(session, self.space, keys, first, found.epoch)

    def plan(self, fetch: Fetch, worth: bool = True) -> list[Batch]:
        def judge(needs, chunks):
            self.needs = needs
            return worth

        batches = self.fetches.plan(fetch, judge)
        self.fetches.started(fetch)
        return batches

    def land(self, *batches: Batch, bad: tuple[int, ...] = ()) -> None:
        for batch in batches:
            good = np.ones(len(batch.records), np.bool_)
            good[list(bad)] = False
            self.fetches.landed(batch, good)
            self.keeper.check_integrity()

    def settle(self, fetch: Fetch, chain: int, length: int, first: int = 0) -> int:
        """The request's last lookup; returns the run that it got. What came from where is in `given`."""
        assert self.fetches.forget(fetch.session, fetch.ticket) is fetch
        assert self.fetches.forget(fetch.session, fetch.ticket) is None
        found = self.keeper.lookup(
            fetch.session, self.space, chain_keys(chain, length), first, epoch=fetch.epoch
        )
        assert found.epoch == fetch.epoch, "one request, one place in time"
        self.given = fetch.given(found)
        self.keeper.check_integrity()
        if found.lease:
            self.keeper.release(fetch.session, found.lease, None)
        return found.chunks


def everything(groups: list[GroupSpec], length: int) -> list[set[int]]:
    return [set(range(length)) for _ in groups]


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
def test_what_a_tier_has_is_fetched_and_found(groups) -> None:
    bench = Bench(groups)
    fetch = bench.begin(0, 10)
    assert fetch.held == 0
    Below(bench.space, 0, 10, everything(groups, 10)).determine(fetch)
    assert fetch.usable() == 10
    batches = bench.plan(fetch)
    assert fetch.stage is Stage.LOADING
    wanted = sum(10 if group.window_chunks is None else group.window_chunks for group in groups)
    assert sum(len(batch.moves) for batch in batches) == wanted
    bench.land(*batches)
    assert bench.fetches.stage("s", fetch.ticket) is Stage.DONE
    assert bench.settle(fetch, 0, 10) == 10
    assert len(bench.fetches) == 0


def test_a_miss_is_one_small_question_and_no_batch() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 500)
    below = Below(bench.space, 0, 500, [set()])
    assert below.determine(fetch) == 1
    assert below.asked == 16
    assert bench.plan(fetch) == []
    assert fetch.stage is Stage.DONE


def test_questions_grow_and_stop_at_the_first_hole() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 2000)
    below = Below(bench.space, 0, 2000, [set(range(2000)) - {700}])
    assert below.determine(fetch) == 4
    assert below.asked == 16 + 64 + 256 + 1024
    assert fetch.usable() == 700


def test_a_window_needs_only_its_last_chunks_or_an_earlier_end() -> None:
    bench = Bench(HYBRID)
    fetch = bench.begin(0, 50)
    below = Below(bench.space, 0, 50, [set(range(50)), set(range(47, 50)), set(range(48, 50))])
    below.determine(fetch)
    assert fetch.usable() == 50
    assert below.asked == 50 + 3 + 2
    fetch = bench.begin(2, 50)
    Below(bench.space, 2, 50, [set(range(50)), set(range(31)), set(range(40))]).determine(fetch)
    assert fetch.usable() == 31
    batches = bench.plan(fetch)
    assert sum(len(batch.moves) for batch in batches) == 31 + 3 + 2


def test_memory_and_two_tiers_add_up() -> None:
    bench = Bench(FULL)
    save(bench.keeper, bench.space, chain_keys(0, 4))
    fetch = bench.begin(0, 12)
    assert fetch.held == 4
    Below(bench.space, 0, 12, [{4, 5, 8}], [{5, 6, 7, 9, 11}]).determine(fetch)
    assert fetch.usable() == 10
    batches = bench.plan(fetch)
    assert sorted((batch.tier, len(batch.moves)) for batch in batches) == [(0, 3), (1, 3)]
    assert bench.needs == {0: 3 * PAGE, 1: 3 * PAGE}
    bench.land(*batches)
    assert bench.settle(fetch, 0, 12) == 10


def test_what_is_not_worth_it_is_not_read() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 10)
    Below(bench.space, 0, 10, everything(FULL, 10)).determine(fetch)
    assert bench.plan(fetch, worth=False) == []
    assert bench.fetches.stage("s", fetch.ticket) is Stage.DONE
    bench.keeper.check_integrity()


def test_values_that_turn_out_bad_are_dropped_and_the_rest_kept() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 10)
    Below(bench.space, 0, 10, everything(FULL, 10)).determine(fetch)
    bench.land(*bench.plan(fetch), bad=(6,))
    assert bench.settle(fetch, 0, 10) == 6


def test_two_requests_for_one_document_read_it_once() -> None:
    bench = Bench(FULL)
    first = bench.begin(0, 10)
    below = Below(bench.space, 0, 10, everything(FULL, 10))
    below.determine(first)
    batches = bench.plan(first)
    asked = below.asked
    second = bench.begin(0, 10, "t")
    below.determine(second)
    assert below.asked == asked
    assert bench.plan(second) == []
    assert bench.fetches.stage("t", second.ticket) is Stage.LOADING
    bench.land(*batches)
    assert bench.fetches.stage("t", second.ticket) is Stage.DONE
    assert bench.settle(first, 0, 10) == 10
    # The second still has what landed pinned, whatever else comes.
    for chain in range(2, 4 * SLABS * SLOTS, 2):
        save(bench.keeper, bench.space, chain_keys(chain, 1))
    assert bench.settle(second, 0, 10) == 10


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_that_waited_has_used_each_chunk_once(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory had at its first lookup, what tiers brought, and what another engine saved meanwhile."""
    bench = Bench(FULL, policy=policy)
    save(bench.keeper, bench.space, chain_keys(0, 4), session="t")
    used = np.zeros(64, np.int64)
    touch = bench.keeper.policies[0].touch

    def counted(ids: np.ndarray, epoch: int, first: int) -> None:
        used[ids] += 1
        touch(ids, epoch, first)

    monkeypatch.setattr(bench.keeper.policies[0], "touch", counted)
    fetch = bench.begin(0, 12)
    assert fetch.held == 4
    Below(bench.space, 0, 12, [set(range(9))]).determine(fetch)
    bench.land(*bench.plan(fetch))
    chain = group_keys(chain_keys(0, 12), bench.space.fingerprint, 0)
    before = bench.keeper.reserve("t", bench.space, chain_keys(0, 12)[9 * 16 :], [[True] * 3], 9, 1)
    bench.keeper.commit("t", before.reservation, 0)
    assert bench.settle(fetch, 0, 12) == 12
    assert used[bench.keeper.chunks.table.find(chain)].tolist() == [1] * 4 + [0] * 5 + [1] * 3


def test_each_chunk_came_from_one_place() -> None:
    """In however many groups, for however many requests at a time, and not what came in another way."""
    groups = [GroupSpec(PAGE, None), GroupSpec(2 * PAGE, None)]
    bench = Bench(groups)
    save(bench.keeper, bench.space, chain_keys(0, 2))
    long = bench.begin(0, 12)
    below = [set(range(7)), set(range(7))], [set(range(10)), set(range(10))]
    Below(bench.space, 0, 12, *below).determine(long)
    batches = bench.plan(long)
    short = bench.begin(0, 4, session="t", first=1)
    Below(bench.space, 0, 4, *below).determine(short)
    assert bench.plan(short) == []
    bench.land(*batches)
    save(bench.keeper, bench.space, chain_keys(0, 12))  # 10 and 11 are nobody's: saved while it waits
    assert bench.settle(short, 0, 4, first=1) == 3
    assert bench.given == {0: 2}
    assert bench.settle(long, 0, 12) == 12
    assert bench.given == {0: 5, 1: 3}


def test_what_was_damaged_was_not_given() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 6)
    Below(bench.space, 0, 6, everything(FULL, 6)).determine(fetch)
    bench.land(*bench.plan(fetch), bad=(4,))
    assert bench.settle(fetch, 0, 6) == 4
    assert bench.given == {0: 4}


def test_what_landed_for_a_request_stays_until_it_comes() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 10)
    Below(bench.space, 0, 10, everything(FULL, 10)).determine(fetch)
    bench.land(*bench.plan(fetch))
    for chain in range(2, 4 * SLABS * SLOTS, 2):
        save(bench.keeper, bench.space, chain_keys(chain, 1))
    bench.fetches.forget("t", fetch.ticket)  # another session's ticket is not ours to end
    assert bench.settle(fetch, 0, 10) == 10
    assert bench.fetches.stage("s", fetch.ticket) is Stage.DONE


def test_a_session_that_ends_in_the_middle_leaves_nothing_behind() -> None:
    bench = Bench(FULL)
    fetch = bench.begin(0, 10)
    Below(bench.space, 0, 10, everything(FULL, 10)).determine(fetch)
    batches = bench.plan(fetch)
    bench.keeper.detach("s")
    assert bench.fetches.session_ended("s") == [fetch.ticket]
    bench.keeper.check_integrity()
    bench.land(*batches)
    assert len(bench.fetches) == 0
    assert not bench.keeper.chunks.leases.any()


def test_what_is_fetched_behind_what_the_engine_has_goes_before_it() -> None:
    """A chain's tail goes first: its place counts from the prompt's beginning, not from what was missing."""
    bench = Bench(FULL)
    fetch = bench.begin(0, 10, first=4)
    Below(bench.space, 0, 10, everything(FULL, 10)).determine(fetch)
    bench.land(*bench.plan(fetch))
    records = bench.keeper.chunks.table.find(group_keys(chain_keys(0, 10), bench.space.fingerprint, 0))
    assert (records[:4] < 0).all()
    assert bench.keeper.chunks.position[records[4:]].tolist() == list(range(4, 10))


def test_a_prompt_larger_than_memory_gets_its_head() -> None:
    bench = Bench(FULL)
    slots = SLABS * SLOTS
    fetch = bench.begin(0, 2 * slots)
    Below(bench.space, 0, 2 * slots, everything(FULL, 2 * slots)).determine(fetch)
    bench.land(*bench.plan(fetch))
    assert bench.settle(fetch, 0, 2 * slots) == slots


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
def test_a_tier_that_hangs_leaves_half_of_memory_to_engines(groups: list[GroupSpec]) -> None:
    """However many prompts wait for it: what it was given is neither evicted nor written to."""
    bench = Bench(groups)
    arena = bench.keeper.arena.nbytes
    batches = list[Batch]()
    for chain in range(10):
        fetch = bench.begin(chain, 20)
        Below(bench.space, chain, 20, everything(groups, 20)).determine(fetch)
        batches += bench.plan(fetch)
        assert sum(batch.nbytes for batch in batches) <= arena // 2
    assert batches
    bench.keeper.check_integrity()
    bench.land(*batches)
    fetch = bench.begin(11, 20)
    Below(bench.space, 11, 20, everything(groups, 20)).determine(fetch)
    assert bench.plan(fetch), "what has landed makes room again"


def test_a_chunk_that_an_engine_is_writing_is_neither_read_nor_waited_for() -> None:
    bench = Bench(FULL)
    epoch = bench.keeper.lookup("t", bench.space, chain_keys(0, 10)).epoch
    writing = bench.keeper.reserve("t", bench.space, chain_keys(0, 3), [[True] * 3], 0, epoch)
    fetch = bench.begin(0, 10)
    Below(bench.space, 0, 10, everything(FULL, 10)).determine(fetch)
    batches = bench.plan(fetch)
    assert sum(len(batch.moves) for batch in batches) == 7
    bench.land(*batches)
    assert fetch.stage is Stage.DONE
    bench.keeper.commit("t", writing.reservation, 0)
    assert bench.settle(fetch, 0, 10) == 10


@pytest.mark.parametrize("seed", range(20))
def test_random_lives_keep_the_books(seed: int) -> None:
    source = random.Random(seed)
    bench = Bench(HYBRID if seed % 2 else FULL)
    open_, flying = [], []
    for _ in range(150):
        act = source.random()
        chain, length = source.randrange(0, 12), source.randrange(1, 25)
        if act < 0.35:
            fetch = bench.begin(chain, length, source.choice("st"), source.randrange(length))
            below = Below(
                bench.space,
                chain,
                length,
                *([set(source.sample(range(length), length // 2)) for _ in bench.space.groups] for _ in "ab"),
                everything(bench.space.groups, source.randrange(length + 1)),
            )
            below.determine(fetch)
            flying += bench.plan(fetch, source.random() < 0.9)
            open_.append(fetch)
        elif act < 0.6 and flying:
            batch = flying.pop(source.randrange(len(flying)))
            bench.land(batch, bad=tuple(i for i in range(len(batch.records)) if source.random() < 0.1))
        elif act < 0.8 and open_:
            fetch = open_.pop(source.randrange(len(open_)))
            bench.fetches.forget(fetch.session, fetch.ticket)
        elif act < 0.95:
            save(bench.keeper, bench.space, chain_keys(chain, length))
        else:
            bench.keeper.clear(None)
        bench.keeper.check_integrity()
    bench.land(*flying)
    for fetch in open_:
        bench.fetches.forget(fetch.session, fetch.ticket)
    assert len(bench.fetches) == 0
    bench.keeper.detach("s")
    bench.keeper.detach("t")
    bench.keeper.check_integrity()
    assert not bench.keeper.chunks.leases.any()
