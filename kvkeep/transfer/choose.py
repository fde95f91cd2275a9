"""Which copy engine serves a device."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvkeep.errors import LayoutError
from kvkeep.transfer.base import Transfer
from kvkeep.transfer.reference import ReferenceTransfer

if TYPE_CHECKING:
    from kvkeep.transfer.streams import Backend

__all__ = ["make_backend", "make_transfer"]

log = logging.getLogger("kvkeep.transfer")


def make_transfer(
    layers: Sequence[Sequence[tuple[str, torch.Tensor]]], num_blocks: int, arena: memoryview, threads: int = 1
) -> Transfer:
    """The fast engine for the device that holds the layers. Raises LayoutError where there is none."""
    devices = {tensor.device for group in layers for _, tensor in group}
    kinds = {device.type for device in devices}
    if len(devices) == 1 and kinds == {"cuda"} and torch.version.cuda:
        backend = make_backend(devices.pop())
        from kvkeep.transfer.cuda import CudaTransfer

        return CudaTransfer(layers, num_blocks, arena, backend)
    if kinds != {"cpu"}:
        names = ", ".join(sorted(map(str, devices)))
        raise LayoutError(f"KV on {names} cannot be moved: kvkeep serves CPUs, and one NVIDIA GPU per worker")
    if importlib.util.find_spec("numba") is None:
        log.warning("numba is not installed: blocks are copied at a third of the speed; pip install numba")
        return ReferenceTransfer(layers, num_blocks, arena)
    from kvkeep.transfer.cpu import CpuTransfer

    return CpuTransfer(layers, num_blocks, arena, threads)


def make_backend(device: torch.device) -> Backend:
    """An NVIDIA GPU, as copies need it. Raises LayoutError where something is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise LayoutError(f"KV on {device} cannot be moved without Triton: pip install triton")
    from kvkeep.transfer.driver import CudaBackend

    try:
        return CudaBackend(device)
    except OSError as error:
        raise LayoutError(
            f"KV on {device} cannot be moved: the driver's library does not load: {error}"
        ) from error
