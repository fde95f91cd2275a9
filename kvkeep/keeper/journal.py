"""What came and went, numbered, for engines that publish it: the last changes, then only what is held now.

A client asks what has changed since the number that it was told last. One that fell behind (the log is
bounded) is told so, and asks about the chunks that it has published instead. There is none before somebody
asks: a keeper whose engines publish nothing pays nothing.
"""

from __future__ import annotations

from collections import deque
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
_MOST = 1 << 18  # 7 MiB: minutes of a busy host

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


class _Entry(NamedTuple):
    keys: Keys
    spaces: Records
    states: States


class Journal:
    """The changes of one keeper. The event loop's, like the keeper."""

    def __init__(self, chunks: Chunks, most: int = _MOST) -> None:
        self._chunks = chunks
        self._most = most
        self._entries: deque[_Entry] = deque()
        self._last = self._lost = 0

    def note(self, records: Records) -> None:
        """These chunks have become readable, have been forgotten, or are in one more tier."""
        keys = self._chunks.table.keys_of(records)
        below = np.where(self._chunks.stored[records] != 0, BELOW, 0).astype(np.uint8)
        self._add(keys, self._chunks.namespace[records].astype(np.int64), states(self._chunks, keys) | below)

    def probed(self, space: Namespace, names: Sequence[bytes], tiers: Sequence[int]) -> None:
        """Tiers were asked for values by name (8 bytes and the key); negative: none of them has it."""
        keys = np.frombuffer(b"".join(name[-KEY_BYTES:] for name in names), "<u8").reshape(-1, 2)
        below = np.where(np.array(tiers, np.int64) >= 0, BELOW, 0).astype(np.uint8)
        here = states(self._chunks, keys) & np.uint8(MEMORY)
        self._add(keys, np.full(len(keys), space.number, np.int64), here | below)

    def since(self, after: int, space: Namespace) -> Changes:
        """The changes of a namespace whose number is above `after`; 0: all that are left."""
        first, keys, states = self._lost, [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint8)]
        for entry in self._entries:
            mine = np.flatnonzero(entry.spaces == space.number)
            mine = mine[mine >= after - first]
            keys.append(entry.keys[mine])
            states.append(entry.states[mine])
            first += len(entry.keys)
        complete = self._lost <= after <= self._last
        return Changes(self._last, complete, np.concatenate(keys), np.concatenate(states))

    def _add(self, keys: Keys, spaces: Records, states: States) -> None:
        if not len(keys):
            return
        self._entries.append(_Entry(keys, spaces, states))
        self._last += len(keys)
        while self._last - self._lost > self._most and len(self._entries) > 1:
            self._lost += len(self._entries.popleft().keys)


def states(chunks: Chunks, keys: Keys) -> States:
    """What chunks are now, by the keys of their groups; 0: not in memory, and nothing known of tiers."""
    records = chunks.table.find(keys)
    held = np.flatnonzero(records >= 0)
    out = np.zeros(len(keys), np.uint8)
    mine = records[held]
    out[held] = np.where(chunks.state[mine] == ChunkState.COMMITTED, MEMORY, 0)
    out[held] |= np.where(chunks.stored[mine] != 0, BELOW, 0).astype(np.uint8)
    return out
