"""kvkeep's tiers beside LMCache's L2 adapters: the same Valkey, the same disk, values of the same size.

    .venv/bin/python benchmarks/lmcache/tiers.py --turns 4 --json result.json

Each turn runs `kvkeep bench tier` and, in LMCache's environment (setup.sh makes it), `lmcache bench l2`, for
each store, now one first and now the other. Both verify every byte. Each gives the median of its rounds; the
table has the median over the turns. LMCache's keys are the same in each of its runs, and it does not write
what is there, so what it left is removed before each of its turns. What differs: ours seals and checks each
value (xxh3), LMCache's does not; LMCache's clock covers its submit and the wait for it, ours the batch verb.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import stores

HERE = Path(__file__).parent
Figures = tuple[float, float]
"""GB/s of put and of get."""


class Entry(NamedTuple):
    """A program and a store."""

    store: str
    name: str
    measure: Callable[[], Figures]


def main() -> int:
    """Measure, print, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of each program in each turn")
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
        args.json.write_text(json.dumps(samples, indent=1))
    return 0


def _measure(folder: Path, program: Path, args: argparse.Namespace) -> dict[str, list[Figures]]:
    samples: dict[str, list[Figures]] = {}
    with stores.fs(folder) as fs, stores.redis(folder) as redis:
        port = int(redis.rpartition(":")[2].partition("/")[0])

        def on_disk(kind: str) -> Figures:
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            (folder / "theirs").mkdir()
            adapter = {"type": kind, "base_path": str(folder / "theirs"), "use_odirect": True}
            return _theirs(program, adapter, args)

        def on_valkey() -> Figures:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(b"FLUSHALL\r\n")
                assert connection.recv(16) == b"+OK\r\n"
            return _theirs(program, {"type": "resp", "host": "127.0.0.1", "port": port}, args)

        entries = [
            Entry("disk", "kvkeep fs", lambda: _ours(fs, args)),
            Entry("disk", "LMCache fs", lambda: on_disk("fs")),
            Entry("disk", "LMCache fs_native", lambda: on_disk("fs_native")),
            Entry("Valkey", "kvkeep redis", lambda: _ours(redis, args)),
            Entry("Valkey", "LMCache resp", on_valkey),
        ]
        for turn in range(args.turns):
            for entry in entries[:: -1 if turn % 2 else 1]:
                figures = entry.measure()
                samples.setdefault(f"{entry.store}: {entry.name}", []).append(figures)
                print(f"turn {turn + 1}: {entry.name} put {figures[0]:.2f} get {figures[1]:.2f}", flush=True)
    return samples


def _ours(url: str, args: argparse.Namespace) -> Figures:
    shape = [f"--chunk-bytes={args.chunk_kib}KiB", f"--count={args.count}", f"--rounds={args.rounds}"]
    result = _run([sys.executable, "-m", "kvkeep.cli", "bench", "tier", url, *shape, "--json"])
    return result["put_GBps"], result["get_GBps"]


def _theirs(program: Path, adapter: dict[str, object], args: argparse.Namespace) -> Figures:
    shape = [f"--num-keys={args.count}", f"--data-size-kb={args.chunk_kib}", f"--rounds={args.rounds}"]
    options = ["--no-skip-verify", "--l1-align-bytes=4096", "--format=json", "--l2-adapter"]
    result = _run([str(program), "bench", "l2", *shape, *options, json.dumps(adapter)])
    by_name = {part["operation"]: part for part in result["metrics"].values() if "operation" in part}
    nbytes = args.count * args.chunk_kib * 1024
    put, get = (nbytes / by_name[verb]["duration_p50_ms"] / 1e6 for verb in ("Store", "Load"))
    for verb in ("Store", "Load"):
        if by_name[verb]["total_success"] != by_name[verb]["total_keys"]:
            raise SystemExit(f"LMCache's {verb} lost keys: {by_name[verb]}")
    return put, get


def _run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}\n{done.stdout[-2000:]}")
    begin = done.stdout.index("{\n" if "l2" in command else "{")
    return json.JSONDecoder().raw_decode(done.stdout, begin)[0]


def _show(samples: dict[str, list[Figures]], args: argparse.Namespace) -> None:
    title = f"{args.count} values of {args.chunk_kib} KiB, GB/s, median (best) of {args.turns} turns"
    table = Table(title=title)
    for heading in ("", "put", "get"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, figures in samples.items():
        columns = list(zip(*figures, strict=True))
        table.add_row(name, *(f"{median(column):.2f} ({max(column):.2f})" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
