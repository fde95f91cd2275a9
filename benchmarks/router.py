"""What `kvkeep route` costs and gains, in front of stand-in engines that account their KV and publish events.

    python -m benchmarks.router policies     # hit ratio and TTFT: kv against the other policies and the best
    python -m benchmarks.router cost         # latency through the router against the engine itself
    python -m benchmarks.router streams      # many streams at once, and what they take of the router's core

All figures of one table come from one run. Engines, router and client are processes of one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from rich.console import Console
from rich.table import Table

from benchmarks.routed import Served, served
from benchmarks.stand_in import BLOCK, tokens_of
from kvbench.workloads import WORKLOADS, Given, Prose, Request, Scale

POLICIES = ("kv", "session", "prefix-hash", "round-robin")
ROOM = 0.6  # of all text, that one engine has room for
STREAM_ITL = 1.0  # seconds
LOAD = 0.5  # of what three engines can do where nothing is held


# Policies


@dataclass
class Turn:
    """One request of a workload: who asks, when at the earliest, and the messages."""

    user: int
    at: float
    messages: list[dict[str, str]]
    answer_tokens: int


class Talk:
    """A workload with its texts; the engines' answers are part of what is asked next."""

    def __init__(self, name: str, scale: float, rate: float) -> None:
        prose, draw = Prose("router"), random.Random(5)
        self.name, self._prose = name, prose
        self.requests = WORKLOADS[name].build(Given(Scale(scale), draw, prose))
        texts = {prose.text(message.parts) for one in self.requests for message in one.opening}
        texts |= {prose.text(one.says) for one in self.requests}
        self.tokens = sum(len(tokens_of(text)) for text in texts)
        total = sum(len(tokens_of(self.text(one))) for one in self.requests)
        gaps = total / rate / 3 / LOAD / len(self.requests)
        self.at, now = [], 0.0
        for _ in self.requests:
            now += draw.expovariate(1 / gaps)
            self.at.append(now)

    def text(self, request: Request) -> str:
        """What is new in a request."""
        opening = [self._prose.text(message.parts) for message in request.opening]
        return " ".join([*opening, self._prose.text(request.says)])

    def messages(self, request: Request, before: list[dict[str, str]]) -> list[dict[str, str]]:
        """What a request sends, after what its user said and heard before."""
        opening = [{"role": one.role, "content": self._prose.text(one.parts)} for one in request.opening]
        return [*(before or opening), {"role": "user", "content": self._prose.text(request.says)}]


class Outcome(NamedTuple):
    """Of one policy on one workload."""

    hit: float
    ttft: list[float]
    best: float


Messages = list[dict[str, str]]


async def play(
    talk: Talk, url: str, model: str = "stand-in", most: int = 1 << 20
) -> tuple[list[float], list[Messages]]:
    """Send all requests when they are due; a user's next one after the answer to the last. `most`: tokens of
    an answer.

    Returns times to first token, and prompts in the order in which they were sent.
    """
    said: dict[int, list[dict[str, str]]] = {}
    turns: dict[int, asyncio.Lock] = {}
    ttft, prompts = list[float](), list[Messages]()
    began = time.monotonic()

    async def ask(client: aiohttp.ClientSession, request: Request, at: float) -> None:
        await asyncio.sleep(began + at - time.monotonic())
        async with turns.setdefault(request.user, asyncio.Lock()):
            messages = talk.messages(request, said.get(request.user, []))
            prompts.append(messages)
            body = {"model": model, "messages": messages, "stream": True, "temperature": 0}
            body["max_tokens"] = min(most, request.answer_tokens)
            sent, answer = time.monotonic(), ""
            headers = {"X-Session-Id": f"user {request.user}"}
            async with client.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        content = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                        if content and not answer:
                            ttft.append(time.monotonic() - sent)
                        answer += content
            said[request.user] = [*messages, {"role": "assistant", "content": answer.strip()}]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        await asyncio.gather(*(ask(client, *pair) for pair in zip(talk.requests, talk.at, strict=True)))
    return ttft, prompts


async def stats(engines: list[str]) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as client:
        found = []
        for url in engines:
            async with client.get(f"{url}/stats") as answer:
                found.append(await answer.json())
        return found


def as_words(messages: Messages) -> list[int]:
    """A prompt's tokens, as the stand-ins count them."""
    return tokens_of(" ".join(f"<{one['role']}> {one['content']}" for one in messages))


def best_possible(prompts: list[list[int]], block: int = BLOCK) -> float:
    """The share of tokens that one cache without bounds would have held: every block is computed once."""
    seen, held, total = set[int](), 0, 0
    for tokens in prompts:
        key, total, run = 0, total + len(tokens), True
        for at in range(0, len(tokens) - block + 1, block):
            key = hash((key, *tokens[at : at + block]))
            run = run and key in seen
            held += block * run
            seen.add(key)
    return held / total


def policies(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Each policy on each workload, on engines that begin with nothing."""
    found: dict[str, Any] = {}
    table = Table(
        "workload", "policy", "hit ratio", "of best", "TTFT mean ms", "p50", "p90", "p99", "× kv's mean"
    )
    for name in args.workloads:
        talk = Talk(name, args.scale * (0.25 if name == "long_documents" else 1), args.rate)
        shape = (
            "--blocks",
            str(round(ROOM * talk.tokens / BLOCK)),
            "--prefill-rate",
            str(args.rate),
            "--itl",
            "0.002",
        )
        for policy in args.policies:
            with served(policy, 3, *shape) as there:
                ttft, said = asyncio.run(play(talk, there.router))
                prompts = [as_words(one) for one in said]
                told = asyncio.run(stats(there.engines))
            hit = sum(one["cached_tokens"] for one in told) / sum(one["prompt_tokens"] for one in told)
            found[f"{name} {policy}"] = one = Outcome(hit, ttft, best_possible(prompts))
            mean, cuts = statistics.mean(one.ttft), statistics.quantiles(one.ttft, n=100)
            kv = statistics.mean(found[f"{name} kv"].ttft)
            milliseconds = [f"{1000 * value:.0f}" for value in (mean, cuts[49], cuts[89], cuts[98])]
            table.add_row(
                name, policy, f"{hit:.3f}", f"{hit / one.best:.2f}", *milliseconds, f"{mean / kv:.2f}"
            )
        table.add_row(name, "best possible", f"{one.best:.3f}", "1.00")
        console.print(f"{name}: {len(talk.requests)} requests, {sum(map(len, prompts))} prompt tokens")
    console.print(table)
    return {name: {"hit": one.hit, "best": one.best, "ttft": one.ttft} for name, one in found.items()}


# Cost


async def _timed(client: aiohttp.ClientSession, url: str, body: bytes) -> float:
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with client.post(f"{url}/v1/completions", data=body, headers=headers) as answer:
        await answer.read()
        assert answer.status == 200
    return time.perf_counter() - began


async def _pairs(there: Served, bodies: list[bytes], rounds: int) -> tuple[list[float], list[float]]:
    """Times of requests to the engine itself and through the router, in turns."""
    direct, routed = list[float](), list[float]()
    async with aiohttp.ClientSession() as client:
        for number in range(rounds):
            for url, times in ((there.engines[0], direct), (there.router, routed)):
                times.append(await _timed(client, url, bodies[number % len(bodies)]))
    return direct[rounds // 10 :], routed[rounds // 10 :]


def cost(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One request at a time, one engine, answers of one token; and where one engine prefills and one decodes,
    each as quick as the one alone, so that its time counts twice."""
    found: dict[str, Any] = {}
    table = Table("policy", "prompt", "engine ms", "through the router ms", "own cost ms, median", "p90")
    prose = Prose("cost")
    prompts = {
        "50 words, ever new": [f"{number} {' '.join(f'w{n}' for n in range(50))}" for number in range(5000)],
        "20,000 words, the same": [" ".join(prose.windows(1, 27_000))],
        "20,000 token ids, the same": [list(range(20_000))],
    }
    for kind, split in [*((one, False) for one in POLICIES), ("kv", True)]:
        more = ("--prefill-from", "0") if split else ()
        with served(kind, 1 + split, more=more, split=split) as there:
            policy = f"{kind}, split" if split else kind
            for name, texts in prompts.items():
                bodies = [
                    json.dumps({"model": "stand-in", "prompt": text, "max_tokens": 1}).encode()
                    for text in texts
                ]
                direct, routed = asyncio.run(_pairs(there, bodies, args.rounds))
                own = [via - (1 + split) * alone for via, alone in zip(routed, direct, strict=True)]
                median = statistics.median(routed) - (1 + split) * statistics.median(direct)
                found[f"{policy} {name}"] = median
                milliseconds = [1000 * statistics.median(times) for times in (direct, routed)]
                late = 1000 * statistics.quantiles(own, n=10)[8]
                table.add_row(
                    policy,
                    name,
                    *(f"{one:.2f}" for one in milliseconds),
                    f"{1000 * median:.2f}",
                    f"{late:.2f}",
                )
    console.print(table)
    return found


# Streams


async def _stream(client: aiohttp.ClientSession, url: str, tokens: int) -> tuple[float, int, list[float]]:
    """Time to first byte, how many events came, and how late each was after the one before."""
    body = {"model": "stand-in", "prompt": "a b c", "max_tokens": tokens, "stream": True}
    began, first, events = time.monotonic(), 0.0, 0
    last, late = 0.0, list[float]()
    async with client.post(f"{url}/v1/completions", json=body) as answer:
        async for chunk in answer.content.iter_any():
            now = time.monotonic()
            first = first or now - began
            if events and events < tokens:  # the end comes with the last of them
                late.append(now - last - STREAM_ITL)
            last = now
            events += chunk.count(b"data: ")
    return first, events, late


@contextlib.contextmanager
def storm(blocks: int) -> Iterator[list[str]]:
    """Another engine, down but heard, that stores blocks and stores; one message is lost each time that it
    holds so many."""
    words = [sys.executable, "-m", "benchmarks.event_storm", "--blocks", str(blocks)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        yield ["--backend", f"http://127.0.0.1:1,events={address}"]
        process.terminate()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _all(url: str, count: int, tokens: int) -> list[tuple[float, int, list[float]]]:
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
        return await asyncio.gather(*(_stream(client, url, tokens) for _ in range(count)))


def streams(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Many at once, the router on a core of its own; engines and client share the others."""
    found: dict[str, Any] = {}
    table = Table(
        *("streams", "storm", "whole", "events/s", "router's CPU", "µs per event", "last first byte s"),
        *("late ms p50", "p99", "most"),
    )
    core = max(os.sched_getaffinity(0))
    for count, blocks in ((count, blocks) for count in args.streams for blocks in args.storm):
        with contextlib.ExitStack() as stack:
            more = stack.enter_context(storm(blocks)) if blocks else []
            shape = ("--itl", str(STREAM_ITL))
            there = stack.enter_context(served("round-robin", 3, *shape, more=tuple(more), core=core))
            before, began = _cpu_seconds(there.pid), time.monotonic()
            outcomes = asyncio.run(_all(there.router, count, args.tokens))
            took, cpu = time.monotonic() - began, _cpu_seconds(there.pid) - before
        events = sum(events for _, events, _ in outcomes)
        whole = sum(events == args.tokens + 1 for _, events, _ in outcomes)
        late = sorted(1000 * one for *_, lates in outcomes for one in lates)
        lates = [late[len(late) // 2], late[int(0.99 * len(late))], late[-1]]
        found[f"{count} {blocks}"] = {
            "whole": whole,
            "cpu": cpu / took,
            "us": 1e6 * cpu / events,
            "late": lates,
        }
        last = max(first for first, *_ in outcomes)
        row = (str(count), f"{blocks:,}", str(whole), f"{events / took:.0f}", f"{cpu / took:.0%}")
        table.add_row(*row, f"{1e6 * cpu / events:.0f}", f"{last:.2f}", *(f"{one:.0f}" for one in lates))
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("policies", "cost", "streams"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads")
    parser.add_argument("--rate", type=float, default=8000.0, help="prompt tokens per second and engine")
    workloads = ("conversations", "long_documents")
    parser.add_argument("--workloads", nargs="+", default=workloads, choices=workloads)
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES, help="kv first")
    parser.add_argument("--rounds", type=int, default=200, help="requests per row of `cost`")
    parser.add_argument("--streams", type=int, nargs="+", default=[500, 2000], help="at a time")
    parser.add_argument(
        "--storm", type=int, nargs="+", default=[0], help="blocks of an engine that loses events"
    )
    parser.add_argument("--tokens", type=int, default=10, help="of each stream, one per second")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    figures = {"policies": policies, "cost": cost, "streams": streams}[args.what](args, Console())
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
