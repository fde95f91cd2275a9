"""`kvkeep bench tier`: a tier, sealed as the keeper uses it, as a share of the speed of its raw medium.

Random data in touched memory; each round puts one batch under new keys, gets it into other memory and
compares every byte, deletes it (but for `--full`), and does as much with the raw medium, now one first and
now the other: whatever else the machine does falls on both. Where the raw medium can be used in several
ways, each takes its turn, and the fastest is what the tier is held against. Each verb begins after a rest:
virtual disks allow bursts and then much less, and a raw program's start would be a rest for it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvbench.memory import Bed
from kvbench.raw import RAW, Raw
from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.tiers.base import KEY_BYTES, Got, Key, Put, Tier
from kvkeep.tiers.open import open_tier
from kvkeep.tiers.seal import SEAL_BYTES
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import innermost

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep bench tier`."""
    parser.add_argument("url", metavar="URL", help="the tier, as fs:///data/kv")
    parser.add_argument("--chunk-bytes", default="2MiB", help="bytes of each value (default: 2MiB)")
    parser.add_argument("--count", type=int, default=128, help="values in a batch (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--depth", type=int, default=8, help="values under way at a time (default: 8)")
    parser.add_argument(
        "--rest",
        type=float,
        default=0.5,
        help="seconds before each verb (default: 0.5, as a start of fio takes)",
    )
    parser.add_argument("--full", action="store_true", help="values stay, so that a full tier must make room")
    parser.add_argument("--no-raw", action="store_true", help="the tier alone: the medium takes no turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


class Samples(NamedTuple):
    """Seconds of each round."""

    put: list[float]
    get: list[float]


def run(args: argparse.Namespace) -> int:
    """Measure; returns 0. Raises KVKeepError where not every byte came back."""
    size = parse_bytes(args.chunk_bytes)
    if min(args.count, args.depth, args.rounds) < 1 or size <= SEAL_BYTES or args.rest < 0:
        what = "--count, --rounds and --depth must be 1 or more, --rest 0 or more"
        raise ConfigError(f"{what}, --chunk-bytes more than {SEAL_BYTES}")
    opened, url = open_tier(args.url, depth=str(args.depth)), TierURL(args.url)
    raws = list[Raw]()
    try:
        if opened.tier.capabilities.readonly:
            raise ConfigError(f"{opened.url} cannot be written to: python -m benchmarks.peers measures peers")
        make = None if args.no_raw else RAW.get(url.scheme.removeprefix("faulty+"))
        bed = Bed(size, args.count, args.depth)
        opened.tier.attach(bed.memory)
        raws += make(url, innermost(opened.tier), bed) if make else []
        figures = _measure(opened.tier, raws, bed, args)
        bed.close()
    finally:
        opened.tier.close()
        for raw in raws:
            raw.close()
    result = {"url": opened.url, "chunk_bytes": size, "count": args.count, "depth": args.depth}
    result |= {"rounds": args.rounds} | figures
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(_as_table(result))
    return 0


def _measure(tier: Tier, raws: list[Raw], bed: Bed, args: argparse.Namespace) -> dict[str, object]:
    ours, cpu, theirs = Samples([], []), Samples([], []), [Samples([], []) for _ in raws]
    kept: list[Key] = []
    rest = partial(time.sleep, args.rest)
    turns: list[Callable[[], None]] = [
        partial(_turn, tier, bed, ours, cpu, rest, kept if args.full else None)
    ]
    turns += [partial(_raw_turn, *pair, rest, args.full) for pair in zip(raws, theirs, strict=True)]
    silent = not sys.stderr.isatty()
    try:
        for number in track(
            range(args.rounds + 1), "measuring", console=Console(stderr=True), disable=silent
        ):
            for turn in turns[:: 1 if number % 2 else -1]:
                turn()
    finally:
        tier.delete(kept)
    for samples in (ours, cpu, *theirs):  # the first one pays for lazy set-up
        for seconds in samples:
            del seconds[:1]
    return _figures(bed.nbytes, ours, {raw.name: one for raw, one in zip(raws, theirs, strict=True)}, cpu)


def _turn(
    tier: Tier, bed: Bed, seconds: Samples, cpu: Samples, rest: Callable[[], None], kept: list[Key] | None
) -> None:
    keys: list[Key] = [b"\0bench\0\0" + os.urandom(KEY_BYTES - 8) for _ in range(bed.count)]
    bed.spoil()
    rest()
    try:
        began, worked = time.perf_counter(), time.process_time()
        stored = tier.put(keys, bed.sent)
        seconds.put.append(time.perf_counter() - began)
        cpu.put.append(time.process_time() - worked)
        if stored.count(Put.STORED) != len(keys):
            raise KVKeepError(
                f"only {stored.count(Put.STORED)} of {len(keys)} were stored: give it more room"
            )
        rest()
        began, worked = time.perf_counter(), time.process_time()
        got = tier.get(keys, bed.back)
        seconds.get.append(time.perf_counter() - began)
        cpu.get.append(time.process_time() - worked)
        if got.count(Got.HIT) != len(keys) or not bed.whole():
            raise KVKeepError(f"only {got.count(Got.HIT)} of {len(keys)} came back, or other bytes")
    finally:
        if kept is None:
            tier.delete(keys)  # as the raw medium does: what is new to a server's memory is slow
        else:
            kept += keys


def _raw_turn(raw: Raw, seconds: Samples, rest: Callable[[], None], full: bool) -> None:
    rest()
    seconds.put.append(raw.put())
    rest()
    seconds.get.append(raw.get())
    if not full:  # else it writes over what it has
        raw.forget()


def _figures(nbytes: int, ours: Samples, theirs: dict[str, Samples], cpu: Samples) -> dict[str, object]:
    figures: dict[str, object] = {}
    for name in ("put", "get"):
        mine: list[float] = getattr(ours, name)
        by_way: dict[str, list[float]] = {way: getattr(samples, name) for way, samples in theirs.items()}
        way = min(by_way, key=lambda way: median(by_way[way]), default=None)
        raw = by_way[way] if way else None
        figures |= {
            f"{name}_GBps": nbytes / median(mine) / 1e9,
            f"raw_{name}": way,
            f"raw_{name}_GBps": nbytes / median(raw) / 1e9 if raw else None,
            f"{name}_ratio": median(raw) / median(mine) if raw else None,
            f"best_{name}_GBps": nbytes / min(mine) / 1e9,
            f"best_raw_{name}_GBps": nbytes / min(raw) / 1e9 if raw else None,
            f"best_{name}_ratio": min(raw) / min(mine) if raw else None,
            f"cpu_s_per_GB_{name}": median(getattr(cpu, name)) / nbytes * 1e9,
        }
    return figures | {"verified": True}


def _as_table(result: dict[str, Any]) -> Table:
    title = f"{result['url']}, {result['count']} values of {result['chunk_bytes'] / 2**20:g} MiB, "
    title += f"{result['depth']} at a time, {result['rounds']} rounds"
    ways = " and ".join(dict.fromkeys(result[f"raw_{name}"] or "not measured" for name in ("put", "get")))
    caption = f"GB/s by the median (best); raw is {ways}"
    table = Table(title=title, caption=caption)
    for heading in ("", "tier", "raw", "of raw", "CPU s per GB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("put", "get"):
        keys = (f"{name}_GBps", f"raw_{name}_GBps", f"{name}_ratio")
        shown = [
            "–" if result[key] is None else f"{result[key]:.2f} ({result[f'best_{key}']:.2f})" for key in keys
        ]
        table.add_row(name, *shown, f"{result[f'cpu_s_per_GB_{name}']:.3f}")
    return table
