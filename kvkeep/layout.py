"""An engine's paged KV geometry, as bytes.

Each layer's cache is a strided tensor with one dimension that counts blocks. What one block
occupies in it is a list of contiguous *pieces*; a group's pieces, layer after layer, are what a
slot holds for one block. Nothing here looks inside a block, so any packing is moved unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.errors import LayoutError

__all__ = ["GroupLayout", "LayerTensor", "Piece", "chunk_blocks", "group_layout"]

CHUNK_BYTES = 1 << 20
"""Chunks are the fewest blocks that reach about this: large enough for any medium's full speed."""


class Piece(NamedTuple):
    """One contiguous run of a block in one layer's tensor."""

    address: int
    """Address of the run in block 0, in bytes."""
    block_stride: int
    """Bytes from one block's run to the next block's."""
    nbytes: int


@dataclass(frozen=True)
class LayerTensor:
    """One layer's KV tensor as its owner sees it; sizes and strides in elements."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class GroupLayout:
    """What one rank moves for one block of one KV-cache group."""

    pieces: tuple[Piece, ...]
    num_blocks: int

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes in a slot."""
        return sum(piece.nbytes for piece in self.pieces)

    def table(self) -> tuple[npt.NDArray[np.int64], ...]:
        """(address, block stride, bytes, offset in the slot) per piece, for bulk copies."""
        address, stride, nbytes = (np.array(column, np.int64) for column in zip(*self.pieces, strict=True))
        return address, stride, nbytes, np.cumsum(nbytes) - nbytes


def group_layout(layers: Sequence[LayerTensor], num_blocks: int) -> GroupLayout:
    """Pieces of a group from its layers' tensors, in the order given.

    Layers that share one tensor (cross-layer KV sharing) are moved once. Raises LayoutError
    where the block dimension is not clear or blocks overlap.
    """
    pieces: list[Piece] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for layer in layers:
        if (layer.address, layer.shape) in seen:
            continue
        seen.add((layer.address, layer.shape))
        pieces += _pieces(layer, num_blocks)
    if not pieces:
        raise LayoutError("a KV-cache group without layers cannot be kept: run this model without kvkeep")
    return GroupLayout(tuple(pieces), num_blocks)


def _block_dim(layer: LayerTensor, num_blocks: int) -> int:
    """The dimension that counts blocks: the first, or the second behind the pair of K and V."""
    shape = layer.shape
    if len(shape) > 1 and shape[:2] != (2, 2):
        if shape[0] == num_blocks:
            return 0
        if shape[1] == num_blocks and shape[0] == 2:
            return 1
    raise LayoutError(
        f"layer {layer.name}: no clear block dimension of {num_blocks} in shape {shape}: "
        "kvkeep does not know this KV layout; run this engine without it, and report the shape"
    )


def _pieces(layer: LayerTensor, num_blocks: int) -> list[Piece]:
    block_dim = _block_dim(layer, num_blocks)
    _check_apart(layer)
    inner = [dim for dim in range(len(layer.shape)) if dim != block_dim and layer.shape[dim] > 1]
    inner.sort(key=lambda dim: -layer.strides[dim])
    run = 1
    while inner and layer.strides[inner[-1]] == run:
        run *= layer.shape[inner.pop()]
    stride = layer.strides[block_dim] * layer.itemsize
    starts = itertools.product(*(range(layer.shape[dim]) for dim in inner))
    offsets = sorted(
        sum(index * layer.strides[dim] for index, dim in zip(start, inner, strict=True)) for start in starts
    )
    nbytes = run * layer.itemsize
    return [Piece(layer.address + offset * layer.itemsize, stride, nbytes) for offset in offsets]


def _check_apart(layer: LayerTensor) -> None:
    """Raise LayoutError unless each dimension steps over all that the ones inside it reach."""
    reach = 1
    for stride, size in sorted(zip(layer.strides, layer.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise LayoutError(
                    f"layer {layer.name}: elements overlap in shape {layer.shape}, strides {layer.strides}: "
                    "kvkeep does not know this KV layout; run this engine without it, and report both"
                )
            reach += (size - 1) * stride


def chunk_blocks(block_bytes: int, target: int = CHUNK_BYTES) -> int:
    """Blocks per chunk: the fewest that reach about `target` bytes (at least 3/4 of it)."""
    return max(1, -(-(target * 3 // 4) // max(block_bytes, 1)))
