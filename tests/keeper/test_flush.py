"""What waits for a tier, without one: each chunk that is held and not below is in one batch, once."""

from __future__ import annotations

import numpy as np
import pytest

from kvkeep.keeper import flush as flush_module
from kvkeep.keeper.flush import MOVERS, Flush, FlushQueue
from kvkeep.keeper.keeper import Keeper
from kvkeep.terms import GroupSpec
from tests.keeper.test_keeper import PAGE, SLABS, SLOTS, SMALL, chain_keys, held, opened, save

ALL = 1 << 40


class Scene:
    def __init__(self, *, through: bool = True, memory: int = SMALL) -> None:
        self.keeper = Keeper(memory, "lru")
        self.keeper.attach("s")
        self.keeper.attach(MOVERS)
        self.space = opened(self.keeper, "one", [GroupSpec(PAGE, None)])
        self.queue = FlushQueue(self.keeper, 0, through=through, second_touch=not through)
        self.keeper.queues.append(self.queue)

    def save(self, chain: int, length: int, first: int = 0) -> None:
        save(self.keeper, self.space, chain_keys(chain, length, first), first)

    def use(self, chain: int, length: int) -> None:
        assert held(self.keeper, self.space, chain_keys(chain, length)) == length

    def next(self, most_bytes: int = ALL) -> Flush:
        flush = self.queue.next(most_bytes)
        assert flush is not None
        assert len(set(flush.records.tolist())) == len(flush.records)
        self.keeper.check_integrity()
        return flush

    def done(self, flush: Flush, stored: bool = True) -> None:
        which = np.full(len(flush.records), stored)
        self.queue.done(flush, which, again=~which)
        self.keeper.check_integrity()


@pytest.mark.parametrize("between", [0, 2000], ids=["one piece", "two pieces"])
def test_what_was_forgotten_and_saved_again_is_in_a_batch_once(between: int) -> None:
    """Else its slot would be freed twice where it is forgotten once more while it is written."""
    scene = Scene(memory=64 * SMALL)
    scene.save(0, 3)
    if between:
        scene.save(2, between)
    scene.keeper.clear(None)
    scene.save(0, 3)
    flush = scene.next()
    assert len(flush.records) == 3
    scene.keeper.clear(None)
    scene.done(flush)
    assert scene.queue.next(ALL) is None
    assert len(scene.queue) == 0


def test_what_is_used_while_its_batch_fails_is_tried_once_more_not_twice() -> None:
    scene = Scene(through=False)
    scene.save(0, 5)
    scene.use(0, 5)
    flush = scene.next()
    scene.use(0, 5)
    scene.done(flush, stored=False)
    flush = scene.next()
    assert len(flush.records) == 5
    scene.keeper.clear(None)
    scene.done(flush)
    assert len(scene.queue) == 0


def test_what_is_used_while_it_is_written_is_not_written_again() -> None:
    scene = Scene(through=False)
    scene.save(0, 5)
    scene.use(0, 5)
    flush = scene.next()
    scene.use(0, 5)
    scene.done(flush)
    assert scene.queue.next(ALL) is None
    assert scene.queue.lost == 0


def test_batches_are_in_order_and_of_the_size_that_was_asked_for() -> None:
    scene = Scene()
    for chunk in range(10):
        scene.save(0, 1, chunk)
    offsets = []
    for _ in range(5):
        flush = scene.next(2 * PAGE)
        assert len(flush.moves) == 2
        offsets += [move.offset for move in flush.moves]
        scene.done(flush)
    keys = chain_keys(0, 10)
    assert [scene.keeper.lookup("s", scene.space, keys).offsets[0].tolist()] == [offsets]


def test_one_call_goes_through_so_many_keys_of_chunks_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush_module, "_PIECE", 4)
    monkeypatch.setattr(flush_module, "_MOST_SOUGHT", 12)
    scene = Scene()
    for chunk in range(40):
        scene.save(0, 1, chunk)
    scene.keeper.clear(None)
    scene.save(2, 3)
    for left in (31, 19, 7):
        assert scene.queue.next(ALL) is None
        assert len(scene.queue) == left
    assert len(scene.next().records) == 3
    assert scene.queue.lost == 40


def test_single_commits_wait_in_few_pieces() -> None:
    scene = Scene(memory=64 * SMALL)
    for chunk in range(SLABS * SLOTS):
        scene.save(0, 1, chunk)
    assert len(scene.queue) == SLABS * SLOTS
    assert len(scene.queue._waiting) == 1
