"""Copies beside an engine that computes: what they hold up, what is hidden, what waits, what a graph that is
captured makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import SHAPES, Bench, Row, Shape, batches, caches, median, prepared, rounds
from kvkeep.transfer.base import Move
from kvkeep.transfer.cuda import CudaTransfer
from kvkeep.transfer.pinning import Pinning
from kvkeep.transfer.streams import Event

__all__ = ["measure_behind", "measure_capture", "measure_overlap"]

_BEHIND = (
    (Shape("BLHNC, 64 KiB", 32, 64 << 10, True), 0),
    (Shape("LBNHC, 64 KiB", 32, 64 << 10, False), 0),
    (Shape("LBNHC, 16 KiB", 32, 16 << 10, False), 0),
    (Shape("LBNHC, 16 KiB", 32, 16 << 10, False), 1),
)
"""And which of `batches`: the last has 65,536 pieces, no two of them one copy."""
_WAITING = ("Synchronize", "cudaMalloc", "cudaFree", "HostAlloc", "HostRegister", "cudaMemcpy", "cuMemcpy")
"""Calls that wait for the device, or may; of copies those that are not `Async`."""


def measure_behind(bench: Bench) -> None:
    """How long the calling thread takes to submit while the device is busy: an engine's forward is under way
    then, and must not be waited for. `busy`: whether the device still was at the end, in all rounds."""
    for shape, which in _BEHIND:
        if bench.left() < 60 and not bench.dry:
            return
        small = shape._replace(layers=4, piece=shape.piece >> 6) if bench.dry else shape
        count, move = list(batches(bench, small))[which]
        transfer = prepared(bench, caches(bench, small, count + 1), count + 1)
        order = [f"layer {n}" for n in range(small.layers)]
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
        pieces = count * small.layers
        bench.say(f"submitted behind a forward, {shape.name} pieces", pieces=pieces, **figures)


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


def measure_waits(bench: Bench, name: str, action: Callable[[], object]) -> None:
    """What a profile of one step shows of the calling thread waiting for the device: nothing, it should."""
    kinds = torch.profiler.ProfilerActivity
    bench.settle()
    with torch.profiler.profile(activities=[kinds.CPU] if bench.dry else [kinds.CPU, kinds.CUDA]) as profile:
        action()
    waits = {
        event.key: event.count
        for event in profile.key_averages()
        if any(call in event.key for call in _WAITING) and "Async" not in event.key
    }
    bench.say(f"waits in one step with a {name} (the profiler's own end adds one)", calls=str(waits))


def measure_capture(bench: Bench) -> None:
    """Graphs captured beside a registration, as vLLM does: in torch's default mode, which a call of another
    thread may break; and replayed. An error here would end the engine there."""
    nbytes, step = (1 << 18, 1 << 14) if bench.dry else (1 << 30, 16 << 20)
    memory, fd = bench.arena(nbytes)
    pins = Pinning(bench.backend, memory, step)
    target = torch.zeros(1 << 16, dtype=torch.int64, device=bench.device)
    thread, captured, figures = pins.start(fd), 0, Row()
    try:
        while thread.is_alive() or not captured:
            target.zero_()
            replay = capture(bench, target)
            captured += 1
            target.zero_()
            replay()
            figures["equal"] = bool((target == 200).all())
            bench.wrong += not figures["equal"]
    except RuntimeError as error:
        bench.wrong += 1
        figures["failed"] = str(error)
    thread.join()
    bench.say(
        "graphs captured beside a registration", graphs=captured, share=pins.registered / nbytes, **figures
    )
    pins.close()


def capture(bench: Bench, target: torch.Tensor) -> Callable[[], object]:
    """Add 200 in as many kernels, captured."""

    def add() -> None:
        for _ in range(200):
            target.add_(1)

    if bench.dry:
        return add
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        add()
    return graph.replay
