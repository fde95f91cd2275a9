"""Which copy engine moves KV between a dense cache and the arena."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvkeep.transfer import Transfer, make_transfer
from kvkeep.transfer.base import Offsets

__all__ = ["StagedTransfer", "as_blocks", "make_copier"]

_STAGE_BYTES = 64 << 20


def as_blocks(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """[heads, columns, size] as [whole blocks, 1, heads, tokens, size], a view."""
    count = states.shape[1] // tokens
    blocks: torch.Tensor = states[:, : count * tokens].unflatten(1, (count, tokens))
    return blocks.transpose(0, 1)[:, None]


def make_copier(layers: Sequence[tuple[str, torch.Tensor]], arena: memoryview, threads: int) -> Transfer:
    """The copy engine for one row of one group; blocks are the tensors' first dimension.

    On a CPU it is that of all engines. Elsewhere plain torch copies: the place where a CUDA engine of
    `kvkeep.transfer` comes in.
    """
    groups, count = [layers], len(layers[0][1])
    if all(tensor.device.type == "cpu" for _, tensor in layers):
        return make_transfer(groups, count, arena, threads)
    return StagedTransfer(groups, count, arena)


class StagedTransfer(Transfer):
    """Whole slots over the bus, and between layers and a staging tensor on the device itself."""

    name = "staged"

    def _copy(self, group: int, offsets: Offsets, blocks: Offsets, saving: bool) -> int:
        size, tensors = self.layouts[group].block_bytes, self.layers[group]
        device = tensors[0].device
        step = max(1, _STAGE_BYTES // size)
        for first in range(0, len(blocks), step):
            places = offsets[first : first + step].tolist()
            which = torch.from_numpy(np.ascontiguousarray(blocks[first : first + step]))
            stage = torch.empty((len(places), size), dtype=torch.uint8, device=device)
            if not saving:
                self._slots(places, stage, saving)
            at = 0
            for tensor in tensors:
                nbytes = tensor[0].numel() * tensor.element_size()
                part = stage[:, at : at + nbytes].view(tensor.dtype).unflatten(1, tensor.shape[1:])
                if saving:
                    part.copy_(tensor[which.to(tensor.device)])
                else:
                    tensor.index_copy_(0, which.to(tensor.device), part.to(tensor.device))
                at += nbytes
            if saving:
                self._slots(places, stage, saving)
        return len(blocks) * size

    def _slots(self, places: list[int], stage: torch.Tensor, saving: bool) -> None:
        """Both ways the call returns when the bytes are there: the arena is not pinned memory here."""
        for place, row in zip(places, stage, strict=True):
            slot = self.arena[place : place + stage.shape[1]]
            source, target = (row, slot) if saving else (slot, row)
            target.copy_(source)
