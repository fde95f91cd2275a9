"""What peers are lent: committed chunks of the right namespace and length, within a share."""

import numpy as np
import pytest

from kvkeep.errors import RequestRefused
from kvkeep.identity import group_keys
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.lend import BUSY, MISSING, OTHER_LENGTH, Lender
from kvkeep.keeper.namespaces import Namespace
from kvkeep.terms import GroupSpec
from kvkeep.tiers.seal import SEAL_BYTES
from tests.keeper.test_keeper import PAGE, SLABS, chain_keys, opened

MEMORY = SLABS * 8 * PAGE  # 128 pages, of which 32 may be lent
SHARE = MEMORY // 4 // PAGE


@pytest.fixture
def keeper() -> Keeper:
    keeper = Keeper(MEMORY, "lru", SEAL_BYTES)
    keeper.attach("s")
    return keeper


@pytest.fixture
def space(keeper: Keeper) -> Namespace:
    return opened(keeper, "one", [GroupSpec(PAGE - SEAL_BYTES, None)])


def save(
    keeper: Keeper, space: Namespace, chain: int, length: int, commit: bool = True
) -> tuple[list[bytes], int]:
    """Names of chunks, as peers write them, and the reservation."""
    keys = chain_keys(chain, length)
    done = keeper.reserve("s", space, keys, [[True] * length], 0, 0)
    if commit:
        keeper.commit("s", done.reservation, 0)
    named = group_keys(keys, space.fingerprint, 0)
    return [space.fingerprint[:8] + key.tobytes() for key in named], done.reservation


def test_what_is_held_is_lent_and_kept_until_it_is_given_back(keeper: Keeper, space: Namespace) -> None:
    lender = Lender(keeper)
    names, _ = save(keeper, space, 1, 4)
    absent = [name[:-1] + bytes([name[-1] ^ 1]) for name in names]
    assert lender.held(b"".join(names + absent)) == b"\1" * 4 + b"\0" * 4
    loan = lender.lend(b"".join([*names, absent[0]]), [PAGE] * 4 + [PAGE])
    assert sorted(loan.offsets[:4]) == sorted(set(loan.offsets[:4]))
    assert loan.offsets[4] == MISSING
    assert lender.lent_bytes == 4 * PAGE
    keeper.check_integrity()
    keeper.clear(None)
    assert keeper.arena.available(keeper.arena.classes[PAGE]) == 128 - 4
    assert lender.held(names[0]) == b"\0"
    lender.back(loan.lease, 4)
    lender.back(loan.lease, 4)  # over already
    assert lender.lent_bytes == 0
    assert keeper.arena.available(keeper.arena.classes[PAGE]) == 128
    keeper.check_integrity()


def test_what_is_being_written_is_not_lent(keeper: Keeper, space: Namespace) -> None:
    lender = Lender(keeper)
    names, reservation = save(keeper, space, 1, 2, commit=False)
    assert lender.held(b"".join(names)) == b"\0\0"
    assert lender.lend(b"".join(names), [PAGE, PAGE]).lease == 0
    keeper.commit("s", reservation, 0)
    assert lender.held(b"".join(names)) == b"\1\1"


def test_only_of_the_namespace_and_length_that_are_meant(keeper: Keeper, space: Namespace) -> None:
    lender = Lender(keeper)
    (name,), _ = save(keeper, space, 1, 1)
    assert lender.held(b"x" * 8 + name[8:]) == b"\0"
    assert lender.lend(name, [2 * PAGE]).offsets == [OTHER_LENGTH]
    assert lender.lend(b"x" * 8 + name[8:], [PAGE]).offsets == [MISSING]
    late = opened(keeper, "two", [GroupSpec(PAGE - SEAL_BYTES, None)])
    (other,), _ = save(keeper, late, 2, 1)
    assert lender.held(name + other) == b"\1\1"


@pytest.mark.parametrize("names", [b"x" * 23, b"x" * 25])
def test_half_a_name_is_refused(keeper: Keeper, names: bytes) -> None:
    with pytest.raises(RequestRefused, match="24 bytes"):
        Lender(keeper).held(names)


def test_a_name_twice_is_refused(keeper: Keeper, space: Namespace) -> None:
    lender = Lender(keeper)
    (name,), _ = save(keeper, space, 1, 1)
    with pytest.raises(RequestRefused, match="twice"):
        lender.lend(name * 2, [PAGE] * 2)
    keeper.check_integrity()
    assert lender.lent_bytes == 0


def test_no_more_than_a_share_is_lent(keeper: Keeper, space: Namespace) -> None:
    lender = Lender(keeper)
    names, _ = save(keeper, space, 1, SHARE + 10)
    first = lender.lend(b"".join(names), [PAGE] * len(names))
    assert [offset >= 0 for offset in first.offsets] == [True] * SHARE + [False] * 10
    assert first.offsets[-1] == BUSY
    assert lender.lend(names[0], [PAGE]).offsets == [BUSY]
    lender.back(first.lease, SHARE)
    again = lender.lend(b"".join(names[5:15]), [PAGE] * 10)
    assert again.sealed == [True] * 10
    lender.back(again.lease, 0)
    keeper.check_integrity()


def test_a_value_that_is_more_than_the_share_is_lent_alone(keeper: Keeper) -> None:
    size = 8 * PAGE  # a whole slab; the share of a keeper of 16 of them is 4
    wide = opened(keeper, "wide", [GroupSpec(size - SEAL_BYTES, None)])
    lender = Lender(keeper)
    lender._most = size - 1
    names, _ = save(keeper, wide, 1, 2)
    loan = lender.lend(b"".join(names), [size] * 2)
    assert loan.offsets[0] >= 0
    assert loan.offsets[1] == BUSY
    lender.back(loan.lease, 1)


def test_a_seal_is_of_one_life_of_a_slot(keeper: Keeper, space: Namespace) -> None:
    lender = Lender(keeper)
    names, _ = save(keeper, space, 1, 3)
    loan = lender.lend(b"".join(names), [PAGE] * 3)
    assert loan.sealed == [False] * 3
    lender.back(loan.lease, 2)  # the peer went away in the middle
    again = lender.lend(b"".join(names), [PAGE] * 3)
    assert again.sealed == [True, True, False]
    lender.back(again.lease, 3)
    keeper.clear(None)
    save(keeper, space, 1, 3)
    assert not any(lender.lend(b"".join(names), [PAGE] * 3).sealed)


def test_reading_is_no_use(keeper: Keeper, space: Namespace) -> None:
    """What a peer has read is still the first to go."""
    lender = Lender(keeper)
    old, _ = save(keeper, space, 1, 64)
    save(keeper, space, 2, 64)
    lender.back(lender.lend(b"".join(old[:8]), [PAGE] * 8).lease, 8)
    save(keeper, space, 4, 8)
    held = np.frombuffer(lender.held(b"".join(old)), np.uint8)
    assert held.sum() == 56
