"""`kvkeep bench copy`: blocks of paged KV ⇄ arena, as a share of the speed of one plain memcpy.

Geometries are those of real models as vLLM's CPU backend lays them out: one tensor per layer, K and
V side by side. Block ids are random, slots lie one behind the other, all memory is warm. A memcpy of
as many bytes, between the arena and one flat buffer, takes turns with each copy: whatever else the
machine does falls on both.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvbench.memory import arena
from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.transfer import Transfer, make_transfer
from kvkeep.transfer.reference import ReferenceTransfer

__all__ = ["add_arguments", "run"]

_REFERENCE_ROUNDS = 3


class Geometry(NamedTuple):
    """A model's KV cache in bfloat16, at one block size."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int

    @property
    def piece_bytes(self) -> int:
        """Bytes of one block in one layer, K and V together: what is contiguous."""
        return self.kv_heads * self.block_tokens * 2 * self.head_dim * 2


GEOMETRIES = (
    Geometry("small, block 16", 30, 3, 64, 16),  # SmolLM2-135M
    Geometry("small, block 128", 30, 3, 64, 128),
    Geometry("large, block 16", 32, 8, 128, 16),  # Llama-3-8B
    Geometry("large, block 128", 32, 8, 128, 128),
)


class Case(NamedTuple):
    """One geometry in one direction; seconds per round."""

    geometry: Geometry
    direction: str
    engine: str
    nbytes: int
    copy_s: list[float]
    memcpy_s: list[float]
    reference_s: list[float]

    @property
    def ratio(self) -> float:
        """Our speed as a share of memcpy's, by medians: 1 is as fast, more is faster."""
        return float(np.median(self.memcpy_s) / np.median(self.copy_s))

    @property
    def best_ratio(self) -> float:
        """The same by each one's best round."""
        return min(self.memcpy_s) / min(self.copy_s)

    def speed(self, seconds: list[float]) -> float:
        """GB/s by the median."""
        return self.nbytes / float(np.median(seconds)) / 1e9


class Bed:
    """What one geometry is measured on: about `nbytes` in slots, twice as much paged KV."""

    def __init__(self, geometry: Geometry, nbytes: int) -> None:
        block_bytes = geometry.layers * geometry.piece_bytes
        self.geometry = geometry
        self.count = max(1, nbytes // block_bytes)
        self.nbytes = self.count * block_bytes
        self.num_blocks = 2 * self.count + 1
        shape = (self.num_blocks, geometry.kv_heads, geometry.block_tokens, 2 * geometry.head_dim)
        self.layers = [
            (f"layer.{number}", torch.empty(shape, dtype=torch.bfloat16)) for number in range(geometry.layers)
        ]
        self.arena = arena(self.nbytes)
        self.slots = torch.frombuffer(self.arena, dtype=torch.uint8)
        self.flat = torch.ones(self.nbytes + 2 * mmap.PAGESIZE, dtype=torch.uint8)
        self.blocks = np.random.default_rng(0).permutation(self.num_blocks)[: self.count].astype(np.int64)
        self.offsets = np.arange(self.count, dtype=np.int64) * block_bytes

    def fill(self, generator: torch.Generator) -> None:
        """New random bytes in all of the paged KV."""
        for _, tensor in self.layers:
            tensor.view(torch.int32).random_(generator=generator)

    def mover(self, transfer: Transfer, direction: str) -> Callable[[], object]:
        """One copy of all blocks; `direction`: "save" or "load"."""
        move = transfer.save if direction == "save" else transfer.load
        return lambda: move(0, self.offsets, self.blocks)

    def memcpy(self, direction: str, pool: ThreadPoolExecutor | None, threads: int) -> Callable[[], object]:
        """As many bytes between the same arena and the flat buffer, in one call per thread.

        The two lie half a page apart, where memcpy is at its best: with a target 64 bytes into its page
        and a source at the start of one, glibc 2.36 falls from 16 to 3 GB/s on an AMD EPYC.
        """
        memmove = ctypes.CDLL(None).memmove
        memmove.argtypes, memmove.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None
        flat = self.flat.data_ptr()
        ends = (self.slots.data_ptr(), flat + (mmap.PAGESIZE // 2 - flat) % mmap.PAGESIZE)
        target, source = ends if direction == "save" else ends[::-1]
        if pool is None:
            return lambda: memmove(target, source, self.nbytes)
        cuts = [self.nbytes * part // threads for part in range(threads + 1)]
        spans = [(cut, stop - cut) for cut, stop in itertools.pairwise(cuts)]

        def parallel() -> None:
            waiting = [pool.submit(memmove, target + at, source + at, size) for at, size in spans[1:]]
            memmove(target, source, spans[0][1])
            for future in waiting:
                future.result()

        return parallel

    def verify(self) -> None:
        """Raise KVKeepError unless each slot holds the bytes of its block, layer after layer."""
        rows, at, chosen = self.slots.view(self.count, -1), 0, torch.from_numpy(self.blocks)
        for name, tensor in self.layers:
            paged = tensor.view(torch.uint8).view(self.num_blocks, -1)
            if not torch.equal(rows[:, at : at + paged.shape[1]], paged[chosen]):
                raise KVKeepError(f"{self.geometry.name}: the bytes of {name} differ after the copy")
            at += paged.shape[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep bench copy`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--threads", type=int, default=1, help="threads of ours, and of memcpy (default: 1)")
    parser.add_argument("--repeat", type=int, default=15, help="rounds per case (default: 15)")
    parser.add_argument("--size", default="256MiB", help="bytes per case and thread (default: 256MiB)")


def run(args: argparse.Namespace) -> int:
    """Measure all geometries in both directions; returns 0. Wrong bytes raise KVKeepError."""
    if min(args.threads, args.repeat) < 1:
        raise ConfigError("--threads and --repeat must be 1 or more")
    # Per thread: libc streams its stores only above a size, and no thread's share is to fall below it.
    size, cases, before = parse_bytes(args.size) * args.threads, list[Case](), torch.get_num_threads()
    torch.set_num_threads(args.threads)  # what the reference copies with
    try:
        with _progress() as progress:
            task = progress.add_task("", total=len(GEOMETRIES))
            for geometry in GEOMETRIES:
                progress.update(task, description=geometry.name)
                cases += _measure(geometry, size, args.threads, args.repeat, reference=not args.json)
                progress.advance(task)
    finally:
        torch.set_num_threads(before)
    if args.json:
        print(json.dumps(_as_json(cases, args.threads)))
    else:
        Console().print(_as_table(cases, args.threads, args.repeat))
    return 0


def _measure(geometry: Geometry, size: int, threads: int, repeat: int, reference: bool) -> list[Case]:
    bed, generator, cases = Bed(geometry, size), torch.Generator().manual_seed(1), []
    transfer = make_transfer([bed.layers], bed.num_blocks, bed.arena, threads)
    slow = ReferenceTransfer([bed.layers], bed.num_blocks, bed.arena)
    pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
    bed.fill(generator)
    for direction in ("save", "load"):
        copy, memcpy = bed.mover(transfer, direction), bed.memcpy(direction, pool, threads)
        if direction == "load":
            bed.slots.copy_(bed.slots.flip(0))  # not what the blocks hold: a load must change them
        copy()
        bed.verify()
        memcpy()
        rounds = [(_seconds(copy), _seconds(memcpy)) for _ in range(repeat)]
        beside = bed.mover(slow, direction)
        slow_s = [_seconds(beside) for _ in range(_REFERENCE_ROUNDS)] if reference else []
        copy_s, memcpy_s = ([entry[column] for entry in rounds] for column in (0, 1))
        cases.append(Case(geometry, direction, transfer.name, bed.nbytes, copy_s, memcpy_s, slow_s))
    if pool is not None:
        pool.shutdown()
    return cases


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _as_json(cases: list[Case], threads: int) -> dict[str, object]:
    rows = [
        {
            "name": case.geometry.name,
            "direction": case.direction,
            "engine": case.engine,
            "bytes": case.nbytes,
            "block_bytes_per_layer": case.geometry.piece_bytes,
            "seconds": float(np.median(case.copy_s)),
            "memcpy_GBps": case.speed(case.memcpy_s),
            "ratio": case.ratio,
            "best_ratio": case.best_ratio,
        }
        for case in cases
    ]
    return {"threads": threads, "cases": rows, "worst_ratio": min(case.ratio for case in cases)}


def _as_table(cases: list[Case], threads: int, repeat: int) -> Table:
    title = f"Paged KV ⇄ arena by the {cases[0].engine} engine, {threads} thread(s), {repeat} rounds each"
    worst = min(case.ratio for case in cases)
    table = Table(title=title, caption=f"GB/s by the median; 1.00 is memcpy's speed; worst {worst:.2f}")
    headings = "case", "KiB per block and layer", "", "kvkeep", "memcpy", "of memcpy", "best", "reference"
    for heading in headings:
        table.add_column(heading, justify="left" if heading in {"case", ""} else "right")
    for case in cases:
        table.add_row(
            case.geometry.name,
            f"{case.geometry.piece_bytes / 1024:g}",
            case.direction,
            f"{case.speed(case.copy_s):.1f}",
            f"{case.speed(case.memcpy_s):.1f}",
            f"{case.ratio:.2f}",
            f"{case.best_ratio:.2f}",
            f"{case.speed(case.reference_s):.1f}",
        )
    return table


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
