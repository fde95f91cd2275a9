"""What came and went, numbered, for engines that publish it: the last changes, then only what is held now.

A client asks what has changed since the number that it was told last. One that fell behind (the log is
bounded) is told so, and asks about the chunks that it has published instead. There is none before somebody
asks: a keeper whose engines publish nothing pays nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.identity import KEY_BYTES
from kvkeep.keeper.chunks import Chunks, ChunkState
from kvkeep.keeper.index import Keys, Records
from kvkeep.keeper.namespaces import Namespace

__all__ = ["BELOW", "MEMORY", "Changes", "Journal", "States", "states"]

MEMORY, BELOW = 1, 2
"""Bits of a state: readable in the arena; in a tier, as far as this keeper knows."""
_MOST = 1 << 16  # some 64 GiB of chunks; 12 ms for an engine to go through

States = npt.NDArray[np.uint8]


class Changes(NamedTuple):
    """What `Journal.since` tells."""

    last: int
    """Number of the last change so far: what to ask from next time."""
    complete: bool
    """False where changes between are lost."""
    keys: Keys
    """Of the groups' chunks, oldest change first; a chunk may come up several times."""
    states: States
    """What each of them was then."""


class Journal:
    """The changes of one keeper. The event loop's, like the keeper."""

    def __init__(self, chunks: Chunks, most: int = _MOST) -> None:
        self._chunks = chunks
        self._most = most
        self._keys = np.zeros((most, 2), np.uint64)  # a ring: change number n lies at n modulo `most`
        self._spaces = np.zeros(most, np.int32)
        self._states = np.zeros(most, np.uint8)
        self._last = 0

    def note(self, records: Records) -> None:
        """These chunks have become readable, have been forgotten, or are in one more tier."""
        keys = self._chunks.table.keys_of(records)
        below = np.where(self._chunks.stored[records] != 0, BELOW, 0).astype(np.uint8)
        self._add(keys, self._chunks.namespace[records], states(self._chunks, keys) | below)

    def probed(self, space: Namespace, names: Sequence[bytes], tiers: Sequence[int]) -> None:
        """Tiers were asked for values by name (8 bytes and the key); negative: none of them has it."""
        keys = np.frombuffer(b"".join(name[-KEY_BYTES:] for name in names), "<u8").reshape(-1, 2)
        below = np.where(np.array(tiers, np.int64) >= 0, BELOW, 0).astype(np.uint8)
        here = states(self._chunks, keys) & np.uint8(MEMORY)
        self._add(keys, np.full(len(keys), space.number, np.int32), here | below)

    def since(self, after: int, space: Namespace) -> Changes:
        """The changes of a namespace whose number is above `after`; 0: all that are left."""
        lost = max(0, self._last - self._most)
        complete = lost <= after <= self._last
        at = np.arange(after if complete else lost, self._last) % self._most
        at = at[self._spaces[at] == space.number]
        return Changes(self._last, complete, self._keys[at], self._states[at])

    def _add(self, keys: Keys, spaces: npt.NDArray[np.int32], states: States) -> None:
        at = np.arange(self._last, self._last + len(keys))[-self._most :] % self._most
        kept = slice(len(keys) - len(at), None)
        self._keys[at], self._spaces[at], self._states[at] = keys[kept], spaces[kept], states[kept]
        self._last += len(keys)


def states(chunks: Chunks, keys: Keys) -> States:
    """What chunks are now, by the keys of their groups; 0: not in memory, and nothing known of tiers."""
    records = chunks.table.find(keys)
    held = np.flatnonzero(records >= 0)
    out = np.zeros(len(keys), np.uint8)
    mine = records[held]
    out[held] = np.where(chunks.state[mine] == ChunkState.COMMITTED, MEMORY, 0)
    out[held] |= np.where(chunks.stored[mine] != 0, BELOW, 0).astype(np.uint8)
    return out
