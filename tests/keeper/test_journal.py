"""What a client is told of comings and goings is what is held, however far it fell behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, rule

from kvkeep.identity import group_keys
from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.flush import FlushQueue
from kvkeep.keeper.journal import BELOW, MEMORY, Journal, states
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from tests.keeper.test_fetch import FULL, Below, Bench
from tests.keeper.test_keeper import ONE_GROUP, SMALL, KeeperMachine, chain_key, chain_keys, opened, save


class Client:
    """Follows one namespace as an engine does: changes in order, and where some are lost, by asking."""

    def __init__(self, journal: Journal, space: Namespace) -> None:
        self.journal, self.space = journal, space
        self.states: dict[bytes, int] = {}
        self.after = self.lost = 0

    def catch_up(self) -> None:
        told = self.journal.since(self.after, self.space)
        self.after = told.last
        for key, state in zip(told.keys, told.states.tolist(), strict=True):
            self.states[key.tobytes()] = state
        if not told.complete:
            self.lost += 1
            keys = np.frombuffer(b"".join(self.states), "<u8").reshape(-1, 2)
            self.states = dict(zip(self.states, states(self.journal._chunks, keys).tolist(), strict=True))

    @property
    def held(self) -> set[bytes]:
        return {key for key, state in self.states.items() if state & MEMORY}


def readable(keeper: Keeper, space: Namespace) -> set[bytes]:
    records = keeper.chunks.in_state(ChunkState.COMMITTED)
    mine = records[keeper.chunks.namespace[records] == space.number]
    return {key.tobytes() for key in keeper.chunks.table.keys_of(mine)}


class JournalMachine(KeeperMachine):
    """All that can happen to a keeper, watched by one who keeps up and one who does not."""

    policy_name = "lru"

    @initialize()
    def start(self) -> None:
        super().start()
        self.keeper.journal = Journal(self.keeper.chunks, most=8)
        self.close = [Client(self.keeper.journal, space) for space in self.spaces]
        self.far = Client(self.keeper.journal, self.spaces[1])

    @rule()
    def look_again(self) -> None:
        self.far.catch_up()
        # It never takes for held what is not; what it has not heard of it may miss.
        assert self.far.held <= readable(self.keeper, self.far.space)

    @invariant()
    def what_was_told_is_so(self) -> None:
        for client in self.close:
            client.catch_up()
            assert client.held <= readable(self.keeper, client.space)
            if not client.lost:
                assert client.held == readable(self.keeper, client.space)


TestJournal = pytest.mark.timeout(120)(JournalMachine.TestCase)
TestJournal.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def watched() -> tuple[Keeper, Namespace, Client]:
    keeper = Keeper(SMALL, "lru")
    keeper.attach("s")
    space = opened(keeper, "one", ONE_GROUP)
    keeper.journal = Journal(keeper.chunks)
    return keeper, space, Client(keeper.journal, space)


def known(client: Client, keys: bytes) -> list[int]:
    """What a client knows of a chain's chunks; -1 where it heard nothing."""
    client.catch_up()
    named = group_keys(keys, client.space.fingerprint, 0)
    return [client.states.get(key.tobytes(), -1) for key in named]


def test_changes_are_told_in_their_order_and_once() -> None:
    keeper, space, client = watched()
    save(keeper, space, chain_keys(0, 3))
    assert known(client, chain_keys(0, 4)) == [MEMORY] * 3 + [-1]
    assert not len(keeper.journal.since(client.after, space).keys)
    keeper.clear(space)
    save(keeper, space, chain_key(0, 0))
    told = keeper.journal.since(client.after, space)
    assert told.states.tolist() == [0, 0, 0, MEMORY]
    assert known(client, chain_keys(0, 3)) == [MEMORY, 0, 0]


def test_a_namespace_hears_of_itself_only() -> None:
    keeper, _, client = watched()
    other = opened(keeper, "two", ONE_GROUP)
    save(keeper, other, chain_keys(0, 3))
    assert known(client, chain_keys(0, 3)) == [-1] * 3
    assert client.after == 3
    assert not client.lost


def test_a_number_of_another_keeper_is_not_taken_for_ours() -> None:
    keeper, space, _ = watched()
    assert not keeper.journal.since(1, space).complete


def test_what_was_written_to_a_tier_stays_there_when_memory_lets_go() -> None:
    keeper, space, client = watched()
    queue = FlushQueue(keeper, 0, through=True, second_touch=False)
    keeper.queues.append(queue)
    keeper.attach("~movers")
    save(keeper, space, chain_keys(0, 3))
    flush = queue.next(1 << 30)
    assert flush is not None
    keeper.clear(space)  # while they are being written
    queue.done(flush, np.array([True, True, False]), again=np.zeros(3, np.bool_))
    assert known(client, chain_keys(0, 3)) == [BELOW, BELOW, 0]
    save(keeper, space, chain_key(0, 2))
    assert known(client, chain_keys(0, 3)) == [BELOW, BELOW, MEMORY]


def test_tiers_tell_by_what_they_are_asked_and_give() -> None:
    """Found, absent, and one whose bytes were not those that were stored."""
    bench = Bench(FULL)
    bench.keeper.journal = Journal(bench.keeper.chunks)
    client = Client(bench.keeper.journal, bench.space)
    below = Below(bench.space, 0, 5, [set(range(4))])
    fetch = bench.begin(0, 5)
    while keys := fetch.question():
        found = [below.tier_of(*below.names[key]) for key in keys]
        bench.keeper.journal.probed(bench.space, keys, found)
        fetch.answer(found)
    assert known(client, chain_keys(0, 5)) == [BELOW] * 4 + [0]
    bench.land(*bench.plan(fetch), bad=(1,))
    assert known(client, chain_keys(0, 5)) == [BELOW | MEMORY, 0, BELOW | MEMORY, BELOW | MEMORY, 0]
