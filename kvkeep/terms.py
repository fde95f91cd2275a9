"""What keeper, wire and engines call by one name: a group, and the outcomes of a lookup and a reservation."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Meta

__all__ = ["REFUSED", "Found", "GroupSpec", "Reserved"]

REFUSED = -2
"""Stands for the offset of a chunk for which there is no room."""


class GroupSpec(NamedTuple):
    """One KV-cache group of a namespace. The bounds hold for what comes over the wire."""

    slot_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    """Bytes of one chunk, all parts together."""
    window_chunks: Annotated[int, Meta(ge=1, le=2**31)] | None
    """Chunks that a sliding window looks back on; None for full attention."""


class Found(NamedTuple):
    """What a lookup leased."""

    lease: int
    """0 where nothing was found."""
    chunks: int
    """Leading chunks, of those asked for, that can be loaded."""
    epoch: int
    """The request's place in time; a later `reserve` for the same request passes it on."""
    offsets: list[npt.NDArray[np.int64]]
    """Per group, the arena offset of each of those chunks; -1 where the group does not need it."""
    ticket: int = 0
    """Not 0: more may come from the tiers; the engine polls."""


class Reserved(NamedTuple):
    """What was reserved for one request."""

    reservation: int
    """0 where there is nothing to write."""
    offsets: list[npt.NDArray[np.int64]]
    """Per group, where to write each chunk; -1 for one that is held or being written, or was not wanted."""
    epoch: int = 0
    """The request's place in time, from its lookup or given to it now."""

    def kept(self) -> int:
        """How many leading chunks of those asked about are there, or will be once they are written: those
        before the first that some group was refused."""
        refused = [row == REFUSED for row in self.offsets]
        return min(int(row.argmax()) if row.any() else len(row) for row in refused)
