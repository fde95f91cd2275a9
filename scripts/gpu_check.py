#!/usr/bin/env python3
"""Measures kvkeep's copies on this machine's GPU, beside what the machine can do, and checks their bytes.

    python scripts/gpu_check.py [--json FILE] [--seconds 420] [--ttft MODULE:FUNCTION | --ttft ""]
    python scripts/gpu_check.py --dry      # tiny, without a GPU: the script itself runs

Needs torch, Triton and numpy and this package on the path, nothing installed; for time to first token also
transformers and what kvkeep depends on (msgspec, blake3, xxhash, rich), without which that part says so.
Prints a table as it comes, and writes each row to FILE as a line of JSON. Exit code 1 where bytes were wrong,
or a graph could not be captured. The parts are in benchmarks/gpu/.

`--ttft`: a function of (torch.device, seconds that are left, dry) that gives more rows, as dicts with `what`
and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.bench import SHAPES, Bench, machine
from benchmarks.gpu.beside import measure_behind, measure_capture, measure_overlap
from benchmarks.gpu.copies import (
    measure_ceilings,
    measure_constants,
    measure_kernel,
    measure_registration,
    measure_shape,
)
from kvkeep.errors import KVKeepError


def main() -> int:
    """Run all parts that the budget allows."""
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--json", type=Path, help="write the rows there, one a line")
    parser.add_argument("--seconds", type=float, default=420.0, help="budget (default: 420)")
    parser.add_argument(
        "--ttft", default="benchmarks.gpu.ttft:gpu_rows", help="MODULE:FUNCTION; empty: leave it out"
    )
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here; --dry runs without one", file=sys.stderr)
        return 2
    bench = Bench(args.dry, 1 << 18 if args.dry else 1 << 30, time.monotonic() + args.seconds)
    with args.json.open("w") if args.json else contextlib.nullcontext() as bench.written:
        run(bench, args.ttft)
        bench.say("wrong", count=bench.wrong)
    print(f"gpu-check: {'WRONG, see above' if bench.wrong else 'all bytes equal'}", file=sys.stderr)
    return 1 if bench.wrong else 0


def run(bench: Bench, ttft: str) -> None:
    """All parts, as far as the time goes."""
    bench.say("machine", **machine(bench))
    ceilings = measure_ceilings(bench)
    for step in (64 << 20, 256 << 20, 1 << 30):
        measure_registration(bench, step)
    for shape in SHAPES:
        measure_shape(bench, shape, ceilings)
    measure_kernel(bench)
    measure_behind(bench)
    measure_overlap(bench)
    measure_capture(bench)
    if ttft:
        measure_ttft(bench, ttft)
    measure_constants(bench)


def measure_ttft(bench: Bench, name: str) -> None:
    """Time to first token by load against recompute; what it lacks does not take the other figures away."""
    module, _, function = name.partition(":")
    try:
        measured = getattr(importlib.import_module(module), function)
        for row in measured(bench.device, bench.left(), bench.dry):
            bench.say(**row)
    except (ImportError, RuntimeError, KVKeepError) as error:
        bench.say("time to first token", failed=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
