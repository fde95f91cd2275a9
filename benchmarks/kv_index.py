"""The index behind `kvkeep route`: lookups among many engines; what it knows after events that were lost.

python -m benchmarks.kv_index lookup     # 20,000 tokens, 1,000 engines
python -m benchmarks.kv_index events     # 1 M events over ZMQ, 1 % of the messages lost
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from benchmarks.publisher import Publisher
from kvroute.events import Event, Removed, Stored
from kvroute.index import Index
from kvroute.subscribe import Source, Subscriber

TOKENS, BLOCK = 20_000, 16
WHOLE = TOKENS // BLOCK
PER_MESSAGE = 20
AHEAD = 100  # messages on their way at a time


def timed(index: Index, tokens: list[int], rounds: int) -> list[float]:
    """Microseconds of lookups, sorted."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        index.lookup(tokens)
        times.append(1e6 * (time.perf_counter() - began))
    return sorted(times)


def lookup(args: argparse.Namespace, console: Console) -> None:
    """One prompt, held by engines as in each row."""
    draw = random.Random(1)
    tokens = [draw.randrange(128_000) for _ in range(TOKENS)]
    table = Table("who holds what", "blocks", "best µs", "median µs", "p99 µs")
    cases = {
        "nobody anything": lambda: 0,
        "all engines all, GPU and CPU": lambda: WHOLE,
        "each another length, half on the GPU": lambda: draw.randrange(2, WHOLE),
        "all a system prompt of 1,024 tokens, one the rest": lambda: 64,
    }
    for name, count in cases.items():
        index = Index(10_000_000)
        for engine in range(args.engines):
            blocks = WHOLE if "one the rest" in name and engine == 7 else count()
            for medium, held in (("GPU", blocks if "another" not in name else blocks // 2), ("CPU", blocks)):
                names = [(number << 16) + engine for number in range(held)]
                ids = tokens[: BLOCK * held]
                index.apply(
                    f"engine {engine}", [Stored(list(names), None, ids, BLOCK, medium=medium)] if held else []
                )
        times = timed(index, tokens, args.rounds)
        total = sum(index.blocks(engine) for engine in index.engines())
        figures = (times[0], statistics.median(times), times[int(0.99 * len(times))])
        table.add_row(name, f"{total:,}", *(f"{figure:.0f}" for figure in figures))
    console.print(
        f"{TOKENS:,} tokens as a list, blocks of {BLOCK}, {args.engines:,} engines, {args.rounds} lookups"
    )
    console.print(table)


class Engine:
    """Prompts that come and go, as chains of blocks of which the tail goes first."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.held: dict[int, int] = {}  # prompt → how many of its blocks

    def tokens(self, prompt: int, blocks: int) -> list[int]:
        return [prompt * 100 + number // BLOCK for number in range(BLOCK * blocks)]

    def event(self) -> Event:
        prompt = self._draw.randrange(20_000)
        held = self.held.get(prompt, 0)
        names = 100 * prompt
        if held and (held == 8 or self._draw.random() < 0.45):
            self.held[prompt] = held - 1
            return Removed([names + held - 1], "GPU")
        self.held[prompt] = held + 1
        ids = self.tokens(prompt, held + 1)[-BLOCK:]
        return Stored([names + held], names + held - 1 if held else None, ids, BLOCK, medium="GPU")


async def follow(events: int, lost: float, replay: bool) -> tuple[float, Engine, Index, Subscriber]:
    """Publish from one engine what a subscriber on the same event loop follows."""
    engine, index, draw = Engine(3), Index(), random.Random(4)
    publisher, subscriber = Publisher(), Subscriber(index)
    subscriber.follow("engine", Source(publisher.events, publisher.replay if replay else None))
    await asyncio.sleep(1)
    began = time.monotonic()
    sent = 0
    for _ in range(events // PER_MESSAGE):
        away = draw.random() < lost
        publisher.publish(*[engine.event() for _ in range(PER_MESSAGE)], lost=away)
        sent += not away
        while sent - subscriber.counters.messages > AHEAD:
            publisher.serve()
            await asyncio.sleep(0)
    last = Stored([10**9], None, [7] * BLOCK, BLOCK)
    publisher.publish(last)
    while not index.lookup([7] * BLOCK):
        publisher.serve()
        await asyncio.sleep(0.001)
    took = time.monotonic() - began
    await subscriber.close()
    publisher.close()
    return took, engine, index, subscriber


def events(args: argparse.Namespace, console: Console) -> None:
    """With and without a replay socket: what the index says of each prompt against what the engine holds."""
    table = Table(
        "replay", "events/s", "gaps", "replayed", "resets", "prompts right", "claimed too much", "too little"
    )
    for replay in (True, False):
        took, engine, index, subscriber = asyncio.run(follow(args.events, args.lost, replay))
        off = []
        for prompt, held in engine.held.items():
            found = index.lookup(engine.tokens(prompt, 8)).get("engine")
            off.append((found.tokens if found else 0) - BLOCK * held)
        counters = subscriber.counters
        figures = (counters.gaps, counters.replayed, counters.resets, off.count(0))
        much, little = sum(one > 0 for one in off), sum(one < 0 for one in off)
        rate = f"{args.events / took:,.0f}"
        table.add_row("yes" if replay else "no", rate, *map(str, figures), str(much), str(little))
    console.print(f"{args.events:,} events, {PER_MESSAGE} a message, {args.lost:.0%} of the messages lost")
    console.print("the publisher runs on the same core, and takes its part of the time")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("lookup", "events"))
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--lost", type=float, default=0.01)
    args = parser.parse_args()
    {"lookup": lookup, "events": events}[args.what](args, Console())


if __name__ == "__main__":
    main()
