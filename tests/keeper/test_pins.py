"""Pins: what is pinned outlives any pressure, what is unpinned does not, and the share is a bound."""

import numpy as np
import pytest

from kvkeep.errors import RequestRefused
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.pins import chain_records, pin, pinned_bytes, space_records, unpin
from kvkeep.keeper.policy import POLICIES
from kvkeep.terms import GroupSpec

PAGE = 4096
ROOM = 64


def keys_of(chain: int, length: int) -> bytes:
    return b"".join(bytes([chain, position]) * 8 for position in range(length))


def save(keeper: Keeper, space: Namespace, keys: bytes) -> None:
    done = keeper.reserve("s", space, keys, [[True] * (len(keys) // 16)] * len(space.groups), 0, 0)
    keeper.commit("s", done.reservation, 0)


def held(keeper: Keeper, space: Namespace, keys: bytes) -> int:
    found = keeper.lookup("s", space, keys)
    if found.lease:
        keeper.release("s", found.lease, None)
    return found.chunks


def keeper_with(policy: str, *groups: GroupSpec) -> tuple[Keeper, Namespace]:
    keeper = Keeper(ROOM * PAGE, policy)
    keeper.attach("s")
    return keeper, keeper.open_namespace(bytes(32), "m", groups or (GroupSpec(PAGE, None),), 1, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pinned_chain_outlives_pressure_until_it_is_unpinned(policy: str) -> None:
    keeper, space = keeper_with(policy)
    mine = keys_of(0, 10)
    save(keeper, space, mine)
    assert pin(keeper, chain_records(keeper, space, mine)) == 10
    assert pin(keeper, chain_records(keeper, space, mine)) == 0
    for chain in range(1, 30):
        save(keeper, space, keys_of(chain, 20))
    assert held(keeper, space, mine) == 10
    assert unpin(keeper, space_records(keeper, None)) == 10
    for chain in range(30, 90):
        save(keeper, space, keys_of(chain, 20))
        held(keeper, space, keys_of(chain, 20))
    assert held(keeper, space, mine) < 10
    keeper.check_integrity()


def test_pins_are_bounded_and_all_or_none() -> None:
    keeper, space = keeper_with("lru")
    for chain in range(3):
        save(keeper, space, keys_of(chain, 20))
    pin(keeper, chain_records(keeper, space, keys_of(0, 20)))
    with pytest.raises(RequestRefused, match="unpin some"):
        pin(keeper, space_records(keeper, space))
    assert pinned_bytes(keeper) == 20 * PAGE


def test_of_a_sliding_window_only_its_end_is_pinned() -> None:
    keeper, space = keeper_with("lru", GroupSpec(PAGE, None), GroupSpec(PAGE, 2))
    save(keeper, space, keys_of(0, 8))
    assert pin(keeper, chain_records(keeper, space, keys_of(0, 8))) == 8 + 2


def test_clearing_ends_a_pin_and_leases_and_pins_do_not_end_each_other() -> None:
    keeper, space = keeper_with("lru")
    save(keeper, space, keys_of(0, 4))
    lease = keeper.lookup("s", space, keys_of(0, 4)).lease
    records = chain_records(keeper, space, keys_of(0, 4))
    pin(keeper, records)
    unpin(keeper, records)
    assert not keeper.chunks.evictable[records].any()
    pin(keeper, records)
    keeper.release("s", lease, None)
    assert not keeper.chunks.evictable[records].any()
    keeper.clear(None)
    assert pinned_bytes(keeper) == 0
    save(keeper, space, keys_of(1, 4))  # takes the same records again
    assert not np.any(keeper.chunks.pinned)
    keeper.check_integrity()
