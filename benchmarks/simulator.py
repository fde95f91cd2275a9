#!/usr/bin/env python3
"""`kvkeep bench simulate` beside a real keeper: the same requests, capacities and policies through both.

    python benchmarks/simulator.py TRACE [--requests N]

The keeper is a process of its own with one-page chunks; its directory lies under the temporary directory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np

from kvbench.keeper import own_keeper
from kvbench.live import live_replay
from kvbench.simulate import Cell, Sizes, Speeds, simulate
from kvbench.trace import Trace, read_trace
from kvkeep.keeper.policy import POLICIES

PAGE = 4096
CASES = (
    (0.05, 0.0, "through"),
    (0.25, 0.0, "through"),
    (0.05, 0.25, "through"),
    (0.05, 0.25, "second-touch"),
)


def main() -> None:
    """Print a row per policy and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=1000, help="how many, from the trace's beginning")
    args = parser.parse_args()
    trace = first(read_trace(args.trace), args.requests)
    print(f"{args.trace.name}: {len(trace.chains)} requests, {trace.blocks} blocks, {trace.unique} distinct")
    print("policy  memory disk   write          keeper simulated  points  s keeper  s simulated")
    sizes = Sizes.choose(trace, 7, trace.block_tokens, None)
    for policy, (memory, disk, write) in product(POLICIES, CASES):
        cell = Cell(policy, *(round(share * trace.unique) * PAGE for share in (memory, disk)))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tier = ["--tier", f"fs://{folder}/kv?capacity={cell.disk}&write={write}"] if disk else []
            with own_keeper(cell.memory, "--policy", policy, *tier) as connection:
                live = live_replay(connection, trace).hits / trace.blocks
        between = time.perf_counter()
        simulated = simulate(trace, cell, sizes, Speeds(1e4, 12.0, 2.0), write == "second-touch").hit_ratio
        kind = write if disk else "-"
        print(
            f"{policy:7} {memory:5.0%} {disk:5.0%}   {kind:13} {live:.4f}    {simulated:.4f} "
            f"{100 * (simulated - live):+7.2f} {between - began:9.1f} {time.perf_counter() - between:12.2f}",
            flush=True,
        )


def first(trace: Trace, requests: int) -> Trace:
    """The trace's first requests, as prompts."""
    chains = trace.chains[:requests]
    blocks, dense = np.unique(np.concatenate(chains), return_inverse=True)
    return Trace.of(np.split(dense, np.cumsum([len(chain) for chain in chains])[:-1]), len(blocks))


if __name__ == "__main__":
    main()
