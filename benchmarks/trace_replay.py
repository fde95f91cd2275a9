"""A public trace against a real engine, and whether `kvkeep bench simulate` foretells what its keeper gives.

    python benchmarks/trace_replay.py TRACE [--scale 0.0625] [--rate 1.5] [--requests 400] [--json FILE]

SmolLM2 without a prefix cache of its own, so that all reuse is the keeper's; a keeper with less memory than
the trace fills, which records (`--record`); `kvkeep bench serve trace` sends the requests as they came. Then
the recording is simulated with the same memory and policy. Both ratios are chunks that were found to chunks
that were asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kvbench.engine import VllmServer, connector_args, fastest_dtype  # noqa: E402
from kvbench.servers import figures, keeper  # noqa: E402

console = Console(stderr=True, highlight=False)
MODEL = ROOT / "demo" / "models" / "smollm2"
ENGINE = ["--max-model-len", "8192", "--block-size", "32", "--no-enable-prefix-caching"]


def command(*words: object) -> dict[str, Any]:
    """Run `kvkeep bench` and read what it prints; its progress passes."""
    run = [sys.executable, "-m", "kvkeep.cli", "bench", *map(str, words), "--json"]
    done = subprocess.run(run, stdout=subprocess.PIPE, timeout=3600, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Replay, then simulate."""
    flags = ["--dtype", fastest_dtype(), *ENGINE]
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as folder:
        out, socket = Path(folder), f"{folder}/keeper.sock"
        record = out / "requests.jsonl"
        recorded = ["--record", str(record), "--policy", args.policy]
        with keeper(socket, args.memory, [], out / "keeper.log", args=recorded):
            engine = VllmServer(MODEL, [*flags, *connector_args(socket=socket)], log=out / "engine.log")
            with engine:
                load = ["serve", "trace", "--data", args.trace, "--scale", args.scale, "--rate", args.rate]
                load += ["--requests", args.requests, "--ignore-eos", "--url", engine.url, "--model", "model"]
                served = command(*load, "--output", out / "load")
            counters = figures(socket)["counters"]
        simulated = command(
            "simulate", record, "--memory", args.memory, "--disk", "0", "--policies", args.policy
        )
    (case,) = simulated["results"]
    live = counters["hit_chunks"] / counters["asked_chunks"]
    kept = ("requests", "errors", "prompt_tokens", "output_tokens", "kept_schedule", "ttft_s", "itl_s")
    return {
        "live_hit_ratio": round(live, 4),
        "simulated_hit_ratio": round(case["hit_ratio"], 4),
        "points_apart": round(100 * (case["hit_ratio"] - live), 2),
        "room_for_everything": round(simulated["best_hit_ratio"], 4),
        "counters": counters,
        "load": {name: served[name] for name in kept},
    }


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--scale", type=float, default=0.0625, help="of the trace's lengths")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--requests", type=int, default=400, help="from the trace's beginning")
    parser.add_argument("--memory", default="2GiB", help="of the keeper")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
