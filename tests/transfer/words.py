"""What the kernel must equal, on host memory in plain torch."""

from __future__ import annotations

import ctypes

import torch

from kvkeep.transfer.base import Offsets


def copy_words_reference(target: Offsets, source: Offsets, sizes: Offsets) -> None:
    """Copy pieces from addresses to addresses."""
    for to, start, size in zip(target.tolist(), source.tolist(), sizes.tolist(), strict=True):
        _at(to, size).copy_(_at(start, size))


def _at(address: int, nbytes: int) -> torch.Tensor:
    raw = (ctypes.c_uint8 * nbytes).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8)
