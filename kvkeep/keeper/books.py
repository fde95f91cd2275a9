"""Whether a keeper's books balance: all that is true of them between two operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.leases import ClaimKind

if TYPE_CHECKING:
    from kvkeep.keeper.keeper import Keeper

__all__ = ["check_books"]


def check_books(keeper: Keeper) -> None:
    """Raise AssertionError unless slots, bytes, leases, tenants and policies agree."""
    chunks, claims, arena = keeper.chunks, keeper.claims, keeper.arena
    chunks.check_integrity()
    claims.check_integrity()
    arena.check_integrity()
    leases = np.zeros(len(chunks.leases), np.int32)
    for claim in claims.all(ClaimKind.LEASE):
        np.add.at(leases, claim.records, 1)
    assert np.array_equal(leases, chunks.leases)
    reserved = [claim.records for claim in claims.all(ClaimKind.RESERVATION)]
    listed = np.sort(np.concatenate(reserved)) if reserved else np.zeros(0, np.int64)
    assert np.array_equal(listed, chunks.in_state(ChunkState.RESERVED))
    for number, kind in enumerate(keeper.kinds):
        taken = np.flatnonzero((chunks.state != ChunkState.FREE) & (chunks.kind == number))
        places = chunks.offset[taken].tolist()
        assert len(places) + len(kind.free) == kind.slots
        assert len(set(places) | set(kind.free)) == kind.slots
        if kind.slabs:
            bound = int(chunks.coldest[number])
            assert bound <= chunks.coldest_slab(number, np.array(sorted(kind.slabs)), arena.slab_bytes)[0]
            chunks.coldest[number] = bound
        keeper.policies[number].check_integrity()
    used = np.flatnonzero(chunks.state != ChunkState.FREE)
    keeper.tenants.check_integrity(chunks.tenant[used], keeper.slot_bytes(used))
