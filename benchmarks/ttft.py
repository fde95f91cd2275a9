"""What a hit and a miss cost on a real model: ratios within one run, set-ups in turn.

    python benchmarks/ttft.py [--model smollm2] [--json FILE]

One engine alone and one with kvkeep are alive at once; only one computes at a time. A hit is
compared with the same engine's own prefix-cache hit on the same prompt; a miss with the engine
alone, on prompts that never repeat, alternating.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from kvkeep.bench.engine import VllmServer, connector_args, fastest_dtype

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))
console = Console(stderr=True, highlight=False)


def prompt_ids(model: Path) -> list[int]:
    """A real document of 6 to 7 thousand tokens, as token ids."""
    from document import document
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = tokenizer.encode(document(tokenizer))
    return ids


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


def misses(engines: dict[str, VllmServer], rounds: int, length: int) -> dict[str, Any]:
    """TTFT and whole latency of prompts that never repeat, engine by engine in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        order = list(engines) if number % 2 else list(engines)[::-1]
        for name in order:
            start = 100 + 37 * number
            fresh = [start + (i * (number + 3) * 31) % 4000 for i in range(length)]
            seconds[name].append(engines[name].complete(fresh, 1).ttft_s)
    pairs = [on / off for on, off in zip(seconds["kvkeep"], seconds["alone"], strict=True)]
    return {
        "miss_prompt_tokens": length,
        "miss_alone_s": statistics.median(seconds["alone"]),
        "miss_kvkeep_s": statistics.median(seconds["kvkeep"]),
        "miss_ratio": statistics.median(seconds["kvkeep"]) / statistics.median(seconds["alone"]),
        "miss_pair_ratios": [round(pair, 4) for pair in sorted(pairs)],
    }


def measure(model: str, rounds: int, miss_rounds: int) -> dict[str, Any]:
    """Everything; a private keeper per engine life."""
    folder = ROOT / "demo" / "models" / model
    ids = prompt_ids(folder)
    args = ["--dtype", fastest_dtype(), "--max-model-len", "8192"]
    with tempfile.TemporaryDirectory() as out:
        on = VllmServer(folder, [*args, *connector_args(memory="2GiB")], log=Path(out) / "on.log")
        off = VllmServer(folder, args, log=Path(out) / "off.log", environ={"VLLM_CPU_KVCACHE_SPACE": "1"})
        console.print("starting vLLM with and without kvkeep")
        with on, off:
            for engine in (on, off):
                engine.complete(list(range(100, 800)), 2)
            console.print(f"cold: {len(ids)} tokens")
            cold = on.complete(ids, 1).ttft_s
            console.print(f"  {cold:.2f} s")
            result = {
                "model": model,
                "dtype": fastest_dtype(),
                "prompt_tokens": len(ids),
                "cold_ttft_s": cold,
            }
            result |= hits(on, ids, rounds)
            result["cold_over_warm"] = cold / result["warm_ttft_s"]
            console.print("misses")
            result |= misses({"alone": off, "kvkeep": on}, miss_rounds, 512)
    return result


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--miss-rounds", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result = measure(args.model, args.rounds, args.miss_rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
