"""What a hit and a miss cost on a real model: ratios within one run, set-ups in turn.

    python benchmarks/ttft.py [--model smollm2] [--dtype float32] [--only throughput] [--json FILE]

A hit is compared with the same engine's own prefix-cache hit on the same prompt; a miss with the engine
alone, on prompts that never repeat: one request's time to first token, where engines with and without
kvkeep are started and ended in turn; and the tokens per second of several requests at once, where one of
each is alive and one computes at a time. There each round is alone, kvkeep, alone: what the two runs of the
engine alone differ by is the noise.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from kvbench.engine import VllmServer, connector_args, fastest_dtype

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))
console = Console(stderr=True, highlight=False)
REST_S = 2.0
"""Between turns: for a while the other engine's threads still look for work on the same cores."""
SETTLE_S, BREATH_S = 10.0, 0.4
"""After a start (memory is prepared meanwhile), and between prompts."""


def prompt_ids(model: Path) -> list[int]:
    """A real document of 6 to 7 thousand tokens, as token ids."""
    from document import document
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = tokenizer.encode(document(tokenizer))
    return ids


def fresh_ids(seed: str, length: int) -> list[int]:
    """Token ids of a prompt that nobody has asked before."""
    return random.Random(seed).choices(range(100, 4100), k=length)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def hits(engine: VllmServer, ids: list[int], rounds: int) -> dict[str, Any]:
    """Warm TTFT by kvkeep and by the engine's own prefix cache, alternating; and the parts of a hit."""
    warm, local = [], []
    names = ("lookup_seconds", "load_seconds", "loaded_bytes", "lookups")
    before = {name: engine.metric(f"vllm:kvkeep_{name}_total") for name in names}
    for number in range(rounds):
        engine.reset_local_cache()
        warm.append(engine.complete(ids, 1).ttft_s)
        local.append(engine.complete(ids, 1).ttft_s)
        console.print(f"  round {number}: kvkeep {warm[-1]:.3f} s, local hit {local[-1]:.3f} s")
    spent = {name: engine.metric(f"vllm:kvkeep_{name}_total") - before[name] for name in names}
    return {
        "warm_ttft_s": statistics.median(warm),
        "local_ttft_s": statistics.median(local),
        "warm_over_local": statistics.median(warm) / statistics.median(local),
        "warm_over_local_best": min(warm) / min(local),
        "lookup_ms": 1e3 * spent["lookup_seconds"] / spent["lookups"],
        "load_ms": 1e3 * spent["load_seconds"] / rounds,
        "loaded_bytes": spent["loaded_bytes"] / rounds,
        "load_GBps": spent["loaded_bytes"] / spent["load_seconds"] / 1e9,
    }


def misses(
    start: dict[str, Callable[[], VllmServer]], lives: int, prompts: int, length: int
) -> dict[str, Any]:
    """TTFT of prompts that never repeat. Engines are started and ended in turn, since two that live on the
    same cores disturb each other. And by kvkeep's own clocks: what of that time it looks up, reserves and
    copies, which tells what the noise of this machine hides."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in start}
    own: dict[str, list[float]] = {name: [] for name in start}
    for life in range(lives):
        for name in list(start) if life % 2 == 0 else list(start)[::-1]:
            with start[name]() as engine:
                engine.complete(fresh_ids("warm up", 700), 2)
                time.sleep(SETTLE_S)
                found, before = [], spent(engine)
                for number in range(prompts):
                    time.sleep(BREATH_S)
                    found.append(engine.complete(fresh_ids(f"miss {life} {number}", length), 1).ttft_s)
                own[name].append((spent(engine) - before) / prompts)
            seconds[name].append(found)
            console.print(f"  life {life}, {name}: {1e3 * statistics.median(found):.1f} ms")
    medians = {name: [statistics.median(found) for found in its] for name, its in seconds.items()}
    ratios = [on / off for on, off in zip(medians["kvkeep"], medians["alone"], strict=True)]
    return {
        "miss_prompt_tokens": length,
        "miss_prompts": [lives, prompts],
        "miss_alone_ms": [round(1e3 * median, 1) for median in medians["alone"]],
        "miss_kvkeep_ms": [round(1e3 * median, 1) for median in medians["kvkeep"]],
        "miss_ratio": statistics.median(medians["kvkeep"]) / statistics.median(medians["alone"]),
        "miss_life_ratios": [round(ratio, 4) for ratio in ratios],
        "miss_alone_spread": round(max(medians["alone"]) / min(medians["alone"]), 4),
        "miss_own_ms": [round(1e3 * mean, 2) for mean in own["kvkeep"]],
        "miss_own_share": [
            round(mean / median, 4) for mean, median in zip(own["kvkeep"], medians["kvkeep"], strict=True)
        ],
    }


def spent(engine: VllmServer) -> float:
    """Seconds of requests' time that kvkeep has taken so far: all of it lies before their first token."""
    parts = ("lookup", "reserve", "save")
    return sum(engine.metric(f"vllm:kvkeep_{part}_seconds_total") for part in parts)


def throughput(
    engines: dict[str, VllmServer], rounds: int, requests: int = 4, length: int = 1500, tokens: int = 16
) -> dict[str, Any]:
    """Tokens per second, prompt and answer, of several requests at once that miss."""
    speeds: list[list[float]] = []
    with ThreadPoolExecutor(requests) as pool:
        for number in range(rounds + 1):
            row = []
            for turn, name in enumerate(("alone", "kvkeep", "alone")):
                prompts = [fresh_ids(f"{number} {turn} {i}", length) for i in range(requests)]
                ask = partial(engines[name].complete, max_tokens=tokens, ignore_eos=True)
                time.sleep(REST_S)
                began = time.perf_counter()
                answers = list(pool.map(ask, prompts))
                took = time.perf_counter() - began
                row.append(sum(answer.prompt_tokens + answer.output_tokens for answer in answers) / took)
            speeds.append(row)
            console.print(f"  round {number}: " + ", ".join(f"{speed:.0f}" for speed in row) + " tokens/s")
    del speeds[0]  # it warms up
    first, kept, last = zip(*speeds, strict=True)
    means = [(one + two) / 2 for one, two in zip(first, last, strict=True)]
    return {
        "throughput_requests": [requests, length, tokens],
        "throughput_rounds": rounds,
        "throughput_alone": round(statistics.median([*first, *last]), 1),
        "throughput_kvkeep": round(statistics.median(kept), 1),
        "throughput_ratio": quartiles([on / off for on, off in zip(kept, means, strict=True)]),
        "throughput_alone_ratio": quartiles([two / one for one, two in zip(first, last, strict=True)]),
    }


def cold_and_hits(engine: VllmServer, ids: list[int], rounds: int) -> dict[str, Any]:
    """One cold request, and hits on the same prompt."""
    console.print(f"cold: {len(ids)} tokens")
    cold = engine.complete(ids, 1).ttft_s
    console.print(f"  {cold:.2f} s")
    result = {"prompt_tokens": len(ids), "cold_ttft_s": cold, **hits(engine, ids, rounds)}
    return {**result, "cold_over_warm": cold / result["warm_ttft_s"]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for; a private keeper for the engine that has one."""
    folder = ROOT / "demo" / "models" / args.model
    flags = ["--dtype", args.dtype, "--max-model-len", "8192"]
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    result: dict[str, Any] = {"model": args.model, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as out:
        extra = {"alone": [], "kvkeep": connector_args(memory="2GiB")}
        start = {
            name: partial(VllmServer, folder, [*flags, *more], log=Path(out) / f"{name}.log", environ=environ)
            for name, more in extra.items()
        }
        if "misses" in args.only:
            console.print("misses: one engine at a time")
            result |= misses(start, args.miss_lives, args.miss_prompts, 512)
        if args.only == ["misses"]:
            return result
        console.print("starting vLLM with and without kvkeep")
        with start["kvkeep"]() as on, start["alone"]() as off:
            engines = {"alone": off, "kvkeep": on}
            for engine in engines.values():
                engine.complete(fresh_ids("warm up", 700), 2)
            if "hits" in args.only:
                result |= cold_and_hits(on, prompt_ids(folder), args.rounds)
            if "throughput" in args.only:
                console.print("misses at once: alone, kvkeep, alone")
                result |= throughput(engines, args.throughput_rounds)
    return result


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("hits", "misses", "throughput")
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    parser.add_argument("--dtype", default=fastest_dtype(), help="default: the one this CPU computes")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--miss-lives", type=int, default=4, help="engines of each kind")
    parser.add_argument("--miss-prompts", type=int, default=24, help="of each engine")
    parser.add_argument("--throughput-rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result = measure(args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
