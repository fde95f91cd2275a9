"""Prefill on one engine, decode on another: whether answers are one engine's, and what the hand-over takes.

    python benchmarks/disagg.py [--prefills 1,2] [--hosts one,two] [--rate 10gbit] [--rounds 3] [--json FILE]

Real engines with SmolLM2 in float32: those that prefill on the first half of the cores, the one that decodes
on the other. `two` hosts: a keeper for each side, the decoder's in a network namespace, whence it asks the
other one over a link of `--rate` (needs root). One request at a time, sent as a proxy does, in two ways by
turns: to the engine that prefills, then with what it answered to the one that decodes; or to both at once, as
`kvkeep route --at-once` does. The same prompt once more finds all in that engine's own cache, and under
another salt is computed there: what the answer is compared with.

From the end of the prefill to the first token: `waits` for chunks that are on their way, `lookup` (hashing
and the keeper's answers), `load` (arena to KV cache), `engine` (what a hit in its own cache takes, API
included), and the `rest` of what was measured. At once, `waits` is what is left of the wait, lookups
included, behind the end of the prefill. Prefill is in steps of 512 tokens, so that chunks come meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kvbench.engine import VllmServer, connector_args, cores_by_role  # noqa: E402
from kvbench.network import Unavailable, hosts  # noqa: E402
from kvbench.process import free_port  # noqa: E402
from kvbench.servers import keeper  # noqa: E402

console = Console(stderr=True, highlight=False)
MODEL = ROOT / "demo" / "models" / "smollm2"
LENGTHS, ANSWER = (500, 2000, 6000), 16
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
TO_DECODE = {"do_remote_decode": False, "do_remote_prefill": True}
REMOTE_WAIT = "remote_wait_seconds_total"
PARTS = {
    "waits": ("tier_wait_seconds_total", REMOTE_WAIT),
    "lookup": ("lookup_seconds_total",),
    "load": ("load_seconds_total",),
}


class HandedOver(NamedTuple):
    """One request. Times in seconds; `first_token` counts from the prefill's end."""

    tokens: int
    at_once: bool
    prefill: float
    first_token: float
    loaded: int
    parts: dict[str, float]
    equal: bool


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that no other seed begins with."""
    return [1000 + (seed * 7919 + i * (seed + 3) * 31) % 40000 for i in range(length)]


class Fleet:
    """Engines that are up, and the proxy before them."""

    def __init__(self, prefills: list[VllmServer], decode: VllmServer) -> None:
        self._prefills, self._decode, self._turn = prefills, decode, 0
        self._pool = ThreadPoolExecutor(1)

    def hand_over(self, tokens: list[int], at_once: bool) -> HandedOver:
        """Prefill on the next engine, decode, and compare."""
        engine = self._prefills[self._turn % len(self._prefills)]
        self._turn += 1
        before, began = self._counters(), time.perf_counter()
        prefilled = self._pool.submit(prefill, engine, tokens)
        params = TO_DECODE if at_once else prefilled.result()[0]
        asked = time.perf_counter()
        answer = self._decode.complete(tokens, ANSWER, kv_transfer_params=params)
        ended = prefilled.result()[1]
        after, first_token = self._counters(), asked + answer.ttft_s - ended
        parts = {part: sum(after[name] - before[name] for name in names) for part, names in PARTS.items()}
        if at_once:  # looks, and waits for tiers, are within the wait for the other engine
            waited = after[REMOTE_WAIT] - before[REMOTE_WAIT]
            parts |= {"waits": max(0.0, waited - (ended - asked)), "lookup": 0.0}
        parts["engine"] = self._decode.complete(tokens, 1).ttft_s
        parts["rest"] = first_token - sum(parts.values())
        alone = self._decode.complete(tokens, ANSWER, cache_salt=f"alone {self._turn}")
        loaded = int(after["loaded_tokens_total"] - before["loaded_tokens_total"])
        equal = answer.text == alone.text
        return HandedOver(len(tokens), at_once, ended - began, first_token, loaded, parts, equal)

    def _counters(self) -> dict[str, float]:
        names = [*(name for names in PARTS.values() for name in names), "loaded_tokens_total"]
        return {name: self._decode.metric(f"vllm:kvkeep_{name}") for name in names}


def prefill(engine: VllmServer, tokens: list[int]) -> tuple[dict[str, Any], float]:
    """What it tells the engine that decodes, and when it had answered."""
    body = {"model": "model", "prompt": tokens, "temperature": 0, "max_tokens": 1, "stream": False}
    body["kv_transfer_params"] = TO_PREFILL
    response = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=600.0)
    ended = time.perf_counter()
    response.raise_for_status()
    return response.json()["kv_transfer_params"], ended


@contextlib.contextmanager
def keepers(apart: bool, rate: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The sockets of the keepers of those that prefill and of the one that decodes: one, or each its own."""
    with contextlib.ExitStack() as stack:
        # A socket's path has room for 107 bytes.
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvkeep-"))
        near, far = f"{place}/near.sock", f"{place}/far.sock"
        if not apart:
            stack.enter_context(keeper(near, "4GiB", [], folder / "keeper.log", drain_s=0))
            yield near, near
            return
        (there,) = stack.enter_context(hosts(1))
        there.limit(rate)
        port, token = free_port(), Path(place) / "token"
        token.write_text(secrets.token_hex(32))
        lends = ["--peers", f"{there.store}:{port}?token_file={token}&plain=yes"]
        stack.enter_context(keeper(near, "4GiB", [], folder / "near.log", drain_s=0, args=lends))
        tier = f"peer://{there.store}:{port}?token_file={token}"
        stack.enter_context(keeper(far, "4GiB", [tier], folder / "far.log", drain_s=0, on=there.command()))
        yield near, far


@contextlib.contextmanager
def fleet(prefills: int, sockets: tuple[str, str], folder: Path) -> Iterator[Fleet]:
    """Engines on the cores of their kind."""
    of_prefill, of_decode = cores_by_role(sorted(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        engines = []
        for number in range(prefills + 1):
            decodes = number == prefills
            its = of_decode if decodes else of_prefill
            role, socket = ("kv_consumer", sockets[1]) if decodes else ("kv_producer", sockets[0])
            args = ["--dtype", "float32", "--max-model-len", "8192", "--block-size", "32"]
            args += ["--max-num-batched-tokens", "512"]
            engine = VllmServer(
                MODEL,
                [*args, *connector_args(role, socket=socket, remote_wait=30.0)],
                log=folder / f"engine{number}.log",
                environ={"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, its)), "VLLM_CPU_KVCACHE_SPACE": "2"},
            )
            engines.append(stack.enter_context(engine))
        yield Fleet(engines[:-1], engines[-1])


def measure(prefills: int, apart: bool, rate: str, rounds: int) -> list[HandedOver]:
    """Each length `rounds` times in both ways, by turns, behind first ones that are left out."""
    with (
        tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as out,
        keepers(apart, rate, Path(out)) as sockets,
        fleet(prefills, sockets, Path(out)) as engines,
    ):
        seeds = iter(range(10_000))
        for way in (False, True):
            engines.hand_over(prompt(next(seeds), 700), way)
        turns = [(length, way) for _ in range(rounds) for length in LENGTHS for way in (False, True)]
        return [engines.hand_over(prompt(next(seeds), length), way) for length, way in turns]


def show(title: str, found: list[HandedOver]) -> None:
    """A row per length and way: medians."""
    names = [*PARTS, "engine", "rest"]
    table = Table(
        "tokens",
        "at once",
        "prefill s",
        "first token ms",
        *(f"{name} ms" for name in names),
        "loaded",
        "equal",
    )
    table.title = title
    for length, way in ((length, way) for length in LENGTHS for way in (False, True)):
        its = [one for one in found if (one.tokens, one.at_once) == (length, way)]
        median = statistics.median
        table.add_row(
            f"{length}",
            "yes" if way else "no",
            f"{median(one.prefill for one in its):.2f}",
            f"{1e3 * median(one.first_token for one in its):.1f}",
            *(f"{1e3 * median(one.parts[name] for one in its):.1f}" for name in names),
            f"{median(one.loaded for one in its):.0f}",
            f"{sum(one.equal for one in its)} of {len(its)}",
        )
    Console(highlight=False, width=120).print(table)


def main() -> int:
    """Measure, print, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefills", default="1,2", help="how many engines prefill, in turn")
    parser.add_argument("--hosts", default="one,two")
    parser.add_argument("--rate", default="10gbit", help="of the link between two hosts, as tc has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for where in args.hosts.split(","):
        for prefills in map(int, args.prefills.split(",")):
            title = f"{prefills}p1d, {where} host{'s' if where == 'two' else ''}"
            title += f", {args.rate}" if where == "two" else ""
            try:
                found = measure(prefills, where == "two", args.rate, args.rounds)
            except Unavailable as error:
                console.print(f"{title}: {error}")
                continue
            show(title, found)
            results[title] = [one._asdict() for one in found]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0 if all(one["equal"] for its in results.values() for one in its) else 1


if __name__ == "__main__":
    sys.exit(main())
