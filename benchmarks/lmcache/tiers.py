"""kvkeep's tiers beside LMCache's L2 adapters: the same Valkey, the same disk, values of the same size.

    .venv/bin/python benchmarks/lmcache/tiers.py --turns 4 --json result.json

Each turn runs `kvkeep bench tier` and, in LMCache's environment (setup.sh makes it), `lmcache bench l2`, for
each store, now one first and now the other. Both verify every byte. Each gives the median of its rounds; the
table has the median over the turns. Both begin in a new directory, in which nothing is deleted until the end,
and in an emptied Valkey that has given its memory back; ours runs without the raw medium's turns, and without
rests, as LMCache's does. What differs: ours seals and checks each value (xxh3), LMCache's does not; LMCache's
clock covers its submit and the wait for it, ours the batch verb.

CPU is that of either whole program, to put and get: what many more rounds take than one, after the turns, so
that the program's start is not in it. Making and comparing the values is, and the server's work is not.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import stores

HERE = Path(__file__).parent


class Figures(NamedTuple):
    """GB/s of put and of get, and seconds of CPU."""

    put: float
    get: float
    cpu: float


class Entry(NamedTuple):
    """A program and a store."""

    store: str
    name: str
    run: Callable[[int], Figures]
    """With so many rounds."""


class Result(NamedTuple):
    """What became of an entry."""

    speeds: list[tuple[float, float]]
    """GB/s of put and get, by turn."""
    cpu: float
    """Seconds per GB, put and got."""


def main() -> int:
    """Measure, print, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of each program in each turn")
    parser.add_argument("--cpu-rounds", type=int, default=40, help="more rounds, whose CPU is taken")
    parser.add_argument("--count", type=int, default=64, help="values in a batch")
    parser.add_argument("--chunk-kib", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    program = HERE / ".venv" / "bin" / "lmcache"
    if not program.exists():
        parser.error(f"run {HERE.name}/setup.sh first")
    with tempfile.TemporaryDirectory(dir=HERE.parents[1], prefix=".bench-") as folder:
        samples = _measure(Path(folder), program, args)
    _show(samples, args)
    if args.json:
        args.json.write_text(json.dumps({name: one._asdict() for name, one in samples.items()}, indent=1))
    return 0


def _measure(folder: Path, program: Path, args: argparse.Namespace) -> dict[str, Result]:
    samples: dict[str, list[tuple[float, float]]] = {}
    subprocess.run(["chattr", "+T", folder], check=False, capture_output=True)  # see docs/benchmarks.md
    with stores.redis(folder) as redis:
        port = int(redis.rpartition(":")[2].partition("/")[0])

        def ours_on_disk(rounds: int) -> Figures:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                return _ours(f"fs://{place}?capacity=20GiB", args, rounds, "--full")

        def on_disk(kind: str, rounds: int) -> Figures:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                adapter = {"type": kind, "base_path": place, "use_odirect": True}
                return _theirs(program, adapter, args, rounds)

        def emptied(run: Callable[[int], Figures], rounds: int) -> Figures:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                for command in (b"FLUSHALL SYNC\r\n", b"MEMORY PURGE\r\n"):
                    connection.sendall(command)
                    assert connection.recv(16) == b"+OK\r\n"
            return run(rounds)

        resp = {"type": "resp", "host": "127.0.0.1", "port": port}
        entries = [
            Entry("disk", "kvkeep fs", ours_on_disk),
            Entry("disk", "LMCache fs", partial(on_disk, "fs")),
            Entry("disk", "LMCache fs_native", partial(on_disk, "fs_native")),
            Entry("Valkey", "kvkeep redis", partial(emptied, lambda rounds: _ours(redis, args, rounds))),
            Entry(
                "Valkey",
                "LMCache resp",
                partial(emptied, lambda rounds: _theirs(program, resp, args, rounds)),
            ),
        ]
        for turn in range(args.turns):
            for entry in entries[:: -1 if turn % 2 else 1]:
                took = entry.run(args.rounds)
                samples.setdefault(entry.name, []).append((took.put, took.get))
                print(f"turn {turn + 1}: {entry.name} put {took.put:.2f} get {took.get:.2f}", flush=True)
        more = args.cpu_rounds * args.count * args.chunk_kib * 1024 / 1e9  # GB
        cpu = {
            entry.name: (entry.run(1 + args.cpu_rounds).cpu - entry.run(1).cpu) / more for entry in entries
        }
    return {f"{entry.store}: {entry.name}": Result(samples[entry.name], cpu[entry.name]) for entry in entries}


def _ours(url: str, args: argparse.Namespace, rounds: int, *more: str) -> Figures:
    shape = [f"--chunk-bytes={args.chunk_kib}KiB", f"--count={args.count}", f"--rounds={rounds}"]
    shape += ["--no-raw", "--rest=0", "--json", *more]
    result, cpu = _run([sys.executable, "-m", "kvkeep.cli", "bench", "tier", url, *shape])
    return Figures(result["put_GBps"], result["get_GBps"], cpu)


def _theirs(program: Path, adapter: dict[str, object], args: argparse.Namespace, rounds: int) -> Figures:
    shape = [f"--num-keys={args.count}", f"--data-size-kb={args.chunk_kib}", f"--rounds={rounds}"]
    options = ["--no-skip-verify", "--l1-align-bytes=4096", "--format=json", "--l2-adapter"]
    result, cpu = _run([str(program), "bench", "l2", *shape, *options, json.dumps(adapter)])
    by_name = {part["operation"]: part for part in result["metrics"].values() if "operation" in part}
    nbytes = args.count * args.chunk_kib * 1024
    put, get = (nbytes / by_name[verb]["duration_p50_ms"] / 1e6 for verb in ("Store", "Load"))
    for verb in ("Store", "Load"):
        if by_name[verb]["total_success"] != by_name[verb]["total_keys"]:
            raise SystemExit(f"LMCache's {verb} lost keys: {by_name[verb]}")
    return Figures(put, get, cpu)


def _run(command: list[str]) -> tuple[dict, float]:
    """What it prints, and its seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}\n{done.stdout[-2000:]}")
    begin = done.stdout.index("{\n" if "l2" in command else "{")
    return json.JSONDecoder().raw_decode(done.stdout, begin)[0], cpu


def _show(samples: dict[str, Result], args: argparse.Namespace) -> None:
    title = f"{args.count} values of {args.chunk_kib} KiB, median (best) of {args.turns} turns"
    table = Table(title=title)
    for heading in ("", "put GB/s", "get GB/s", "CPU s a GB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (speeds, cpu) in samples.items():
        columns = [f"{median(column):.2f} ({max(column):.2f})" for column in zip(*speeds, strict=True)]
        table.add_row(name, *columns, f"{cpu:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
