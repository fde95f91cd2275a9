"""Engines see what a keeper holds: never that something is absent which is there."""

import mmap
import operator
import os
import random

import numpy as np
import pytest

from kvkeep import pages
from kvkeep.identity import group_keys
from kvkeep.keeper.keeper import Keeper
from kvkeep.presence import Presence, PresenceView
from kvkeep.terms import GroupSpec

PRINT = bytes(range(32))


def keys(*numbers: int) -> np.ndarray:
    return np.array([[0, number] for number in numbers], np.uint64).reshape(-1, 2)


def test_what_is_held_is_not_absent() -> None:
    presence = Presence(1 << 30, tells=True)
    view = PresenceView(presence.fd)
    assert view.absent(keys(1, 2))
    presence.add(keys(2, 2, 3))
    assert view.absent(keys(1))
    assert not view.absent(keys(1, 2))
    presence.remove(keys(2))
    assert not view.absent(keys(2)), "another with such a key is held"
    presence.remove(keys(2, 3))
    assert view.absent(keys(1, 2, 3))
    assert view.absent(keys())


def test_counts_that_wrap_round_come_back() -> None:
    presence = Presence(1, tells=True)
    view = PresenceView(presence.fd)
    for _ in range(300):
        presence.add(keys(7))
    assert not view.absent(keys(7))
    for _ in range(299):
        presence.remove(keys(7))
    assert not view.absent(keys(7))
    presence.remove(keys(7))
    assert view.absent(keys(7))


def test_a_keeper_that_does_not_know_all_says_nothing() -> None:
    assert not PresenceView(Presence(1, tells=False).fd).absent(keys(1))


@pytest.mark.parametrize(
    ("nbytes", "size"), [(1, 1 << 16), (1 << 30, 1 << 16), ((1 << 30) + (1 << 14), 1 << 17)]
)
def test_a_byte_for_each_16_kib(nbytes: int, size: int) -> None:
    assert os.fstat(Presence(nbytes, tells=True).fd).st_size == size + mmap.PAGESIZE


def test_an_engine_cannot_write_to_it() -> None:
    presence = Presence(1, tells=True)
    again = os.open(f"/proc/self/fd/{presence.fd}", os.O_RDWR)
    for fd in (presence.fd, again):
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 0)
        with pytest.raises(PermissionError):
            os.write(fd, b"1")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    os.close(again)
    presence.add(keys(1))
    assert not PresenceView(presence.fd).absent(keys(1))


@pytest.mark.parametrize("nbytes", [0, 4096, 5 << 16, 1 << 16])
def test_what_is_no_such_table_is_refused(nbytes: int) -> None:
    fd = pages.create(nbytes or 1, huge_pages=False)
    with pytest.raises(ValueError, match="counts"):
        PresenceView(fd)
    os.close(fd)


@pytest.mark.parametrize("seed", range(4))
def test_a_keeper_tells_what_it_has(seed: int) -> None:
    """Whatever is saved, evicted, aborted and cleared: whoever would find it does not take it for absent."""
    draw, keeper = random.Random(seed), Keeper(1 << 20, "lru")
    presence = keeper.chunks.presence = Presence(1 << 20, tells=True)
    view = PresenceView(presence.fd)
    space = keeper.open_namespace(PRINT, "m", [GroupSpec(4096, None), GroupSpec(8192, 2)], 1, 1)
    keeper.attach("s")
    names, wrong = [draw.randbytes(16) for _ in range(200)], 0
    for _ in range(600):
        some = draw.sample(names, draw.randrange(1, 8))
        done = keeper.reserve("s", space, b"".join(some), [[True] * len(some)] * 2, 0, 0)
        if done.reservation:
            end = keeper.commit if draw.random() < 0.8 else lambda *claim: keeper.abort(*claim[:2])
            end("s", done.reservation, 0)
        if draw.random() < 0.02:
            keeper.clear(space)
        for name in draw.sample(names, 5):
            held = [int(keeper.chunks.table.find(group_keys(name, PRINT, group))[0]) >= 0 for group in (0, 1)]
            seen = [not view.absent(group_keys(name, PRINT, group)) for group in (0, 1)]
            assert all(map(operator.ge, seen, held))
            wrong += seen != held
    assert wrong < 0.05 * 5 * 600, "few of so few share a count"
    keeper.check_integrity()
    keeper.clear(space)
    assert view.absent(group_keys(b"".join(names), PRINT, 0))
