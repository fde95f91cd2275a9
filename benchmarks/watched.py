"""What being looked at costs a keeper: its time for lookups, and its memory over a million of them.

    python benchmarks/watched.py cost [--rounds N] [--held N]     # lookups with and without --http
    python benchmarks/watched.py soak [--lookups N] [--everything]  # growth of the process
    python benchmarks/watched.py ttft [--engines N] [--model DIR] # a real engine's first tokens

Real keepers, with `--http` and a scraper of `/metrics` and `/api/state` each second, a process of its own.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvbench.engine import VllmServer, connector_args, fastest_dtype
from kvbench.lookup import Probe
from kvkeep.errors import KeeperUnavailable
from kvkeep.identity import tenant_of
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

ROOT = Path(__file__).parents[1]
SCRAPER = """
import sys, time, urllib.request
while True:
    for path in ("metrics", "api/state"):
        with urllib.request.urlopen(sys.argv[1] + path, timeout=10) as answer:
            answer.read()
    time.sleep(1)
"""


@contextlib.contextmanager
def keeper(memory: int, *options: str) -> Iterator[tuple[Connection, int, str]]:
    """A keeper of our own, scraped where it can be: a connection to it, its pid and its socket."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder, contextlib.ExitStack() as stack:
        place, log = f"{folder}/keeper.sock", Path(folder) / "log"
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", place, "--prefault", "no"]
        with log.open("w") as file:
            child = subprocess.Popen([*command, "--memory", str(memory), *options], stdout=file, stderr=file)
        stack.callback(child.wait, 30)
        stack.callback(child.terminate)
        connection = connect(place, child, log)
        stack.callback(connection.close)
        if "--http" in options:
            url = re.search(r"http://\S+/", log.read_text())
            assert url is not None, log.read_text()
            scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, url[0]])
            stack.callback(scraper.wait, 10)
            stack.callback(scraper.terminate)
        yield connection, child.pid, place


def connect(place: str, child: subprocess.Popen[bytes], log: Path) -> Connection:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(KeeperUnavailable):
            return Connection.open(place, "watched:0", timeout=60.0)
        time.sleep(0.05)
    raise SystemExit(f"the keeper did not start: {log.read_text()[-500:]}")


def cost(rounds: int, held: int, tokens: int) -> None:
    """Blocks of lookups of three keepers in turn: two alike, to show the noise, and one that is watched."""
    memory = (held + held // 4 + 256) * 4096
    kinds = {"without": [], "without, again": [], "with": ["--http", "127.0.0.1:0"]}
    times: dict[str, list[list[float]]] = {name: [] for name in kinds}
    with contextlib.ExitStack() as stack:
        links = {name: stack.enter_context(keeper(memory, *options))[0] for name, options in kinds.items()}
        probes = {name: Probe(link, 16, [tokens]) for name, link in links.items()}
        for probe in probes.values():
            probe.fill(held)
        for number in range(rounds):
            order = list(probes.items())
            for name, probe in order[number % 3 :] + order[: number % 3]:
                prompt = probe.prompt(tokens, number % probe.variants)
                block = [probe.round(prompt, tokens // 16) for _ in range(20)]
                times[name].append([total - hashing for total, hashing in block])
    first = np.median(np.array(times["without"]), axis=1)
    print(f"{rounds} blocks of 20 lookups each, {tokens} tokens, {held} chunks held; hashing left out")
    for name, blocks in times.items():
        every, ratios = np.concatenate(blocks), np.median(np.array(blocks), axis=1) / first
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"{name:15} median {np.median(every):.3f} ms, p99 {np.percentile(every, 99):.3f} ms; "
            f"to the first, block by block: {middle:.3f} ({low:.3f} to {high:.3f})"
        )


def soak(lookups: int, everything: bool) -> None:
    """Lookups, a third of them hits, saves and evictions; prints private memory at ten times."""
    documents = [np.random.default_rng(number).bytes(16 * (4 + number % 5)) for number in range(500)]
    tenants = [tenant_of(f"salt {number}") if everything else b"" for number in range(5)]
    with tempfile.TemporaryDirectory() as below, contextlib.ExitStack() as stack:
        more = ["--record", f"{below}/seen.jsonl", "--tier", f"fs://{below}/kv?capacity=256MiB"]
        more += ["--traces", "http://127.0.0.1:9/v1/traces", "--tenant-quota", "default=8MiB"]
        options = ["--http", "127.0.0.1:0", *(more if everything else [])]
        link, pid, _ = stack.enter_context(keeper(64 << 20, *options))
        space = link.open_namespace(bytes(32), "soak", [(16384, None)], 1, 1, 16)
        random = np.random.default_rng(1)
        for number in range(lookups):
            if number % (lookups // 10) == 0:
                show(number, pid)
            keys = random.bytes(16 * 4) if number % 3 else documents[number % 500]
            tenant = tenants[number % 5]
            terms = (space, keys, 0, 0.0, 1.0 if everything else 0.0)
            trace = f"00-{random.bytes(16).hex()}-{random.bytes(8).hex()}-01" if everything else ""
            found = link.lookup(*terms, trace=trace, tenant=tenant)
            if found.ticket and number % 2:
                link.forget(found.ticket)
            elif found.ticket:  # as a request does whose deadline has passed
                first, found = found, link.lookup(*terms, found.ticket, trace, tenant)
                if first.lease:
                    link.release(first.lease)
            if found.lease:
                link.release(found.lease, 0)
            elif number % 3 == 0 or number % 10 == 1:
                (done,) = link.reserve(
                    space, [Reservation(keys, [b"\1" * (len(keys) // 16)], 0, found.epoch, tenant)]
                )
                if done.reservation:
                    link.commit(done.reservation, 0)
        figures = link.status()  # its answer says that all before it has been dealt with
        show(lookups, pid)
        print(f"{figures['recorded']}, {figures['counters']}")


def ttft(engines: int, model: Path) -> None:
    """Engines one at a time, with a keeper that is watched and one that is not in turn: 40 prompts of 512
    tokens that nobody has asked before, and each once more, from the keeper."""
    kinds = {"unwatched": [], "watched": ["--http", "127.0.0.1:0"]}
    every: dict[tuple[str, str], list[float]] = {}
    for number in range(engines):
        for kind in list(kinds)[:: -1 if number % 2 else 1]:
            with keeper(2 << 30, "--prefault", "yes", *kinds[kind]) as (link, _, place):
                while link.status()["prefaulted_bytes"] < 2 << 30:
                    time.sleep(0.5)
                taken = first_tokens(model, place, number)
            for what, seconds in taken.items():
                every.setdefault((what, kind), []).append(float(np.median(seconds)))
                print(f"engine {number}, {kind}: {what} {1e3 * every[what, kind][-1]:.1f} ms", flush=True)
    for what in ("miss", "hit"):
        ratios = np.array(every[what, "watched"]) / np.array(every[what, "unwatched"])
        rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{what}: watched to unwatched {np.median(ratios):.3f} in the median, by rounds {rounds}")


def first_tokens(model: Path, place: str, seed: int) -> dict[str, list[float]]:
    """TTFT in seconds of prompts that miss and of the same ones when they hit, in one new engine."""
    prompts = np.random.default_rng(seed).integers(100, 4100, (40, 512)).tolist()
    arguments = ["--no-enable-prefix-caching", "--dtype", fastest_dtype(), *connector_args(socket=place)]
    log = Path(place).with_name("engine.log")
    seconds: dict[str, list[float]] = {"miss": [], "hit": []}
    with VllmServer(model, arguments, log=log) as engine:
        engine.complete(prompts[0][::-1], 1)
        for what, taken in seconds.items():
            time.sleep(5)
            for prompt in prompts:
                taken.append(engine.complete(prompt, 1).ttft_s)
                time.sleep(0.3)
            assert (engine.metric("vllm:kvkeep_loaded_tokens_total") > 0) is (what == "hit")
    return seconds


def show(number: int, pid: int) -> None:
    """Memory of the process beside the arena."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    private = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    print(f"{number:>10} lookups: {private / 1024:.2f} MiB of private memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("cost", "soak", "ttft"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--held", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--lookups", type=int, default=1_000_000)
    parser.add_argument(
        "--everything", action="store_true", help="soak with a disk, tenants, traces, --record"
    )
    parser.add_argument("--engines", type=int, default=3, help="of each kind")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "models" / "smollm2")
    args = parser.parse_args()
    if args.what == "ttft":
        ttft(args.engines, args.model)
        return
    if args.what == "cost":
        cost(args.rounds, args.held, args.tokens)
        return
    began = time.monotonic()
    soak(args.lookups, args.everything)
    print(f"{args.lookups / (time.monotonic() - began):.0f} lookups/s")


if __name__ == "__main__":
    main()
