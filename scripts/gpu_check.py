#!/usr/bin/env python3
"""Measures kvkeep's copies on this machine's GPU, beside what the machine can do, and checks their bytes.

    python scripts/gpu_check.py [--json FILE] [--seconds 420] [--ttft MODULE:FUNCTION | --ttft ""]
    python scripts/gpu_check.py --dry      # tiny, without a GPU: the script itself runs

Needs torch, Triton and numpy and this package on the path, nothing installed; for time to first token also
transformers and what kvkeep depends on (msgspec, blake3, xxhash, rich), without which that part says so.
Prints a table, and one JSON object at the end or to FILE. Exit code 1 where bytes were wrong.

`--ttft`: a function of (torch.device, seconds that are left, dry) that gives more rows, as dicts with `what`
and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from kvbench.host_device import HostBackend
from kvbench.memory import arena
from kvkeep.errors import KVKeepError
from kvkeep.transfer import cuda, kernels
from kvkeep.transfer.base import Move
from kvkeep.transfer.cuda import CudaTransfer
from kvkeep.transfer.streams import Backend, Copies, Event, Pending

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
        self.rows: list[Row] = []
        self.wrong = 0
        self.fd = os.memfd_create("gpu-check", os.MFD_CLOEXEC)
        self.memory = arena(2 * nbytes, [self.fd])
        self.backend = self._backend()
        self.generator = torch.Generator(self.device).manual_seed(1)

    def _backend(self) -> Backend:
        if self.dry:
            return HostBackend(gathering=interpreted())
        from kvkeep.transfer.driver import CudaBackend

        return CudaBackend(self.device)

    def say(self, what: str, **figures: Any) -> None:
        """One row, at once."""
        self.rows.append({"what": what, **figures})
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


def main() -> int:
    """Run all parts that the budget allows."""
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--seconds", type=float, default=420.0, help="budget (default: 420)")
    parser.add_argument(
        "--ttft", default="benchmarks.gpu.ttft:gpu_rows", help="MODULE:FUNCTION; empty: leave it out"
    )
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here; --dry runs without one", file=sys.stderr)
        return 2
    bench = Bench(args.dry, 1 << 18 if args.dry else 1 << 30, time.monotonic() + args.seconds)
    ceilings = measure_ceilings(bench)
    for step in (64 << 20, 256 << 20, 1 << 30):
        measure_registration(bench, step)
    for shape in SHAPES:
        measure_shape(bench, shape, ceilings)
    measure_kernel(bench)
    measure_behind(bench)
    measure_overlap(bench)
    if args.ttft:
        measure_ttft(bench, args.ttft)
    measure_constants(bench)
    figures = {"machine": machine(bench), "wrong": bench.wrong, "rows": bench.rows}
    text = json.dumps(figures)
    if args.json:
        args.json.write_text(text)
    else:
        print(text)
    print(f"gpu-check: {'bytes were WRONG' if bench.wrong else 'all bytes equal'}", file=sys.stderr)
    return 1 if bench.wrong else 0


def measure_ttft(bench: Bench, name: str) -> None:
    """Time to first token by load against recompute; what it lacks does not take the other figures away."""
    module, _, function = name.partition(":")
    try:
        measured = getattr(importlib.import_module(module), function)
        for row in measured(bench.device, bench.left(), bench.dry):
            bench.say(**row)
    except (ImportError, RuntimeError, KVKeepError) as error:
        bench.say("time to first token", failed=f"{type(error).__name__}: {error}")


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


def measure_ceilings(bench: Bench) -> dict[str, float]:
    """GB/s of plain copies: what no copy of ours can pass."""
    size, pin = bench.nbytes, not bench.dry
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=pin).fill_(1) for _ in range(2)]
    devices = [bench.random(size) for _ in range(2)]
    streams = [None if bench.dry else torch.cuda.Stream(bench.device) for _ in range(2)]

    def to_host() -> None:
        hosts[0].copy_(devices[0], non_blocking=True)

    def to_device() -> None:
        devices[1].copy_(hosts[1], non_blocking=True)

    def both() -> None:
        for stream, action in zip(streams, (to_host, to_device), strict=True):
            with torch.cuda.stream(stream):  # None: does nothing
                action()

    actions = {
        "save": to_host,
        "load": to_device,
        "both": both,
        "device": lambda: devices[0].copy_(devices[1]),
    }
    moved = {"both": 2 * size, "device": 2 * size}
    found = {name: moved.get(name, size) / median(bench, action) / 1e9 for name, action in actions.items()}
    for name, speed in found.items():
        bench.say(f"ceiling: {name}", GBps=speed)
    return found


def measure_registration(bench: Bench, step: int) -> None:
    """How long the arena takes to be pinned, so many bytes at a time, and what that does to a launch."""
    address = torch.frombuffer(bench.memory, dtype=torch.uint8).data_ptr()
    pins = cuda.Pinning(bench.backend, address, len(bench.memory), step >> 12 if bench.dry else step)
    began = time.perf_counter()
    thread = pins.start(bench.fd)
    slowest, target = 0.0, bench.random(1 << 16)
    while thread.is_alive():
        slowest = max(slowest, bench.timed(lambda: target.fill_(1)))
        time.sleep(0.001)
    seconds = time.perf_counter() - began
    bench.say(
        f"registration, {step >> 20} MiB at a time",
        seconds=seconds,
        GiB=len(bench.memory) / 2**30,
        share=pins.registered / len(bench.memory),
        slowest_launch_ms=slowest * 1e3,
    )
    pins.close()


def caches(bench: Bench, shape: Shape, blocks: int) -> list[tuple[str, torch.Tensor]]:
    """A KV cache of random bytes."""
    if shape.outermost:
        whole = bench.random(blocks, shape.layers, shape.piece)
        return [(f"layer {n}", whole[:, n]) for n in range(shape.layers)]
    return [(f"layer {n}", bench.random(blocks, shape.piece)) for n in range(shape.layers)]


def prepared(bench: Bench, layers: list[tuple[str, torch.Tensor]], blocks: int) -> CudaTransfer:
    """A transfer, its arena pinned."""
    transfer = CudaTransfer([layers], blocks, bench.memory, bench.backend)
    transfer.pinning.start(bench.fd).join()
    return transfer


def batches(bench: Bench, shape: Shape) -> Iterator[tuple[int, Move]]:
    """A quarter and all of the bench's bytes: blocks in a random order, slots one behind the other."""
    block_bytes = shape.layers * shape.piece
    for share in (4, 1):
        count = max(1, min(bench.nbytes // share // block_bytes, 8 if bench.dry else 1 << 30))
        blocks = np.random.default_rng(count).permutation(count + 1)[:count].astype(np.int64)
        yield count, Move(0, np.arange(count, dtype=np.int64) * block_bytes, blocks)


def measure_shape(bench: Bench, shape: Shape, ceilings: dict[str, float]) -> None:
    """Save and load, as ratios to the ceilings; the bytes come back as they were."""
    if bench.dry:
        shape = shape._replace(layers=4, piece=shape.piece // 64)
    for count, move in batches(bench, shape):
        if bench.left() < 60 and not bench.dry:
            bench.say(f"{shape.name}, {count} blocks: no time left")
            return
        layers = caches(bench, shape, count + 1)
        transfer = prepared(bench, layers, count + 1)
        chosen = torch.from_numpy(move.blocks).to(bench.device)
        before = [tensor[chosen].clone() for _, tensor in layers]
        figures: Row = {}
        for name, start in (("save", transfer.start_save), ("load", transfer.start_load)):
            if name == "load":
                for _, tensor in layers:
                    tensor.zero_()
            seconds, submitting = rounds(bench, start, move)
            speed = count * shape.layers * shape.piece / seconds / 1e9
            figures |= {
                f"{name}_GBps": speed,
                f"{name}_ratio": speed / ceilings[name],
                f"{name}_ms": submitting * 1e3,
            }
        equal = all(torch.equal(old, tensor[chosen]) for old, (_, tensor) in zip(before, layers, strict=True))
        bench.wrong += not equal
        bench.say(f"{shape.name}, {count} blocks", **figures, equal=equal)
        transfer.close()


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


WAYS = {
    "engines": {"_KERNEL_BELOW": 0, "_KERNEL_FROM": 1},
    "kernel": {"_KERNEL_BELOW": 1 << 40, "_KERNEL_FROM": 1},
}


def measure_kernel(bench: Bench) -> None:
    """Loads by the copy engines and by the kernel, per size of a piece: where the constants come from."""
    for piece in (4, 8, 16, 24, 32, 48, 64, 128):
        if bench.left() < 60 and not bench.dry:
            return
        shape = Shape("", 4 if bench.dry else 32, piece << (4 if bench.dry else 10), False)
        _, (count, move) = batches(bench, shape)
        transfer = prepared(bench, caches(bench, shape, count + 1), count + 1)
        found = {}
        for name, values in WAYS.items():
            with constants(cuda, **values):
                seconds, _ = rounds(bench, transfer.start_load, move)
            found[f"{name}_GBps"] = count * shape.layers * shape.piece / seconds / 1e9
        bench.say(f"load of {piece} KiB pieces", **found)
        transfer.close()


def measure_constants(bench: Bench) -> None:
    """Loads of 16 KiB pieces: by a kernel of other sizes, and by either way for a few pieces."""
    if bench.left() < 30 and not bench.dry:
        return
    piece, count = (256, 8) if bench.dry else (16 << 10, 4096)
    transfer = prepared(bench, caches(bench, Shape("", 1, piece, False), 2 * count), 2 * count)

    def seconds(pieces: int) -> float:
        order = np.arange(pieces, dtype=np.int64)
        return rounds(bench, transfer.start_load, Move(0, order * piece, 2 * order))[0]

    for name, values in {"PROGRAMS": (4, 8, 16, 32, 64), "_WORDS": (256, 512, 1024, 2048)}.items():
        for value in values:
            with constants(cuda, **WAYS["kernel"]), constants(kernels, **{name: value}):
                bench.say(f"kernel with {name} {value}", GBps=count * piece / seconds(count) / 1e9)
    for pieces in (1, 4, 8, 16, 32, 64):
        found = {}
        for name, values in WAYS.items():
            with constants(cuda, **values):
                found[f"{name}_us"] = seconds(min(pieces, count)) * 1e6
        bench.say(f"load of {pieces} pieces", **found)
    transfer.close()


def measure_behind(bench: Bench) -> None:
    """How long the calling thread takes to submit while the device is busy: an engine's forward is under way
    then, and must not be waited for. `busy`: whether the device still was at the end, in all rounds."""
    for outermost in (True, False):
        shape = Shape("", 4, 1 << 10, outermost) if bench.dry else Shape("", 32, 64 << 10, outermost)
        count, move = next(batches(bench, shape))
        transfer = prepared(bench, caches(bench, shape, count + 1), count + 1)
        order = [f"layer {n}" for n in range(shape.layers)]
        figures: Row = {}
        for name, start in (
            ("save", transfer.start_save),
            ("load", transfer.start_load),
            ("layers", lambda moves, transfer=transfer, order=order: transfer.start_load(moves, order)),
        ):
            took, busy = [], True
            for _ in range(bench.rounds):
                reached = occupied(bench)
                began = time.perf_counter()
                pending = start([move])
                took.append(time.perf_counter() - began)
                busy = busy and not reached.query()
                pending.wait()
            figures |= {f"{name}_submit_ms": max(took) * 1e3, f"{name}_busy": busy}
        bench.say(
            f"submitted behind a forward, {'BLHNC' if outermost else 'LBNHC'}, {count} blocks", **figures
        )
        transfer.close()


def occupied(bench: Bench) -> Event:
    """Keep the device busy: one kernel of about 0.2 s, and as many short ones as a forward has. Their end."""
    bench.settle()
    if not bench.dry:
        torch.cuda._sleep(400_000_000)  # cycles
        target = bench.random(1 << 10)
        for _ in range(500):
            target.fill_(1)
    return bench.backend.current().record_event()


def measure_overlap(bench: Bench) -> None:
    """A load of 8k tokens behind a forward of Llama-8B's shape: the share of its time that is hidden."""
    shape = Shape("", 4, 4 << 10, False) if bench.dry else SHAPES[0]
    hidden, inner, tokens = (64, 128, 16) if bench.dry else (4096, 14336, 2048)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    up = torch.ones(hidden, inner, dtype=dtype, device=bench.device)
    down = torch.ones(inner, hidden, dtype=dtype, device=bench.device)
    square = torch.ones(hidden, hidden, dtype=dtype, device=bench.device)
    count = min(8 if bench.dry else 512, bench.nbytes // (shape.layers * shape.piece))
    for outermost in (False, True):
        layers = caches(bench, shape._replace(outermost=outermost), count + 1)
        transfer = prepared(bench, layers, count + 1)
        size = transfer.layouts[0].block_bytes
        move = Move(0, np.arange(count, dtype=np.int64) * size, np.arange(count, dtype=np.int64))

        def forward(transfer: CudaTransfer = transfer) -> None:
            x = torch.ones(tokens, hidden, dtype=dtype, device=bench.device)
            for n in range(shape.layers):
                transfer.arrive(f"layer {n}")
                x = x @ square @ square @ up @ down * 1e-9
            transfer.end_forward()

        def together(transfer: CudaTransfer = transfer, move: Move = move, forward: Any = forward) -> None:
            transfer.start_load([move], [f"layer {n}" for n in range(shape.layers)])
            forward()

        alone, both = median(bench, forward), median(bench, together)
        load, _ = rounds(bench, transfer.start_load, move)
        bench.say(
            f"overlap, {'BLHNC' if outermost else 'LBNHC'}, {count} blocks behind {tokens} tokens",
            load_ms=load * 1e3,
            forward_ms=alone * 1e3,
            both_ms=both * 1e3,
            hidden=1 - (both - alone) / load,
        )
        measure_waits(bench, "load", together)
        measure_waits(bench, "save", lambda transfer=transfer, move=move: transfer.start_save([move]))
        transfer.close()


def measure_waits(bench: Bench, name: str, action: Callable[[], object]) -> None:
    """What a profile of one step shows of the calling thread waiting for the device: nothing, it should."""
    kinds = torch.profiler.ProfilerActivity
    bench.settle()
    with torch.profiler.profile(activities=[kinds.CPU] if bench.dry else [kinds.CPU, kinds.CUDA]) as profile:
        action()
    waits = {event.key: event.count for event in profile.key_averages() if "Synchronize" in event.key}
    bench.say(f"waits in one step with a {name} (the profiler's own end adds one)", calls=str(waits))


if __name__ == "__main__":
    sys.exit(main())
