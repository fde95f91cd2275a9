"""`kvkeep bench tier`: a tier, sealed as the keeper uses it, as a share of the speed of its raw medium.

Random data in touched memory; each round puts one batch under new keys, gets it into other memory and
compares every byte, deletes it, and does as much with the raw medium, now one first and now the other:
whatever else the machine does falls on both. Each verb begins after a rest: virtual
disks allow bursts and then much less, and a raw program's start would be a rest that the tier does not get.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvbench.memory import arena
from kvbench.raw import RAW, Raw, Shape
from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.pages import huge_size
from kvkeep.tiers.base import KEY_BYTES, Buffer, Got, Key, Put, Tier
from kvkeep.tiers.open import open_tier
from kvkeep.tiers.seal import SEAL_BYTES
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import innermost

__all__ = ["add_arguments", "run"]

_REST = 0.5  # seconds; a start of fio takes about as long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep bench tier`."""
    parser.add_argument("url", metavar="URL", help="the tier, as fs:///data/kv")
    parser.add_argument("--chunk-bytes", default="2MiB", help="bytes of each value (default: 2MiB)")
    parser.add_argument("--count", type=int, default=128, help="values in a batch (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--depth", type=int, default=8, help="values under way at a time (default: 8)")
    parser.add_argument("--no-raw", action="store_true", help="the tier alone: the medium takes no turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


class Samples(NamedTuple):
    """Seconds of each round."""

    put: list[float]
    get: list[float]


class Bed:
    """Memory and keys of the rounds. Like a keeper's, it is one mapping, which a tier can `attach`."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.nbytes = shape, shape.chunk_bytes * shape.count
        self.sources, self.targets = self._pieces(), self._pieces()
        huge = huge_size() or mmap.PAGESIZE
        each = -(-shape.count // shape.depth) * shape.chunk_bytes + 4 * mmap.PAGESIZE
        each = -(-each // huge) * huge
        self.memory = arena(each, self.sources + self.targets)
        half = each * shape.depth
        self.sent, self.back = (self._chunks(self.memory[at : at + half], each) for at in (0, half))
        for chunk in self.sent:
            chunk[:] = os.urandom(len(chunk))

    def _pieces(self) -> tuple[int, ...]:
        return tuple(os.memfd_create("kvkeep-bench") for _ in range(self.shape.depth))

    def _chunks(self, memory: Buffer, each: int) -> list[Buffer]:
        """Chunks that lie in the pieces, of `each` bytes, in turn."""
        size = self.shape.chunk_bytes
        places = [divmod(number, self.shape.depth) for number in range(self.shape.count)]
        return [memory[(at := piece * each + turn * size) : at + size] for turn, piece in places]

    def keys(self) -> list[Key]:
        """New ones."""
        return [b"\0bench\0\0" + os.urandom(KEY_BYTES - 8) for _ in range(self.shape.count)]

    def spoil(self) -> None:
        """Change each page that is read into, so that what does not come back is noticed."""
        for chunk in self.back:
            np.frombuffer(chunk[: len(chunk) // 8 * 8], np.uint64)[::512] ^= 1

    def whole(self) -> bool:
        """Whether all came back; by numpy, which is fifteen times as fast as memoryviews are."""
        views = zip(self.sent, self.back, strict=True)
        return all(
            np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)) for one, two in views
        )

    def close(self) -> None:
        """Let go of the memory's descriptors."""
        for fd in self.sources + self.targets:
            os.close(fd)


def run(args: argparse.Namespace) -> int:
    """Measure; returns 0. Raises KVKeepError where not every byte came back."""
    shape = Shape(parse_bytes(args.chunk_bytes), args.count, args.depth)
    if min(shape.count, shape.depth, args.rounds) < 1 or shape.chunk_bytes <= SEAL_BYTES:
        raise ConfigError(
            f"--count, --rounds and --depth must be 1 or more, --chunk-bytes more than {SEAL_BYTES}"
        )
    opened, url = open_tier(args.url, depth=str(args.depth)), TierURL(args.url)
    raw = None
    try:
        if opened.tier.capabilities.readonly:
            raise ConfigError(f"{opened.url} cannot be written to: python -m benchmarks.peers measures peers")
        make = None if args.no_raw else RAW.get(url.scheme.removeprefix("faulty+"))
        bed = Bed(shape)
        opened.tier.attach(bed.memory)
        shape = replace(shape, sources=bed.sources, targets=bed.targets)
        raw = make(url, innermost(opened.tier), shape) if make else None
        figures = _measure(opened.tier, raw, bed, args.rounds)
        bed.close()
    finally:
        opened.tier.close()
        if raw is not None:
            raw.close()
    result = {"url": opened.url, "chunk_bytes": shape.chunk_bytes, "count": shape.count}
    result |= {"depth": shape.depth, "rounds": args.rounds, "raw": raw.name if raw else None} | figures
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(_as_table(result))
    return 0


def _measure(tier: Tier, raw: Raw | None, bed: Bed, rounds: int) -> dict[str, object]:
    ours, theirs, cpu = Samples([], []), Samples([], []), Samples([], [])
    turns: list[Callable[[], None]] = [lambda: _turn(tier, bed, ours, cpu)]
    if raw is not None:
        turns.append(lambda: _raw_turn(raw, theirs))
    silent = not sys.stderr.isatty()
    for number in track(range(rounds + 1), "measuring", console=Console(stderr=True), disable=silent):
        for turn in turns[:: 1 if number % 2 else -1]:
            turn()
    for samples in (ours, theirs, cpu):  # the first one pays for lazy set-up
        for seconds in samples:
            del seconds[:1]
    return _figures(bed.nbytes, ours, theirs if raw else None, cpu)


def _turn(tier: Tier, bed: Bed, seconds: Samples, cpu: Samples) -> None:
    keys = bed.keys()
    bed.spoil()
    try:
        _move(tier, bed, keys, seconds, cpu)
    finally:
        tier.delete(keys)  # as the raw medium does: what is new to a server's memory is slow


def _move(tier: Tier, bed: Bed, keys: list[Key], seconds: Samples, cpu: Samples) -> None:
    time.sleep(_REST)
    began, worked = time.perf_counter(), time.process_time()
    stored = tier.put(keys, bed.sent)
    seconds.put.append(time.perf_counter() - began)
    cpu.put.append(time.process_time() - worked)
    if stored.count(Put.STORED) != len(keys):
        raise KVKeepError(f"only {stored.count(Put.STORED)} of {len(keys)} were stored: give it more room")
    time.sleep(_REST)
    began, worked = time.perf_counter(), time.process_time()
    got = tier.get(keys, bed.back)
    seconds.get.append(time.perf_counter() - began)
    cpu.get.append(time.process_time() - worked)
    if got.count(Got.HIT) != len(keys) or not bed.whole():
        raise KVKeepError(f"only {got.count(Got.HIT)} of {len(keys)} came back, or other bytes")


def _raw_turn(raw: Raw, seconds: Samples) -> None:
    time.sleep(_REST)
    seconds.put.append(raw.put())
    time.sleep(_REST)
    seconds.get.append(raw.get())
    raw.forget()


def _figures(nbytes: int, ours: Samples, theirs: Samples | None, cpu: Samples) -> dict[str, object]:
    figures: dict[str, object] = {}
    for name in ("put", "get"):
        mine: list[float] = getattr(ours, name)
        raw: list[float] | None = getattr(theirs, name) if theirs else None
        figures |= {
            f"{name}_GBps": nbytes / median(mine) / 1e9,
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
    caption = f"GB/s by the median (best); raw is {result['raw'] or 'not measured'}"
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
