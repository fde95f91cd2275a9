"""Pins: readable chunks that eviction passes over until they are unpinned, cleared or this keeper ends."""

from __future__ import annotations

import numpy as np

from kvkeep.errors import RequestRefused
from kvkeep.identity import group_keys
from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.index import Records
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.usable import usable_chunks

__all__ = ["MOST_PINNED", "chain_records", "held_chunks", "pin", "pinned_bytes", "space_records", "unpin"]

MOST_PINNED = 0.5
"""Share of the arena that pins may take: the rest must go on serving all others."""


def chain_records(keeper: Keeper, space: Namespace, keys: bytes) -> Records:
    """What is readable of a chain and needed to load it: 16 bytes per chunk, from the prompt's beginning."""
    found = []
    for group, spec in enumerate(space.groups):
        named = group_keys(keys, space.fingerprint, group)
        records = keeper.chunks.readable(
            named if spec.window_chunks is None else named[-spec.window_chunks :]
        )
        found.append(records[records >= 0])
    return np.concatenate(found)


def held_chunks(keeper: Keeper, space: Namespace, keys: bytes) -> int:
    """How many leading chunks of a chain memory could serve; unlike a lookup it neither leases nor counts."""
    held = [
        keeper.chunks.readable(group_keys(keys, space.fingerprint, group)) >= 0
        for group in range(len(space.groups))
    ]
    return usable_chunks(held, [group.window_chunks for group in space.groups])


def space_records(keeper: Keeper, space: Namespace | None) -> Records:
    """All that is readable, of one namespace or (None) of all."""
    records = keeper.chunks.in_state(ChunkState.COMMITTED)
    return records if space is None else records[keeper.chunks.namespace[records] == space.number]


def pin(keeper: Keeper, records: Records) -> int:
    """Pin readable chunks, all or none; returns how many were not pinned yet.

    Raises RequestRefused where more than MOST_PINNED of the arena would be pinned.
    """
    new = records[~keeper.chunks.pinned[records]]
    total, most = pinned_bytes(keeper) + int(keeper.slot_bytes(new).sum()), MOST_PINNED * keeper.arena.nbytes
    if total > most:
        raise RequestRefused(
            f"pins would take {total} bytes of the arena, the most are {most:.0f}: unpin some"
        )
    keeper.chunks.pin(new, True)
    return len(new)


def unpin(keeper: Keeper, records: Records) -> int:
    """Let eviction have them again; returns how many had been pinned."""
    pinned = records[keeper.chunks.pinned[records]]
    keeper.chunks.pin(pinned, False)
    return len(pinned)


def pinned_bytes(keeper: Keeper) -> int:
    """Bytes of all slots that are pinned."""
    return int(keeper.slot_bytes(np.flatnonzero(keeper.chunks.pinned)).sum())
