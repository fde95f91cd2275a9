"""`kvkeep bench compare`: a workload over several set-ups in turn; a table of ratios, a picture, a report."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from kvbench.compare.figures import rows
from kvbench.compare.machine import observe
from kvbench.compare.plan import read
from kvbench.compare.records import Ledger
from kvbench.compare.report import in_short, partial, remarks, tables, write
from kvbench.compare.runner import run_all, skipped

__all__ = ["add_arguments", "run"]

_INTERRUPTED_EXIT = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep bench compare`."""
    parser.add_argument("plan", type=Path, metavar="FILE", help="YAML that names set-ups, workload and rates")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the comparison in DIR: whole runs are kept"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is missing. 0: all runs were whole; 1: some were not; 130: broken off by Ctrl-C."""
    plan = read(args.plan)
    ledger = Ledger(args.output, plan, observe(plan.python, plan.lmcache), resume=args.resume)
    progress, missing, broken_off = Console(stderr=True, highlight=False), skipped(plan), False

    def say(text: str) -> None:
        progress.print(escape(text), soft_wrap=True)

    for name, why in missing.items():
        say(f"{name} is skipped: {why}")
    try:
        with _terminable():
            # After each run, not at the end: whatever ends this process, a report is there.
            run_all(ledger, say, lambda: write(ledger, missing, broken_off=False))
    except KeyboardInterrupt:
        broken_off = True
    path = write(ledger, missing, broken_off)
    console = Console()
    table = rows(plan, ledger.runs.values())
    tables(plan, table, console)
    for sentence in in_short(plan, table) + remarks(ledger.runs.values(), missing):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    lacking = partial(ledger, missing, broken_off)
    if lacking:
        say(f"partial: {lacking}; --resume goes on")
    say(f"report: {path}")
    return _INTERRUPTED_EXIT if broken_off else int(bool(lacking))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the comparison as Ctrl-C does; a second one does not keep servers from being stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
