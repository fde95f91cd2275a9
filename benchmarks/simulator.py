#!/usr/bin/env python3
"""`kvkeep bench simulate` beside a real keeper: the same requests, capacities and policies through both.

    python benchmarks/simulator.py TRACE [--requests N]

The keeper is a process of its own with one-page chunks; its directory lies under the temporary directory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from kvbench.servers import own_keeper
from kvbench.simulate import Cell, Sizes, Speeds, simulate
from kvbench.trace import Trace, read_trace
from kvkeep.identity import KEY_BYTES, fingerprint
from kvkeep.keeper.policy import POLICIES
from kvkeep.terms import Found
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

PAGE = 4096
CASES = (
    (0.05, 0.0, "through"),
    (0.25, 0.0, "through"),
    (0.05, 0.25, "through"),
    (0.05, 0.25, "second-touch"),
)


CHUNK_BYTES = 4000
"""With the seal of values below memory it still fits a page."""
_PATIENCE = 1e6


class Live(NamedTuple):
    """What a keeper gave: blocks that requests got, and the keeper's own figures afterwards."""

    hits: int
    figures: dict[str, Any]


def live_replay(
    connection: Connection, trace: Trace, request_done: Callable[[], object] = lambda: None
) -> Live:
    """Replay all requests, one after the other; the next one comes once tiers have what they shall get."""
    print_ = fingerprint({"bench": "simulate", "block_tokens": trace.block_tokens})
    space = connection.open_namespace(
        print_, "bench simulate", [(CHUNK_BYTES, None)], 1, 1, trace.block_tokens
    )
    keys = b"".join(blake3(b"block %d" % block).digest(KEY_BYTES) for block in range(trace.unique))
    hits = 0
    for chain, asked, local in zip(trace.chains, trace.asked, trace.local, strict=True):
        names = b"".join(keys[KEY_BYTES * block : KEY_BYTES * (block + 1)] for block in chain.tolist())
        found = _look_up(connection, space, names[: KEY_BYTES * asked], local)
        hits += found.chunks
        first = local + found.chunks if found.chunks else 0
        rest = names[KEY_BYTES * first :]
        reserved = connection.reserve(
            space, [Reservation(rest, [b"\1" * (len(rest) // KEY_BYTES)], first, found.epoch)]
        )[0]
        if found.lease:
            connection.release(found.lease, 0)
        if reserved.reservation:
            connection.commit(reserved.reservation, 0)
        _settle(connection)
        request_done()
    return Live(hits, connection.status())


def _look_up(connection: Connection, space: int, keys: bytes, local: int) -> Found:
    found = connection.lookup(space, keys, local, patience=_PATIENCE)
    if not found.ticket:
        return found
    while connection.poll([found.ticket]) != b"\2":
        time.sleep(0.0002)
    settled = connection.lookup(space, keys, local, patience=_PATIENCE, ticket=found.ticket)
    if found.lease:
        connection.release(found.lease)
    return settled


def _settle(connection: Connection) -> None:
    """Wait until no tier has anything to be written."""
    while any(tier["waiting_chunks"] for tier in connection.status()["tiers"]):  # type: ignore[attr-defined]
        time.sleep(0.0002)


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
