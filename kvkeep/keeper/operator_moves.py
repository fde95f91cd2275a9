"""Chunks of a prompt that change place because an operator says so: into memory, or down to a tier now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from kvkeep.errors import RequestRefused
from kvkeep.identity import KEY_BYTES
from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.fetch import Stage
from kvkeep.keeper.flush import MOVERS
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.movers import Movers
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.pins import chain_records, held_chunks

__all__ = ["move_down", "move_up", "tier_named"]

_LOOK_EVERY = 0.02


async def move_up(
    keeper: Keeper, movers: Movers, space: Namespace, keys: bytes, tenant: bytes, wait: float
) -> dict[str, int]:
    """Read what tiers have of a prompt and memory lacks. `keys`: 16 bytes per chunk, from its beginning.

    Returns how many of its leading chunks memory can serve after at most `wait` seconds; what comes later
    stays. Raises RequestRefused where too much else is being fetched.
    """
    fetch = movers.prefetch(space, keys, tenant)
    await _until(lambda: fetch.stage is Stage.DONE, wait)
    return {"asked_chunks": len(keys) // KEY_BYTES, "there_chunks": held_chunks(keeper, space, keys)}


async def move_down(
    keeper: Keeper, movers: Movers, space: Namespace, keys: bytes, tier: int, drop: bool, wait: float
) -> dict[str, int]:
    """Write to a tier what memory has of a prompt, behind what waits already; `drop`: and then forget it.

    Returns how many chunks memory had, all groups together, and how many of them the tier has after at most
    `wait` seconds; only those are dropped. Raises RequestRefused where the tier is switched off, or a chunk
    is named twice.
    """
    records = chain_records(keeper, space, keys)
    chunks, bit = keeper.chunks, np.uint16(1 << tier)
    # Nothing of it goes, or becomes another chunk, in the meantime.
    lease = keeper.hold(MOVERS, records)
    try:
        movers.write(tier, records)
        await _until(lambda: movers.written(tier, records), wait)
        there = records[(chunks.stored[records] & bit) != 0]
        dropped = there[chunks.state[there] == ChunkState.COMMITTED] if drop else there[:0]
        keeper.forget(dropped)
    finally:
        keeper.release(MOVERS, lease, None)
    return {"asked_chunks": len(records), "there_chunks": len(there), "dropped_chunks": len(dropped)}


async def _until(done: Callable[[], bool], wait: float) -> None:
    deadline = time.monotonic() + wait
    while not done():
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(_LOOK_EVERY)


def tier_named(names: list[str], name: str) -> int:
    """The number of the tier whose name begins so. Raises RequestRefused."""
    found = [number for number, one in enumerate(names) if one.startswith(name)]
    if name in names:
        found = [names.index(name)]
    if len(found) != 1:
        raise RequestRefused(f"{len(found)} tiers are {name!r}: this keeper has {', '.join(names) or 'none'}")
    return found[0]
