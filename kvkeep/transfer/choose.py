"""Which copy engine serves a device."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
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
    layers: Sequence[Sequence[tuple[str, torch.Tensor]]], num_blocks: int, arena: memoryview, threads: int = 0
) -> Transfer:
    """The fast engine for the device that holds the layers. Raises LayoutError where there is none."""
    backend = make_backend(frozenset(tensor.device for group in layers for _, tensor in group))
    if backend is not None:
        from kvkeep.transfer.cuda import CudaTransfer

        return CudaTransfer(layers, num_blocks, arena, backend)
    if importlib.util.find_spec("numba") is None:
        log.warning("numba is not installed: blocks are copied at a third of the speed; pip install numba")
        return ReferenceTransfer(layers, num_blocks, arena)
    from kvkeep.transfer.cpu import CpuTransfer

    return CpuTransfer(layers, num_blocks, arena, threads)


@cache
def make_backend(devices: frozenset[torch.device]) -> Backend | None:
    """What copies need of the device that holds KV, once per process; None for CPUs. Raises LayoutError where
    they are others, or something is not installed."""
    kinds = {device.type for device in devices}
    if kinds == {"cpu"}:
        return None
    if len(devices) > 1 or kinds != {"cuda"} or not torch.version.cuda:
        names = ", ".join(sorted(map(str, devices)))
        raise LayoutError(f"KV on {names} cannot be moved: kvkeep serves CPUs, and one NVIDIA GPU per worker")
    (device,) = devices
    if importlib.util.find_spec("triton") is None:
        raise LayoutError(f"KV on {device} cannot be moved without Triton: pip install triton")
    from kvkeep.transfer.driver import CudaBackend

    try:
        return CudaBackend(device)
    except OSError as error:
        raise LayoutError(
            f"KV on {device} cannot be moved: the driver's library does not load: {error}"
        ) from error
