"""The slow, obvious copy engine: what every other one must equal."""

from __future__ import annotations

import torch

from kvkeep.transfer.base import Offsets, Transfer

__all__ = ["ReferenceTransfer"]


class ReferenceTransfer(Transfer):
    """One torch `copy_` per block and layer; knows dimensions and strides, not pieces."""

    name = "reference"

    def _copy(self, group: int, offsets: Offsets, blocks: Offsets, saving: bool) -> int:
        num_blocks = self.layouts[group].num_blocks
        copied = 0
        for offset, block in zip(offsets.tolist(), blocks.tolist(), strict=True):
            at = offset
            seen = set()
            for tensor in self.layers[group]:
                if (tensor.data_ptr(), tensor.shape) in seen:
                    continue
                seen.add((tensor.data_ptr(), tensor.shape))
                paged = _in_memory_order(tensor.select(0 if tensor.shape[0] == num_blocks else 1, block))
                size = paged.numel() * paged.element_size()
                slot = self.arena[at : at + size].view(paged.dtype).view(paged.shape)
                source, target = (paged, slot) if saving else (slot, paged)
                target.copy_(source)
                at += size
            copied += at - offset
        return copied


def _in_memory_order(block: torch.Tensor) -> torch.Tensor:
    raw = block.view(torch.uint8) if block.element_size() == 1 else block
    return raw.permute(sorted(range(raw.dim()), key=raw.stride, reverse=True))
