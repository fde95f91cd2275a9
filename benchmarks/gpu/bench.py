"""What the parts of the GPU check share: the device, memory of both sides, shapes of KV caches, rows."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import triton

from kvbench.host_device import HostBackend
from kvbench.memory import arena
from kvkeep.transfer import kernels
from kvkeep.transfer.base import Move
from kvkeep.transfer.cuda import CudaTransfer
from kvkeep.transfer.pinning import Pinning
from kvkeep.transfer.streams import Backend, Copies, Pending

__all__ = [
    "SHAPES",
    "Bench",
    "Row",
    "Shape",
    "batches",
    "caches",
    "constants",
    "machine",
    "median",
    "prepared",
    "rounds",
]

Row = dict[str, Any]


class Shape(NamedTuple):
    """One KV cache: layers of blocks; `outermost`: a block's layers lie one behind the other."""

    name: str
    layers: int
    piece: int  # bytes of one block in one layer
    outermost: bool


SHAPES = (
    Shape("LBNHC, 8B, block 16", 32, 64 << 10, False),
    Shape("LBNHC, 8B, block 128", 32, 512 << 10, False),
    Shape("BLHNC, 8B, block 16", 32, 64 << 10, True),
    Shape("LBNHC, 8B at TP 4, block 16", 32, 16 << 10, False),
    Shape("BLHNC, 8B at TP 4, block 16", 32, 16 << 10, True),
    Shape("LBNHC, 8B at TP 2 or fp8, block 16", 32, 32 << 10, False),
    Shape("LBNHC, 8B, K and V apart, block 16", 64, 32 << 10, False),
    Shape("MLA fp8, block 64", 61, 576 * 64, False),
)


class Bench:
    """The device, or what stands for it, and memory of both sides."""

    def __init__(self, dry: bool, nbytes: int, deadline: float) -> None:
        self.dry, self.nbytes, self.deadline = dry, nbytes, deadline
        self.rounds = 1 if dry else 5
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.written: TextIO | None = None
        self.wrong = 0
        self.memory, self.fd = self.arena(2 * nbytes)
        self.backend = self._backend()
        self.pins: Pinning | None = None
        self.generator = torch.Generator(self.device).manual_seed(1)

    def arena(self, nbytes: int) -> tuple[memoryview, int]:
        """Memory as a keeper's, and its descriptor."""
        fd = os.memfd_create("gpu-check", os.MFD_CLOEXEC)
        return arena(nbytes, [fd]), fd

    def _backend(self) -> Backend:
        if self.dry:
            return HostBackend(gathering=interpreted())
        from kvkeep.transfer.driver import CudaBackend

        return CudaBackend(self.device)

    def say(self, what: str, **figures: Any) -> None:
        """One row, at once; as JSON too, so that a run that is cut short has told what it knew."""
        if self.written is not None:
            print(json.dumps({"what": what, **figures}), file=self.written, flush=True)
        told = "  ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in figures.items()
        )
        print(f"{what:44} {told}", flush=True)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def random(self, *shape: int) -> torch.Tensor:
        """Fresh random bytes on the device."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=self.generator)

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds on the device from here to the end of what `action` submits to all streams."""
        self.settle()
        began = time.perf_counter()
        action()
        self.settle()
        return time.perf_counter() - began

    def settle(self) -> None:
        """Wait for all of the device's work."""
        if not self.dry:
            torch.cuda.synchronize(self.device)


def interpreted() -> Callable[[Copies], None]:
    """The kernel in Triton's interpreter."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        module = importlib.reload(kernels)
    return lambda copies: module.copy_words(torch.from_numpy(np.stack(copies)))


def machine(bench: Bench) -> Row:
    """What the figures were taken on."""
    name = "no GPU (dry)" if bench.dry else torch.cuda.get_device_name(bench.device)
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "host": platform.processor(),
    }


def median(bench: Bench, action: Callable[[], object]) -> float:
    """Of a few rounds, the first one left out."""
    return statistics.median([bench.timed(action) for _ in range(bench.rounds + 1)][1:])


def caches(bench: Bench, shape: Shape, blocks: int) -> list[tuple[str, torch.Tensor]]:
    """A KV cache of random bytes."""
    if shape.outermost:
        whole = bench.random(blocks, shape.layers, shape.piece)
        return [(f"layer {n}", whole[:, n]) for n in range(shape.layers)]
    return [(f"layer {n}", bench.random(blocks, shape.piece)) for n in range(shape.layers)]


def prepared(bench: Bench, layers: list[tuple[str, torch.Tensor]], blocks: int) -> CudaTransfer:
    """A transfer. All have one arena, which is pinned once; so none of them is closed."""
    if bench.pins is None:
        bench.pins = Pinning(bench.backend, bench.memory)
        bench.pins.start(bench.fd).join()
    transfer = CudaTransfer([layers], blocks, bench.memory, bench.backend)
    transfer.pinning = bench.pins
    return transfer


def batches(bench: Bench, shape: Shape) -> Iterator[tuple[int, Move]]:
    """A quarter and all of the bench's bytes: blocks in a random order, slots one behind the other."""
    block_bytes = shape.layers * shape.piece
    for share in (4, 1):
        count = max(1, min(bench.nbytes // share // block_bytes, 8 if bench.dry else 1 << 30))
        blocks = np.random.default_rng(count).permutation(count + 1)[:count].astype(np.int64)
        yield count, Move(0, np.arange(count, dtype=np.int64) * block_bytes, blocks)


def rounds(bench: Bench, start: Callable[[list[Move]], Pending], move: Move) -> tuple[float, float]:
    """Medians: seconds on the device, and seconds that the calling thread took to submit."""
    device, host = [], []
    for _ in range(bench.rounds + 1):
        bench.settle()
        began = time.perf_counter()
        pending = start([move])
        host.append(time.perf_counter() - began)
        device.append(max(pending.wait(), 1e-9))
    return statistics.median(device[1:]), statistics.median(host[1:])


@contextlib.contextmanager
def constants(module: Any, **values: int) -> Iterator[None]:
    """With other constants in a module."""
    usual = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in usual.items():
            setattr(module, name, value)
