"""Copies beside what the machine can do: ceilings, registration, save and load by layout, the kernel; and
whether the bytes are right."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.gpu.bench import Bench, Row, Shape, batches, caches, constants, median, prepared, rounds
from kvkeep.transfer import cuda, kernels
from kvkeep.transfer.base import Move
from kvkeep.transfer.pinning import Pinning
from kvkeep.transfer.reference import ReferenceTransfer

__all__ = ["measure_ceilings", "measure_constants", "measure_kernel", "measure_registration", "measure_shape"]


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
    pins = Pinning(bench.backend, bench.memory, step >> 12 if bench.dry else step)
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


def measure_shape(bench: Bench, shape: Shape, ceilings: dict[str, float]) -> None:
    """Save and load, as ratios to the ceilings. What is saved equals what the reference saves, and comes back
    as it was, to no other block."""
    if bench.dry:
        shape = shape._replace(layers=4, piece=shape.piece // 64)
    for number, (count, move) in enumerate(batches(bench, shape)):
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
                equal = number > 0 or same_as_reference(bench, layers, move)  # slow: once
                for _, tensor in layers:
                    tensor.zero_()
            seconds, submitting = rounds(bench, start, move)
            speed = count * shape.layers * shape.piece / seconds / 1e9
            figures |= {
                f"{name}_GBps": speed,
                f"{name}_ratio": speed / ceilings[name],
                f"{name}_ms": submitting * 1e3,
            }
        other = (set(range(count + 1)) - set(move.blocks.tolist())).pop()
        for old, (_, tensor) in zip(before, layers, strict=True):
            equal = equal and torch.equal(old, tensor[chosen]) and not tensor[other].any()
        bench.wrong += not equal
        bench.say(f"{shape.name}, {count} blocks", **figures, equal=equal)


def same_as_reference(bench: Bench, layers: list[tuple[str, torch.Tensor]], move: Move) -> bool:
    """Whether the arena's first half holds what the reference writes to its second."""
    reference = ReferenceTransfer([layers], len(layers[0][1]), bench.memory[bench.nbytes :])
    nbytes = reference.save(*move)
    whole = torch.frombuffer(bench.memory, dtype=torch.uint8)
    return torch.equal(whole[:nbytes], whole[bench.nbytes : bench.nbytes + nbytes])


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


def measure_constants(bench: Bench) -> None:
    """Loads of 16 KiB pieces: by a kernel of other sizes, and by either way for a few pieces."""
    if bench.left() < 30 and not bench.dry:
        return
    piece, count = (256, 8) if bench.dry else (16 << 10, 4096)
    transfer = prepared(bench, caches(bench, Shape("", 1, piece, False), 2 * count), 2 * count)

    def seconds(pieces: int) -> float:
        order = np.arange(pieces, dtype=np.int64)
        return rounds(bench, transfer.start_load, Move(0, order * piece, 2 * order))[0]

    sizes = {"PROGRAMS": (4, 8, 16, 32, 64), "_WORDS": (256, 512, 1024, 2048), "_WARPS": (4, 8)}
    for name, values in sizes.items():
        for value in values:
            with constants(cuda, **WAYS["kernel"]), constants(kernels, **{name: value}):
                bench.say(f"kernel with {name} {value}", GBps=count * piece / seconds(count) / 1e9)
    for pieces in (1, 4, 8, 16, 32, 64):
        found = {}
        for name, values in WAYS.items():
            with constants(cuda, **values):
                found[f"{name}_us"] = seconds(min(pieces, count)) * 1e6
        bench.say(f"load of {pieces} pieces", **found)
