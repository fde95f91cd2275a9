"""Which copy engine serves a device."""

from __future__ import annotations

import importlib.util
import logging
import mmap
from collections.abc import Sequence

import torch

from kvkeep.errors import LayoutError
from kvkeep.transfer.base import Transfer
from kvkeep.transfer.reference import ReferenceTransfer

__all__ = ["make_transfer"]

log = logging.getLogger("kvkeep.transfer")


def make_transfer(
    layers: Sequence[Sequence[tuple[str, torch.Tensor]]], num_blocks: int, arena: mmap.mmap, threads: int = 1
) -> Transfer:
    """The fast engine for the device that holds the layers. Raises LayoutError where there is none."""
    devices = {tensor.device.type for group in layers for _, tensor in group}
    if devices != {"cpu"}:
        raise LayoutError(f"KV on {sorted(devices)} cannot be moved yet: this version serves CPU engines")
    if importlib.util.find_spec("numba") is None:
        log.warning("numba is not installed: blocks are copied at a third of the speed; pip install numba")
        return ReferenceTransfer(layers, num_blocks, arena)
    from kvkeep.transfer.cpu import CpuTransfer

    return CpuTransfer(layers, num_blocks, arena, threads)
