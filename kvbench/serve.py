"""`kvkeep bench serve`: what users of an OpenAI-compatible server feel, by an open-loop load generator."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvbench.load.client import Endpoint, Server
from kvbench.load.pictures import draw_cdf, draw_rates
from kvbench.load.probe import probe, warm_up
from kvbench.load.progress import Progress
from kvbench.load.record import csv_rows
from kvbench.load.schedule import ARRIVALS, Run, due_times
from kvbench.load.summary import parse_slo, summarize
from kvbench.workloads import WORKLOADS, Given, Prose, Scale, Workload
from kvkeep.config import environment
from kvkeep.errors import ConfigError

__all__ = ["add_arguments", "run"]

_INTERRUPTED_EXIT = 130
_KEY = "KVKEEP_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep bench serve`."""
    parser.add_argument("workload", choices=WORKLOADS, help="; ".join(map(_about, WORKLOADS.values())))
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    add("--model", default="", help="name of the model (default: the first that the server has)")
    add("--chat", action="store_true", help="ask /v1/chat/completions, not /v1/completions")
    key = environment([_KEY]).get(_KEY)
    add("--key", type=_key, default=key, help=f"API key, or @FILE that has it (default: ${_KEY})")
    add("--timeout", type=_positive, default=600.0, help="seconds per request (default: 600)")
    add("--rate", type=_rates, help="requests per second; several with commas: a run for each")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="gaps between requests (default: poisson)")
    add("--scale", type=_scale, default=1.0, help="size of the workload; 1: as published (default: 1)")
    add("--requests", type=_count, help="send only so many")
    add("--seed", type=int, default=0, help="another seed, other texts and times (default: 0)")
    add("--data", type=Path, metavar="FILE", help="what the workload reads: a trace, conversations")
    add("--warm-up", type=_warm_up, default="0", metavar="N", help="prompts to send first, or 'pass'")
    add("--ignore-eos", action="store_true", help="answers of exactly the asked length (vLLM's ignore_eos)")
    add("--slo", type=parse_slo, help="bounds of a good request: ttft=2s,itl=100ms,tpot=50ms,latency=10s")
    add("--output", type=Path, metavar="DIR", help="write requests.csv, summary.json and pictures there")
    add("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the workload at each rate. 0: done; 1: cut short, or nothing was answered; 130: Ctrl-C."""
    workload = WORKLOADS[args.workload]
    if args.data and not workload.data:
        raise ConfigError(f"the workload {workload.name} reads no file: leave out --data")
    if workload.needs_data and not args.data:
        raise ConfigError(f"the workload {workload.name} needs --data FILE: {workload.data}")
    console = Console(stderr=True, highlight=False)
    summaries: list[dict[str, Any]] = []
    rates = args.rate or [workload.rate]
    try:
        for rate in rates:
            folder = args.output and (args.output if len(rates) == 1 else args.output / f"rate-{rate:g}")
            try:
                summaries.append(asyncio.run(_measure(args, workload, rate, folder, console)))
            except OSError as error:  # the server's are in the records
                raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
            if summaries[-1]["partial"]:
                break
    finally:  # a server that was gone at the next rate takes nothing from those before
        if summaries:
            _report(args, summaries, console)
    if any(one["stopped"] == "interrupted" for one in summaries):
        return _INTERRUPTED_EXIT
    return 1 if any(one["partial"] or not one["requests_per_s"] for one in summaries) else 0


async def _measure(
    args: argparse.Namespace, workload: Workload, rate: float, folder: Path | None, console: Console
) -> dict[str, Any]:
    endpoint = Endpoint(args.url, args.model, args.chat, args.key, args.timeout, args.ignore_eos)
    # Each rate has texts of its own: what one run leaves in a cache is nothing that the next asks for.
    prose = Prose(f"{args.seed} {rate:g}")
    async with Server(endpoint) as server:
        counted = await probe(server, prose)
        draw = random.Random(args.seed)
        given = Given(Scale(args.scale), draw, prose, args.data)
        requests = workload.build(given)[: args.requests]
        times = due_times(requests, rate, args.arrivals, draw)
        warmed = await warm_up(server, prose, requests, args.warm_up)
        rows = csv_rows(folder / "requests.csv") if folder else contextlib.nullcontext(lambda record: None)
        progress = Progress(console, f"{workload.name} at {rate:g}/s", len(requests))
        with progress, rows as keep:  # as they end, so that a run that is killed leaves them
            one = Run(server, requests, times, prose, progress.show, keep)
            with _stops(one):
                records = await one()
        summary = {"workload": workload.name, **summarize(records, rate, args.slo, one.stopped)}
    summary |= {"scale": args.scale, "seed": args.seed, "arrivals": args.arrivals, "planned": len(requests)}
    summary |= {"warm_up": warmed, "lengths_by": counted, "url": args.url, "model": server.model}
    summary |= {"api": "chat" if args.chat else "completions", "ignore_eos": args.ignore_eos}
    if folder:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        with _pictures(console):
            draw_cdf(folder / "cdf.png", records, f"{workload.name}, {len(records)} requests")
    return summary


@contextlib.contextmanager
def _stops(one: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run, not the program: what was measured is kept."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, one.stop, "interrupted")
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _pictures(console: Console) -> Iterator[None]:
    try:
        yield
    except ImportError:
        console.print("no pictures: they need matplotlib (pip install 'kvkeep[bench]')")


def _report(args: argparse.Namespace, summaries: list[dict[str, Any]], console: Console) -> None:
    for one in summaries:
        if not one["kept_schedule"]:
            late = f"1 % of requests were late by {one['lateness_s']['p99']:.3f} s or more"
            console.print(f"[red]the schedule was not kept[/red]: {late}; this machine cannot generate it")
        for error, count in one["failures"].items():
            console.print(f"{count} requests failed: {error}", markup=False)
        if one["partial"]:
            console.print(f"[red]partial[/red]: {one['stopped']}; {one['requests']} of {one['planned']} sent")
    if args.output and len(summaries) > 1:
        with _pictures(console):
            draw_rates(args.output / "rates.png", summaries, args.workload)
    if args.json:
        print(json.dumps(summaries if len(args.rate or ()) > 1 else summaries[0]))
    else:
        Console().print(_table(args, summaries))


def _table(args: argparse.Namespace, summaries: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{args.workload} at scale {args.scale:g}", caption="seconds; mean and percentiles")
    for name in ("rate/s", "", "mean", "p50", "p90", "p95", "p99"):
        table.add_column(name, justify="right")
    for one in summaries:
        for figure in ("ttft_s", "itl_s", "tpot_s", "latency_s", "lateness_s"):
            values = ("-" if value is None else f"{value:.4g}" for value in one[figure].values())
            rate = f"{one['rate'] or 0:g}" if figure == "ttft_s" else ""
            table.add_row(rate, figure.removesuffix("_s"), *values)
        counts = f"{one['requests']} requests, {one['errors']} errors, {one['short_answers']} short answers"
        speeds = (
            f"{one['prompt_tokens_per_s'] or 0:.0f} prompt and {one['output_tokens_per_s'] or 0:.0f} output"
        )
        table.caption = f"{table.caption}\n{one['rate'] or 0:g}/s: {counts}; {speeds} tokens/s"
        if one["goodput"]:
            met = one["goodput"]
            table.caption += f"; {met['requests']} within bounds, {met['requests_per_s'] or 0:.3g}/s"
        table.add_section()
    return table


def _about(workload: Workload) -> str:
    return f"{workload.name}: {workload.about}"


def _rates(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _scale(text: str) -> float:
    if (factor := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1, the published size")
    return factor


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _key(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text().strip()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {error.strerror}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _warm_up(text: str) -> str:
    if text != "pass" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of prompts nor 'pass'")
    return text
