"""The router's policies before real engines: vLLM on CPU with little room for KV, each on a core of its own.

    python -m benchmarks.router_vllm --model demo/models/smollm2 --workloads conversations

Engines begin each policy with empty caches. Hit ratios are the engines' own counters, TTFT is the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.routed import routing
from benchmarks.router import POLICIES, Messages, Talk, best_possible, play
from kvbench.engine import VllmServer
from kvbench.process import free_port
from kvroute.request import Body
from kvroute.tokens import LocalTokens

BLOCK = 32


class Followed(VllmServer):
    """An engine with events and few blocks."""

    def __init__(self, model: Path, core: int, blocks: int, log: Path) -> None:
        self.events, self.replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        told = {"enable_kv_cache_events": True, "publisher": "zmq"}
        told |= {"endpoint": self.events.replace("127.0.0.1", "*"), "replay_endpoint": self.replay}
        args = ["--kv-events-config", msgspec.json.encode(told).decode(), "--block-size", str(BLOCK)]
        args += ["--num-gpu-blocks-override", str(blocks), "--max-model-len", "4096"]
        environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        super().__init__(model, args, log=log, environ=environ)


@contextlib.contextmanager
def engines(args: argparse.Namespace) -> Iterator[list[Followed]]:
    """Start them side by side."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = [
            Followed(args.model, cores[number % len(cores)], args.blocks, Path(folder) / f"log {number}")
            for number in range(args.engines)
        ]
        yield [stack.enter_context(one) for one in made]


async def tokens_of_prompts(model: Path, prompts: list[Messages]) -> list[list[int]]:
    """As the engines' own template and tokenizer make them."""
    source = LocalTokens(str(model))
    bodies = [Body("model", messages=msgspec.Raw(msgspec.json.encode(one))) for one in prompts]
    found = [await source.tokens(body, []) for body in bodies]
    return [[] if tokens is None else tokens.tolist() for tokens in found]


class Outcome(NamedTuple):
    """Of one policy on one workload."""

    hit: float
    ttft: list[float]
    prompts: list[list[int]]


def outcome(running: list[Followed], policy: str, talk: Talk, args: argparse.Namespace) -> Outcome:
    """Play a workload on engines that begin with nothing."""

    def counted() -> list[float]:
        names = ("vllm:prompt_tokens_cached_total", "vllm:prompt_tokens_total")
        return [sum(one.metric(name) for one in running) for name in names]

    for engine in running:
        engine.reset_local_cache()
    before = counted()
    places = [{"url": one.url, "events": one.events, "replay": one.replay} for one in running]
    with routing(policy, places) as (url, _):
        ttft, said = asyncio.run(play(talk, url, "model", args.answer))
    cached, prompted = (now - then for now, then in zip(counted(), before, strict=True))
    return Outcome(cached / prompted, ttft, asyncio.run(tokens_of_prompts(args.model, said)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=256, help=f"of {BLOCK} tokens, per engine")
    parser.add_argument("--workloads", nargs="+", default=("conversations", "long_documents"))
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES, help="kv first")
    parser.add_argument("--scale", type=float, default=0.3, help="of the workloads")
    parser.add_argument("--rate", type=float, default=200.0, help="prompt tokens per second and engine")
    parser.add_argument("--answer", type=int, default=12, help="tokens of an answer, at most")
    args = parser.parse_args()
    console = Console(width=120)
    table = Table("workload", "policy", "hit ratio", "of best", "TTFT mean ms", "p50", "p90", "× kv's mean")
    with engines(args) as running:
        for name in args.workloads:
            talk, kv = Talk(name, args.scale, args.rate), 0.0
            for policy in args.policies:
                hit, ttft, prompts = outcome(running, policy, talk, args)
                best, mean = best_possible(prompts, BLOCK), statistics.mean(ttft)
                cuts, kv = statistics.quantiles(ttft, n=10), kv or mean
                milliseconds = [f"{1000 * value:.0f}" for value in (mean, cuts[4], cuts[8])]
                table.add_row(
                    name, policy, f"{hit:.3f}", f"{hit / best:.2f}", *milliseconds, f"{mean / kv:.2f}"
                )
                total = sum(map(len, prompts))
                console.print(f"{name} {policy}: {len(prompts)} requests, {total} tokens, best {best:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
