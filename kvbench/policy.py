"""`kvkeep bench policy TRACE`: eviction policies on a trace of requests, next to the best possible.

Each request looks its blocks up, then saves those that were not held, as the keeper does
(kvbench.replay), at a capacity counted in blocks. A block counts as hit when it and all blocks before it
were held.
"""

import argparse
import heapq
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvbench.replay import Replayer
from kvbench.trace import FORMAT, Trace, read_trace
from kvkeep.keeper.policy import DEFAULT_POLICY, POLICIES, make_policy
from kvkeep.keeper.policy.base import Ids

BELADY = "belady"


class Result(NamedTuple):
    """One cell of the table. `ns_per_block` is None where no policy ran."""

    policy: str
    capacity_fraction: float
    hit_ratio: float
    ns_per_block: float | None


def belady_hits(trace: Trace, capacity: int) -> int:
    """Return the most blocks that any policy could hit with room for `capacity` blocks.

    What is used again last goes first, newcomers included, and of one request's blocks the deepest.
    A block is never used again sooner than the block before it, so no chain is ever broken.

    Source: L. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """
    hits, ranks, heap = 0, dict[int, int](), list[tuple[int, int]]()
    requests = zip(trace.chains, trace.asked, trace.local, _next_uses(trace), strict=True)
    for chain, asked, local, following in requests:
        blocks = chain.tolist()
        held = next((depth for depth, block in enumerate(blocks[:asked]) if block not in ranks), asked)
        hits += max(0, held - local)
        for depth, (block, use) in enumerate(zip(blocks, following.tolist(), strict=True)):
            if use < 0:
                ranks.pop(block, None)  # Never used again.
            else:
                ranks[block] = -((use << 32) + depth)
                heapq.heappush(heap, (ranks[block], block))
        while len(ranks) > capacity:
            rank, block = heapq.heappop(heap)
            if ranks.get(block) == rank:
                del ranks[block]
    return hits


def _next_uses(trace: Trace) -> list[Ids]:
    """Return, for each block of each request, the next request that uses it, or -1."""
    later = np.full(trace.unique, -1, dtype=np.int64)
    uses = []
    for index in range(len(trace.chains) - 1, -1, -1):
        chain = trace.chains[index]
        uses.append(later[chain])
        later[chain] = index
    return uses[::-1]


def measure(trace: Trace, policy: str, fraction: float) -> Result:
    """Replay the trace under one policy, or Belady's, with room for a fraction of its unique blocks."""
    capacity = max(1, round(fraction * trace.unique))
    if policy == BELADY:
        return Result(policy, fraction, belady_hits(trace, capacity) / trace.blocks, None)
    replay = Replayer(make_policy(policy, capacity), trace, capacity).run(trace)
    return Result(policy, fraction, replay.hits / trace.blocks, replay.policy_ns / trace.blocks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvkeep bench policy`."""
    parser.add_argument("trace", metavar="TRACE", type=Path, help=f"the trace: {FORMAT}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--policies",
        type=policies,
        default=list(POLICIES),
        metavar="NAMES",
        help=f"which policies, with commas between (default: {','.join(POLICIES)})",
    )
    parser.add_argument(
        "--capacities",
        type=_fractions,
        default=[0.01, 0.05, 0.1, 0.25],
        metavar="FRACTIONS",
        help="room, as fractions of the trace's unique blocks (default: 0.01,0.05,0.1,0.25)",
    )


def run(args: argparse.Namespace) -> int:
    """Replay the trace and print the hit ratios; returns 0. Raises TraceError where it is unusable."""
    trace = read_trace(args.trace)
    cells = [(policy, fraction) for policy in [*args.policies, BELADY] for fraction in args.capacities]
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(cells))
        results = []
        for policy, fraction in cells:
            progress.update(task, description=f"{policy} at {fraction:.0%}")
            results.append(measure(trace, policy, fraction))
            progress.advance(task)
    if args.json:
        print(json.dumps(_as_json(args.trace, trace, results)))
    else:
        Console().print(_as_table(args.trace, trace, results))
    return 0


def _as_json(path: Path, trace: Trace, results: list[Result]) -> dict[str, object]:
    fields = Result._fields[:3]
    rows = [dict(zip(fields, result, strict=False)) for result in results]
    return {"trace": str(path), "unique_blocks": trace.unique, "default": DEFAULT_POLICY, "results": rows}


def _as_table(path: Path, trace: Trace, results: list[Result]) -> Table:
    title = f"{path.name}: {len(trace.chains)} requests, {trace.blocks} blocks, {trace.unique} unique"
    table = Table(
        title=title, caption="Hit ratio by room, as a share of the unique blocks; ns of policy per block"
    )
    table.add_column("policy")
    for fraction in dict.fromkeys(result.capacity_fraction for result in results):
        table.add_column(f"{100 * fraction:g} %", justify="right")
    table.add_column("ns/op", justify="right")
    for policy in dict.fromkeys(result.policy for result in results):
        row = [result for result in results if result.policy == policy]
        costs = [result.ns_per_block for result in row if result.ns_per_block is not None]
        cost = f"{sum(costs) / len(costs):.0f}" if costs else "-"
        name = f"{policy} (default)" if policy == DEFAULT_POLICY else policy
        table.add_row(name, *(f"{result.hit_ratio:.3f}" for result in row), cost)
    return table


def policies(text: str) -> list[str]:
    """Names of policies with commas between, as an argument."""
    names = text.split(",")
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        known = ", ".join(POLICIES)
        raise argparse.ArgumentTypeError(f"unknown policy {unknown[0]!r}; the known ones are {known}")
    return names


def _fractions(text: str) -> list[float]:
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas between") from error
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is not above 0 and at most 1")
    return fractions
