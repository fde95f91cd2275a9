"""What one prompt that never repeats costs: pairs of prompts, within one engine.

    python benchmarks/misses.py [--lengths 64 512 2048] [--pairs 100] [--answer 16] [--tier URL] [--json FILE]

Of two fresh prompts, in random order, one is looked up and saved, the other kept from kvkeep's sight
(`half_seen.py`). Two engines differ by a percent or two for no reason but their start; these have all in
common, the connector's own cost in each step included, which `bench compare` shows. Figures: the mean of
the pairs' differences without the tenth that is greatest and the tenth that is least, its standard error,
and both as shares of the median without kvkeep.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kvbench.engine import Answer, VllmServer, fastest_dtype
from kvbench.servers import await_prepared, figures, keeper
from kvkeep.config import environment

ROOT = Path(__file__).parents[1]
console = Console(stderr=True, highlight=False)
SETTLE_S, BREATH_S = 5.0, 0.1
"""After the keeper's memory is prepared (the engine enters it meanwhile), and between prompts."""
OWN = ("saved_tokens", "lookup_seconds", "reserve_seconds", "save_seconds")


def prompt(draw: random.Random, length: int, seen: bool) -> list[int]:
    """Token ids that nobody has asked before; those that kvkeep is to see begin with an even one."""
    return [100 + 2 * draw.randrange(2000) + (not seen), *draw.choices(range(100, 4100), k=length - 1)]


def difference(seen: Sequence[float], unseen: Sequence[float]) -> dict[str, float]:
    """By how much the first are greater, pair by pair, in milliseconds and as a share."""
    pairs = sorted(1e3 * (one - other) for one, other in zip(seen, unseen, strict=True))
    inner = pairs[len(pairs) // 10 : len(pairs) - len(pairs) // 10]
    mean, error = statistics.mean(inner), statistics.stdev(inner) / len(inner) ** 0.5
    base = 1e3 * statistics.median(unseen)
    return {
        "unseen_ms": round(base, 2),
        "more_ms": round(mean, 3),
        "error_ms": round(error, 3),
        "more_share": round(mean / base, 5),
        "error_share": round(error / base, 5),
    }


def pairs_of(engine: VllmServer, length: int, pairs: int, tokens: int) -> dict[str, Any]:
    """Pairs of prompts of one length."""
    draw = random.Random(f"misses {length} {time.time()}")
    answers: dict[bool, list[Answer]] = {True: [], False: []}
    before = {name: engine.metric(f"vllm:kvkeep_{name}_total") for name in OWN}
    for _ in range(pairs):
        for seen in draw.sample([True, False], 2):
            time.sleep(BREATH_S)
            answers[seen].append(engine.complete(prompt(draw, length, seen), tokens, ignore_eos=True))
    row: dict[str, Any] = {"prompt_tokens": length, "answer_tokens": tokens, "pairs": pairs}
    for name, count in before.items():
        row[f"{name}_of_a_prompt"] = round((engine.metric(f"vllm:kvkeep_{name}_total") - count) / pairs, 6)
    for what in ("ttft_s", "latency_s"):
        seen_, unseen = ([getattr(answer, what) for answer in answers[kind]] for kind in (True, False))
        row[what] = difference(seen_, unseen)
        console.print(f"  {length} tokens, {what}: {row[what]}")
    return row


def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All lengths, on one engine beside the keeper whose socket is in `out`."""
    socket = f"{out}/keeper.sock"
    transfer = {
        "kv_connector": "HalfSeenConnector",
        "kv_connector_module_path": "half_seen",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"socket": socket},
    }
    flags = ["--dtype", args.dtype, "--max-model-len", "8192", "--block-size", "32"]
    flags += ["--kv-transfer-config", json.dumps(transfer)]
    places = [str(Path(__file__).parent), str(ROOT), *environment(["PYTHONPATH"]).values()]
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ":".join(places)}
    model = ROOT / "demo" / "models" / args.model
    with VllmServer(model, flags, log=out / "vllm.log", environ=environ) as engine:
        engine.complete(prompt(random.Random(time.time()), 700, seen=True), 2)
        await_prepared(socket)
        time.sleep(SETTLE_S)
        state = figures(socket)
        rows = [pairs_of(engine, length, args.pairs, args.answer) for length in args.lengths]
    huge = state["huge_page_bytes"] / state["memory_bytes"]
    about = {"model": args.model, "dtype": args.dtype, "tiers": args.tier, "huge_pages": round(huge, 3)}
    return {**about, "lengths": rows}


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    parser.add_argument("--dtype", default=fastest_dtype(), help="default: the one this CPU computes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048], help="tokens of a prompt")
    parser.add_argument("--pairs", type=int, default=100, help="of each length; more than four")
    parser.add_argument("--answer", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--memory", default="2GiB", help="of the keeper; what no longer fits is evicted")
    parser.add_argument(
        "--tier", default=[], action="append", metavar="URL", help="below it; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        with keeper(f"{out}/keeper.sock", args.memory, args.tier, out / "keeper.log", drain_s=0):
            result = measure(args, out)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
