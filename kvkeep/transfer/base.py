"""The interface of all copy engines."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.background import Busy, never
from kvkeep.errors import LayoutError
from kvkeep.layout import GroupLayout, LayerTensor, group_layout
from kvkeep.pages import prepare

__all__ = [
    "Move",
    "Offsets",
    "Transfer",
    "describe_layers",
]

Offsets = npt.NDArray[np.int64]


class Move(NamedTuple):
    """Blocks of one group: see `Transfer`."""

    group: int
    offsets: Offsets
    blocks: Offsets


class Transfer(ABC):
    """Copies whole blocks between an engine's paged KV and the arena, for one rank.

    Made once from the KV tensors, `layers[g]` of group g in a fixed order, and an arena mapping;
    neither is owned. `save` and `load` take, for n blocks of one group, `offsets` (int64 [n]: the
    byte in the arena where the block's bytes begin) and `blocks` (int64 [n]: block ids). Both
    return when the bytes are there. Saves come from one thread at a time, and so do loads.
    """

    name: ClassVar[str]

    def __init__(
        self, layers: Sequence[Sequence[tuple[str, torch.Tensor]]], num_blocks: int, arena: memoryview
    ) -> None:
        self.layers = [[tensor for _, tensor in group] for group in layers]
        self.layouts: list[GroupLayout] = [
            group_layout(describe_layers(group), num_blocks) for group in layers
        ]
        self.arena = torch.frombuffer(arena, dtype=torch.uint8)
        self._mapping = arena
        self._closed = threading.Event()
        self._base = self.arena.data_ptr()
        self._tables = [layout.table() for layout in self.layouts]

    def save(self, group: int, offsets: Offsets, blocks: Offsets) -> int:
        """Paged KV → arena. Returns the bytes copied; raises LayoutError on a place out of bounds."""
        self._check(group, offsets, blocks)
        return self._copy(group, offsets, blocks, saving=True)

    def load(self, group: int, offsets: Offsets, blocks: Offsets) -> int:
        """Arena → paged KV. Returns the bytes copied; raises LayoutError on a place out of bounds."""
        self._check(group, offsets, blocks)
        return self._copy(group, offsets, blocks, saving=False)

    def prepare(self, fd: int, busy: Busy = never) -> None:
        """Make the mapping fast to copy to, in the background. `fd`: the arena's; stays the caller's.
        `busy`: whether the engine computes on the cores that this would take."""
        prepare(self._mapping, fd, busy, self._closed)

    def close(self) -> None:
        """Let go of the mapping; no copy is asked for after this. May take seconds."""
        self._closed.set()

    @abstractmethod
    def _copy(self, group: int, offsets: Offsets, blocks: Offsets, saving: bool) -> int: ...

    def _places(
        self,
        group: int,
        offsets: Offsets,
        blocks: Offsets,
        pieces: npt.NDArray[np.bool_] | slice = slice(None),
    ) -> tuple[Offsets, Offsets, Offsets]:
        """Per piece, block after block: its address in the paged KV, its address in the arena, its bytes."""
        address, stride, nbytes, within = (column[pieces] for column in self._tables[group])
        paged = (address + blocks[:, None] * stride).ravel()
        slots = (self._base + offsets[:, None] + within).ravel()
        return paged, slots, np.tile(nbytes, len(blocks))

    def _check(self, group: int, offsets: Offsets, blocks: Offsets) -> None:
        layout = self.layouts[group]
        if len(offsets) != len(blocks):
            raise LayoutError(f"{len(offsets)} places for {len(blocks)} blocks")
        if not len(blocks):
            return
        if blocks.min() < 0 or blocks.max() >= layout.num_blocks:
            raise LayoutError("a block id outside the engine's KV cache")
        if offsets.min() < 0 or offsets.max() + layout.block_bytes > len(self.arena):
            raise LayoutError("a place outside the arena")


def describe_layers(layers: Sequence[tuple[str, torch.Tensor]]) -> list[LayerTensor]:
    """Torch tensors as plain geometry."""
    return [
        LayerTensor(
            name, tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()
        )
        for name, tensor in layers
    ]
