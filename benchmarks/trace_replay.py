"""A public trace against a real engine, and whether `kvkeep bench simulate` foretells what its keeper gives.

    python benchmarks/trace_replay.py TRACE [--scale 0.0625] [--rate 1.5] [--requests 400] [--json FILE]
        [--sample 20] [--memory 2GiB] [--disk 4GiB]

SmolLM2 without a prefix cache of its own, so that all reuse is the keeper's; a keeper with less memory than
the trace fills (and with `--disk` a directory below it), which records; `kvkeep bench serve trace` sends the
requests as they came. Then two simulations with the same sizes and policy: of the recording, and of
the trace itself, its lengths scaled alike, which knows nothing of the run. Each ratio is of what was asked
for: chunks that were found, or the trace's blocks.
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
from kvbench.servers import await_prepared, figures, keeper  # noqa: E402
from kvbench.trace import read_requests  # noqa: E402

console = Console(stderr=True, highlight=False)
MODEL = ROOT / "demo" / "models" / "smollm2"
ENGINE = ["--max-model-len", "8192", "--block-size", "32", "--no-enable-prefix-caching"]


def command(*words: object) -> dict[str, Any]:
    """Run `kvkeep bench` and read what it prints; its progress passes."""
    run = [sys.executable, "-m", "kvkeep.cli", "bench", *map(str, words), "--json"]
    done = subprocess.run(run, stdout=subprocess.PIPE, timeout=3600, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write(args: argparse.Namespace, path: Path, scale: float) -> Path:
    """The requests that are sent, as a trace of its own, with lengths and blocks at a scale.

    Of the trace they are those whose first block is one of `sample`: whole families of prompts, so that what
    repeats, repeats as often, and from the beginning on.
    """
    lines = []
    for one in read_requests(args.trace):
        if not one.hash_ids or one.hash_ids[0] % args.sample:
            continue
        sizes = {"input_length": round(one.input_length * scale), "block_tokens": round(512 * scale)}
        line = {"timestamp": one.timestamp, "output_length": one.output_length, "hash_ids": one.hash_ids}
        lines.append(json.dumps({**line, **sizes}) + "\n")
    path.write_text("".join(lines[: args.requests]))
    return path


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Replay, then simulate."""
    flags = ["--dtype", fastest_dtype(), *ENGINE]
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as folder:
        out, socket = Path(folder), f"{folder}/keeper.sock"
        record = out / "requests.jsonl"
        recorded = ["--record", str(record), "--policy", args.policy]
        tiers = [f"fs://{folder}/kv?capacity={args.disk}"] if args.disk != "0" else []
        with keeper(socket, args.memory, tiers, out / "keeper.log", args=recorded):
            await_prepared(socket)
            engine = VllmServer(MODEL, [*flags, *connector_args(socket=socket)], log=out / "engine.log")
            with engine:
                sent = write(args, out / "sent.jsonl", 1.0)
                load = ["serve", "trace", "--data", sent, "--scale", args.scale, "--rate", args.rate]
                load += ["--ignore-eos", "--url", engine.url, "--model", "model"]
                served = command(*load, "--output", out / "load")
            state = figures(socket)
        sizes = ["--memory", args.memory, "--disk", args.disk, "--policies", args.policy]
        seen = command("simulate", record, *sizes)
        size = ["--bytes-per-token", seen["block_bytes"] / seen["block_tokens"]]
        size += ["--chunk-tokens", seen["chunk_tokens"]]
        told = command("simulate", write(args, out / "scaled.jsonl", args.scale), *sizes, *size)
    counters = state["counters"]
    live = counters["hit_chunks"] / counters["asked_chunks"]
    kept = (
        "requests",
        "errors",
        "prompt_tokens",
        "output_tokens",
        "kept_schedule",
        "seconds",
        "ttft_s",
        "itl_s",
    )
    found: dict[str, Any] = {"live_hit_ratio": round(live, 4)}
    for name, one in (("recording", seen), ("trace", told)):
        (case,) = one["results"]
        found[f"{name}_hit_ratio"] = round(case["hit_ratio"], 4)
        found[f"{name}_of_disk"] = round(case["disk_hit_ratio"], 4)
        found[f"{name}_points_apart"] = round(100 * (case["hit_ratio"] - live), 2)
        found[f"{name}_room_for_everything"] = round(one["best_hit_ratio"], 4)
        found[f"{name}_distinct_bytes"] = one["distinct_bytes"]
    return {
        **found,
        "chunk_tokens": seen["chunk_tokens"],
        "counters": counters,
        "tiers": state["tiers"],
        "load": {name: served[name] for name in kept},
    }


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--scale", type=float, default=0.0625, help="of the trace's lengths")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--requests", type=int, default=400, help="from the trace's beginning")
    parser.add_argument("--sample", type=int, default=1, help="one of so many families of prompts")
    parser.add_argument("--memory", default="2GiB", help="of the keeper")
    parser.add_argument("--disk", default="0", help="of the directory below it, 0: none")
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
