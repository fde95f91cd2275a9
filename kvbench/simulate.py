"""`kvkeep bench simulate TRACE`: how much memory and disk a workload needs, from a trace of its requests.

Replays the trace through a model of the keeper (kvbench.replay) for each memory, disk and policy, and says
what that would have hit, moved and saved. `benchmarks/simulator.py` does the same with a real keeper.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from kvbench.policy import policies
from kvbench.replay import Disk, Replayer
from kvbench.simulate_report import Answer, Result, Summary, as_json, as_table, save_plot
from kvbench.trace import FORMAT, Trace, read_trace
from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError
from kvkeep.keeper.arena import ALIGNMENT, MIN_SLABS, Arena
from kvkeep.keeper.policy import DEFAULT_POLICY, make_policy
from kvkeep.layout import chunk_blocks
from kvkeep.tiers.seal import SEAL_BYTES

__all__ = ["Sizes", "Speeds", "add_arguments", "run", "simulate"]

_ENGINE_BLOCK = 16  # tokens: vLLM's default on GPUs


class _Heads(NamedTuple):
    layers: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2  # bfloat16

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * self.element_bytes  # keys and values


MODELS = {
    "smollm2": _Heads(30, 3, 64),
    "qwen2.5-7b": _Heads(28, 4, 128),
    "llama-8b": _Heads(32, 8, 128),
    "llama-70b": _Heads(80, 8, 128),
}
DEFAULT_MODEL = "llama-8b"


class Sizes(NamedTuple):
    """What a trace's block takes. A keeper's chunk may be smaller: room is counted in chunks."""

    block_tokens: int
    block_bytes: float
    chunk_tokens: int

    @classmethod
    def choose(
        cls, trace: Trace, bytes_per_token: float | None, chunk_tokens: int | None, model: str | None
    ) -> "Sizes":
        """As told; else as the trace says of itself; else of the default model."""
        if bytes_per_token is None and model is not None:
            bytes_per_token = MODELS[model].bytes_per_token
        recorded = trace.block_bytes is not None and bytes_per_token is None
        if bytes_per_token is None:
            default = MODELS[DEFAULT_MODEL].bytes_per_token
            bytes_per_token = trace.block_bytes / trace.block_tokens if trace.block_bytes else default
        if chunk_tokens is None:
            fewest = _ENGINE_BLOCK * chunk_blocks(math.ceil(_ENGINE_BLOCK * bytes_per_token))
            chunk_tokens = trace.block_tokens if recorded else fewest
        return cls(trace.block_tokens, bytes_per_token * trace.block_tokens, chunk_tokens)

    def blocks(self, chunks: int) -> int:
        """How many blocks of the trace so many chunks are; at least one, or ConfigError."""
        if (blocks := chunks * self.chunk_tokens // self.block_tokens) < 1:
            raise ConfigError(
                f"a size that holds less than one block of the trace ({self.block_bytes / 2**20:.2f} MiB): "
                "give --memory and --disk more"
            )
        return blocks

    def memory(self, nbytes: int, tiers: bool) -> tuple[int, int]:
        """Blocks that an arena of `nbytes` has room for, and that its policy is told of."""
        arena = Arena(nbytes)
        kind = arena.size_class(self._chunk_bytes + (SEAL_BYTES if tiers else 0))
        slots = arena.nbytes // arena.slab_bytes * kind.slots_per_slab
        return self.blocks(slots), self.blocks(arena.nbytes // kind.slot_bytes)

    def disk(self, nbytes: int) -> int:
        """Blocks that a directory of this capacity has room for: each value is a slot, in whole pages."""
        return self.blocks(nbytes // self._value_bytes)

    @property
    def least(self) -> int:
        """The smallest arena, in bytes, that holds a block; a directory of so many holds one too."""
        return math.ceil(self.block_tokens / self.chunk_tokens / MIN_SLABS) * MIN_SLABS * self._value_bytes

    @property
    def _value_bytes(self) -> int:
        return math.ceil((self._chunk_bytes + SEAL_BYTES) / ALIGNMENT) * ALIGNMENT

    @property
    def _chunk_bytes(self) -> int:
        return math.ceil(self.block_bytes * self.chunk_tokens / self.block_tokens)


class Speeds(NamedTuple):
    """What time is counted with."""

    prefill_tokens_per_s: float
    memory_gbps: float
    disk_gbps: float

    def worth(self, sizes: Sizes) -> float:
        """Blocks that can be read from disk in the time that computing one takes."""
        compute = sizes.block_tokens / self.prefill_tokens_per_s
        return compute * self.disk_gbps * 1e9 / sizes.block_bytes


class Cell(NamedTuple):
    """One case. Bytes of memory and of disk (0: none)."""

    policy: str
    memory: int
    disk: int


def simulate(
    trace: Trace,
    cell: Cell,
    sizes: Sizes,
    speeds: Speeds,
    second_touch: bool = False,
    request_done: Callable[[], object] = lambda: None,
) -> Result:
    """Replay the trace in one case. Raises ConfigError for a size that holds nothing."""
    room, capacity = sizes.memory(cell.memory, bool(cell.disk))
    disk = Disk(sizes.disk(cell.disk), trace.unique, second_touch) if cell.disk else None
    replayer = Replayer(make_policy(cell.policy, capacity), trace, room, disk, speeds.worth(sizes))
    replay = replayer.run(trace, request_done)
    loaded, kept, read, written = (
        round(blocks * sizes.block_bytes)
        for blocks in (replay.hits, replay.saved, replay.disk_read, replay.disk_written)
    )
    reading = loaded / (speeds.memory_gbps * 1e9) + read / (speeds.disk_gbps * 1e9)
    saved = replay.hit_tokens / speeds.prefill_tokens_per_s - reading
    lengths = zip(trace.lengths, trace.local, strict=True)
    computed = sum(max(0, length - local * sizes.block_tokens) for length, local in lengths)
    prefill = computed / speeds.prefill_tokens_per_s
    return Result(
        cell.policy,
        cell.memory,
        cell.disk,
        replay.hits / trace.blocks,
        replay.disk_hits / trace.blocks,
        loaded,
        kept,
        read,
        written,
        saved / len(trace.chains),
        saved / prefill if prefill > 0 else 0.0,
    )


def answer(results: list[Result], best: float, goal: float) -> Answer:
    """The least memory without disk, and the least with any, that reach `goal` of the best hit ratio."""
    reached = sorted(
        (result for result in results if result.hit_ratio >= goal * best),
        key=lambda result: (result.memory_bytes, result.disk_bytes, -result.hit_ratio),
    )
    alone = [result for result in reached if not result.disk_bytes]
    return Answer(goal, [*alone[:1], *[result for result in reached[:1] if result.disk_bytes]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvkeep bench simulate`."""
    add = parser.add_argument
    add("trace", metavar="TRACE", type=Path, help=f"the trace, or what serve --record wrote: {FORMAT}")
    add("--memory", type=_sizes, default="1%,2%,5%,10%,25%,50%,100%", metavar="SIZES",
        help="sizes with commas between: 8GiB, or 5%% of all distinct KV (default: %(default)s)")  # fmt: skip
    add("--disk", type=_sizes, default="0,25%", metavar="SIZES",
        help="sizes of a directory below memory, 0: none (default: %(default)s)")  # fmt: skip
    add("--policies", type=policies, default=[DEFAULT_POLICY], metavar="NAMES",
        help=f"which policies, with commas between (default: {DEFAULT_POLICY})")  # fmt: skip
    add("--write", choices=("through", "second-touch"), default="through",
        help="what is written to disk: all, or what was used again (default: %(default)s)")  # fmt: skip
    add("--model", choices=list(MODELS), help=f"whose KV it is, in bfloat16 (default: {DEFAULT_MODEL})")
    add("--bytes-per-token", type=_positive, metavar="N", help="bytes of KV per token, instead of a model")
    add("--chunk-tokens", type=int, metavar="N",
        help="tokens per chunk of the keeper (default: blocks of 16 up to about 1 MiB)")  # fmt: skip
    add("--prefill-tokens-per-s", type=_positive, default=10_000.0, metavar="N",
        help="how fast the engine computes (default: 10000)")  # fmt: skip
    add("--memory-gbps", type=_positive, default=12.0, metavar="N",
        help="GB/s from the keeper's memory to the engine (default: 12)")  # fmt: skip
    add("--disk-gbps", type=_positive, default=2.0, metavar="N",
        help="GB/s from disk to memory (default: 2)")  # fmt: skip
    add("--goal", type=_positive, default=0.9, metavar="SHARE",
        help="share of the best possible hit ratio that the answer is about (default: 0.9)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--plot", type=Path, metavar="FILE.png", help="draw hit ratio over memory, a line per disk and policy"
    )


def run(args: argparse.Namespace) -> int:
    """Simulate all cases and print them; returns 0. Raises TraceError where the trace is unusable."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        trace = _read(args.trace, progress)
        sizes = Sizes.choose(trace, args.bytes_per_token, args.chunk_tokens, args.model)
        speeds = Speeds(args.prefill_tokens_per_s, args.memory_gbps, args.disk_gbps)
        cells = list(_cells(args, trace.unique * sizes.block_bytes, sizes.least))
        task = progress.add_task("", total=(len(cells) + 1) * len(trace.chains))
        progress.update(task, description="room for everything")
        best = Replayer(make_policy(DEFAULT_POLICY, trace.unique), trace, trace.unique).run(
            trace, lambda: progress.advance(task)
        )
        results = list[Result]()
        for cell in cells:
            progress.update(task, description=f"{cell.policy}, {len(results) + 1} of {len(cells)}")
            touch = args.write == "second-touch"
            results.append(simulate(trace, cell, sizes, speeds, touch, lambda: progress.advance(task)))
    ratio = best.hits / max(1, trace.blocks)
    summary = Summary(args.trace, trace, sizes, speeds, args.write, ratio, answer(results, ratio, args.goal))
    if args.plot is not None:
        save_plot(args.plot, summary, results)
    if args.json:
        print(json.dumps(as_json(summary, results)))
    else:
        console = Console()
        console.print(as_table(summary, results))
        console.print(summary.answer.text(ratio), highlight=False)
    return 0


def _read(path: Path, progress: Progress) -> Trace:
    task = progress.add_task("reading", total=path.stat().st_size if path.is_file() else None)
    trace = read_trace(path, lambda nbytes: progress.advance(task, nbytes))
    progress.remove_task(task)
    return trace


def _cells(args: argparse.Namespace, distinct_bytes: float, least: int) -> Iterator[Cell]:
    for policy, disk, memory in product(args.policies, args.disk, args.memory):
        # A share may be less than any keeper can have; a size is taken as it was given.
        sizes = (size if size >= 0 else max(least, -size * distinct_bytes) for size in (memory, disk))
        yield Cell(policy, *map(round, sizes))


def _sizes(text: str) -> list[float]:
    """Bytes; or, below 0, shares of all distinct KV."""
    try:
        parts = [part.strip() for part in text.split(",")]
        sizes = [-float(part[:-1]) / 100 if part.endswith("%") else parse_bytes(part) for part in parts]
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of sizes; write 8GiB,32GiB or 5%,25%"
        ) from error
    if not np.isfinite(sizes).all() or any(part.startswith("-") for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} has a size that is not 0 or more")
    return sizes


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0")
    return value
