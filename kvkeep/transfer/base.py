"""The interface of all copy engines."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.background import GiveWay
from kvkeep.errors import LayoutError
from kvkeep.layout import GroupLayout, LayerTensor, group_layout

__all__ = [
    "Move",
    "Offsets",
    "Transfer",
    "await_allocation",
    "describe_layers",
    "populate",
    "prepare_mapping",
]

Offsets = npt.NDArray[np.int64]
_PREPARE_STEP = 2 << 20
_MADV_POPULATE_WRITE = 23
_LOOK_EVERY, _PATIENCE = 0.1, 10.0  # seconds


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
        self, layers: Sequence[Sequence[tuple[str, torch.Tensor]]], num_blocks: int, arena: mmap.mmap
    ) -> None:
        self.layers = [[tensor for _, tensor in group] for group in layers]
        self.layouts: list[GroupLayout] = [
            group_layout(describe_layers(group), num_blocks) for group in layers
        ]
        self.arena = torch.frombuffer(arena, dtype=torch.uint8)
        self._mapping = arena
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

    def prepare(self, fd: int) -> None:
        """Make the mapping fast to copy to, in the background. `fd`: the arena's; stays the caller's."""
        prepare_mapping(self._mapping, fd)

    def close(self) -> None:  # noqa: B027 (only a device has something to let go of)
        """Let go of the mapping; no copy is asked for after this. May take seconds."""

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


def prepare_mapping(arena: mmap.mmap, fd: int) -> threading.Thread:
    """Enter the arena's pages into this process's page table, in the background, giving way.

    A first touch costs about ten times a copy of the same bytes; a copy that comes before its page
    was prepared just pays that. Never allocates a page: it begins once the whole arena is allocated,
    and does not begin where the keeper does not allocate it ahead. The thread ends with its work, or
    with the process. `fd`: the arena's descriptor, which stays the caller's.
    """
    address = torch.frombuffer(arena, dtype=torch.uint8).data_ptr()
    arguments = (address, arena, os.dup(fd))
    thread = threading.Thread(target=_populate, args=arguments, name="kvkeep-prepare", daemon=True)
    thread.start()
    return thread


def _populate(address: int, arena: mmap.mmap, fd: int) -> None:
    give_way = GiveWay()
    try:
        if not await_allocation(fd, len(arena)):
            return
    finally:
        os.close(fd)
    populate(address, len(arena), give_way)


def populate(address: int, nbytes: int, give_way: Callable[[], None]) -> bool:
    """Enter these pages into this process's page table. False on a kernel that cannot (before 5.14), or
    without memory: they come on first touch instead.

    In small steps, since each holds a lock that the process needs for its other memory.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for offset in range(0, nbytes, _PREPARE_STEP):
        if madvise(address + offset, min(_PREPARE_STEP, nbytes - offset), _MADV_POPULATE_WRITE):
            return False
        give_way()
    return True


def await_allocation(fd: int, nbytes: int, stop: Callable[[], bool] = lambda: False) -> bool:
    """Wait until all of a file is allocated; False once that has made no progress for a while, or `stop()`.

    By its count of blocks: SEEK_DATA takes what fallocate reserved for a hole until it is written.
    """
    allocated, since = -1, time.monotonic()
    while (now := os.fstat(fd).st_blocks * 512) < nbytes:
        if now != allocated:
            allocated, since = now, time.monotonic()
        if stop() or time.monotonic() - since > _PATIENCE:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def describe_layers(layers: Sequence[tuple[str, torch.Tensor]]) -> list[LayerTensor]:
    """Torch tensors as plain geometry."""
    return [
        LayerTensor(
            name, tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()
        )
        for name, tensor in layers
    ]
