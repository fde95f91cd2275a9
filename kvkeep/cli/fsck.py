"""`kvkeep fsck`: verify all that a tier holds, and mend it."""

from __future__ import annotations

import argparse
import json
import mmap
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvkeep.errors import ConfigError
from kvkeep.tiers.base import Buffer, Got, Key, Listing, Tier, key_name
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.seal import check_seal, seal
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import innermost

__all__ = ["add_arguments", "run"]

_BATCH_BYTES, _BATCH_VALUES = 64 << 20, 256
_NAMED = 20  # so many damaged values are named for people; JSON has all


@dataclass
class Report:
    """What was found."""

    url: str
    values: int = 0
    bytes: int = 0
    damaged: int = 0
    damaged_keys: list[str] = field(default_factory=list)
    gone: int = 0
    """Listed, and removed by others before they were read."""
    temporaries: int = 0
    """Left by dead writers."""
    recorded_bytes: int | None = None
    recorded_values: int | None = None
    real_bytes: int | None = None
    real_values: int | None = None
    repaired: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep fsck`."""
    parser.add_argument("url", metavar="URL", help="the tier, as fs:///data/kv")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="delete damaged values and what dead writers left, and put the tier's books right",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Verify every value by its seal; 1 where there is damage that was not repaired, else 0.

    Without --repair nothing is changed, not even when values were used last. Engines may go on meanwhile.
    """
    url = TierURL(args.url)
    if not args.repair:
        url.suggest("readonly", "yes")
    url.take("write", str, "")  # the keeper's business
    tier = open_raw(url)
    try:
        url.finish()
        report = _check(tier, Report(str(url), repaired=args.repair))
    finally:
        tier.close()
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        _print(report)
    return 1 if report.damaged and not report.repaired else 0


def _check(tier: Tier, report: Report) -> Report:
    listing = innermost(tier)
    if not isinstance(listing, Listing):
        raise ConfigError(f"{report.url}: what this kind of tier holds cannot be listed")
    usage = tier.usage()
    report.recorded_bytes, report.recorded_values = usage.used_bytes, usage.values
    report.temporaries = listing.leftovers()
    checked = listing is tier and tier.overlap(seal, check_seal)
    with _progress() as progress:
        task = progress.add_task("verifying", total=usage.values)
        for keys, buffers in _batches(listing):
            damaged = []
            for key, buffer, got in zip(keys, buffers, listing.peek(keys, buffers), strict=True):
                report.values += got is not Got.MISS
                report.bytes += len(buffer) if got is not Got.MISS else 0
                report.gone += got is Got.MISS
                if got is Got.DAMAGED or (got is Got.HIT and not checked and not check_seal(key, buffer)):
                    damaged.append(key)
            report.damaged += len(damaged)
            report.damaged_keys += map(key_name, damaged)
            if report.repaired:
                tier.delete(damaged)
            progress.advance(task, len(keys))
    real = listing.recount(correct=report.repaired)
    report.real_bytes, report.real_values = real.used_bytes, real.values
    return report


def _batches(listing: Listing) -> Iterator[tuple[list[Key], list[Buffer]]]:
    """All values, some at a time, with buffers of their lengths; the next batch has the same memory."""
    memory = memoryview(mmap.mmap(-1, _BATCH_BYTES))
    keys, buffers, at = list[Key](), list[Buffer](), 0
    for key, length in listing.keys():  # noqa: SIM118 (no mapping)
        if keys and (at + length > len(memory) or len(keys) == _BATCH_VALUES):
            yield keys, buffers
            keys, buffers, at = [], [], 0
        if length > len(memory):
            memory = memoryview(mmap.mmap(-1, length))
        keys.append(key)
        buffers.append(memory[at : at + length])
        at += -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    if keys:
        yield keys, buffers


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())


def _print(report: Report) -> None:
    console = Console(highlight=False)
    done = "deleted" if report.repaired else "found"
    console.print(f"{report.url}: {report.values} values, {decimal(report.bytes)}")
    console.print(f"damaged      {report.damaged} {done}")
    for name in report.damaged_keys[:_NAMED]:
        console.print(f"             {name}")
    if report.damaged > _NAMED:
        console.print(f"             and {report.damaged - _NAMED} more: --json names all")
    gone = "removed" if report.repaired else "found"
    console.print(f"temporaries  {report.temporaries} of dead writers {gone}")
    if report.recorded_bytes is not None and report.real_bytes is not None:
        off = report.recorded_bytes - report.real_bytes
        what = "right" if not off else f"{decimal(abs(off))} too {'high' if off > 0 else 'low'}"
        if off and report.repaired:
            what += ", put right"
        recorded, real = decimal(report.recorded_bytes), decimal(report.real_bytes)
        console.print(f"books        {recorded} recorded, {real} real: {what}")
    if report.gone:
        console.print(f"gone         {report.gone} while this ran: others are at work")
