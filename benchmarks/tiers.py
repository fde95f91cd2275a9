"""Documents whose KV is larger than memory: what the second pass costs from each tier.

    python benchmarks/tiers.py [--stores fs,redis,s3] [--documents 10] [--memory 1GiB] [--json FILE]

One engine lives through it all. First pass: every document is prefilled, and written through to all
tiers at once. Then, tier by tier, a keeper with empty memory and that tier alone: every document is asked
for again, from the tier, and once more, from memory. Every answer is compared with the engine's own
prefix-cache hit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from benchmarks.stores import STORES, stores  # noqa: E402
from kvbench.engine import VllmServer, connector_args, fastest_dtype  # noqa: E402
from kvbench.servers import figures, keeper  # noqa: E402

console = Console(stderr=True, highlight=False)
ANSWER_TOKENS = 8


def attached(engine: VllmServer) -> None:
    """Wait until the engine has found the keeper."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        engine.complete([5, 6, 7], 1)
        if engine.metric("vllm:kvkeep_attached") == 1:
            return
        time.sleep(0.2)
    raise SystemExit("the engine has not found the keeper within 30 s")


def first_pass(engine: VllmServer, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Cold answers, and the engine's own prefix-cache hits to compare with."""
    rows = []
    for number, prompt in enumerate(prompts):
        cold = engine.complete(prompt, ANSWER_TOKENS)
        local = engine.complete(prompt, ANSWER_TOKENS)
        rows.append(
            {
                "tokens": cold.prompt_tokens,
                "cold_s": cold.ttft_s,
                "local_s": local.ttft_s,
                "cold_text": cold.text,
                "text": local.text,
            }
        )
        console.print(
            f"  {number}: {len(prompt)} tokens, cold {cold.ttft_s:.2f} s, local hit {local.ttft_s:.3f} s"
        )
    return rows


def second_pass(
    engine: VllmServer, prompts: list[list[int]], rows: list[dict[str, Any]], name: str
) -> dict[str, Any]:
    """Each document from a tier, then from memory."""
    names = ("loaded_tokens", "tier_wait_seconds", "tier_timeouts", "load_seconds")
    before = {one: engine.metric(f"vllm:kvkeep_{one}_total") for one in names}
    tier, memory, equal = [], [], True
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        engine.reset_local_cache()
        from_tier = engine.complete(prompt, ANSWER_TOKENS)
        engine.reset_local_cache()
        from_memory = engine.complete(prompt, ANSWER_TOKENS)
        tier.append(from_tier.ttft_s)
        memory.append(from_memory.ttft_s)
        equal = equal and from_tier.text == from_memory.text == row["text"]
        console.print(f"  {number}: {name} {from_tier.ttft_s:.3f} s, memory {from_memory.ttft_s:.3f} s")
    spent = {one: engine.metric(f"vllm:kvkeep_{one}_total") - before[one] for one in names}
    return {
        "ttft_s": tier,
        "memory_ttft_s": memory,
        "answers_equal": equal,
        **{one: round(value, 3) for one, value in spent.items()},
    }


def measure(model: str, names: list[str], documents: int, memory: str) -> dict[str, Any]:
    """Everything; returns one result."""
    from document import documents as texts
    from transformers import AutoTokenizer

    folder = ROOT / "demo" / "models" / model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [(4000, 4600), (5000, 5600), (6900, 7300)]
    prompts = []
    for number in range(documents):
        low, high = lengths[number % len(lengths)]
        prompts.append(tokenizer.encode(texts(tokenizer, number + 1, low, high)[number]))
    dtype = fastest_dtype()
    args = ["--dtype", dtype, "--max-model-len", "8192"]
    with stores(names) as urls, tempfile.TemporaryDirectory() as out:
        socket, log = f"{out}/keeper.sock", Path(out) / "keeper.log"
        with contextlib.ExitStack() as stack:
            first = contextlib.ExitStack()
            first.enter_context(keeper(socket, memory, list(urls.values()), log))
            args += connector_args(socket=socket)
            console.print("starting vLLM")
            engine = stack.enter_context(VllmServer(folder, args, log=Path(out) / "engine.log"))
            engine.complete(list(range(100, 800)), 2)
            console.print("first pass: prefilled, and written through")
            rows = first_pass(engine, prompts)
            state = figures(socket)
            first.close()
            result: dict[str, Any] = {
                "model": model,
                "dtype": dtype,
                "memory_bytes": state["memory_bytes"],
                "stored_bytes": state["counters"]["stored_bytes"],
                "evicted_chunks": state["counters"]["evicted_chunks"],
                "documents": [row["tokens"] for row in rows],
                "cold_s": [row["cold_s"] for row in rows],
                "local_s": [row["local_s"] for row in rows],
                "cold_equals_local": [row["cold_text"] == row["text"] for row in rows],
                "tiers": {},
            }
            for name, url in urls.items():
                console.print(f"second pass: {name}")
                with keeper(socket, memory, [url], log):
                    attached(engine)
                    passed = second_pass(engine, prompts, rows, name)
                    result["tiers"][name] = passed | {"figures": figures(socket)["tiers"][0]}
    return result


def show(result: dict[str, Any]) -> None:
    """The table: medians over the documents of 4 to 7 thousand tokens, and the longest one."""
    longest = max(range(len(result["documents"])), key=lambda number: result["documents"][number])
    cold = result["cold_s"]
    table = Table(
        "second pass from",
        "TTFT, median",
        "below cold",
        f"{result['documents'][longest]} tokens",
        "below cold",
        "answers",
        title=f"{len(cold)} documents, {result['stored_bytes'] / 1e9:.2f} GB of KV, "
        f"{result['memory_bytes'] / 1e9:.2f} GB of memory, {result['dtype']}",
    )

    def row(name: str, seconds: list[float], answers: str) -> None:
        ratio = statistics.median(c / s for c, s in zip(cold, seconds, strict=True))
        table.add_row(
            name,
            f"{statistics.median(seconds):.3f} s",
            f"{ratio:.1f}×",
            f"{seconds[longest]:.3f} s",
            f"{cold[longest] / seconds[longest]:.1f}×",
            answers,
        )

    row("nothing (cold)", cold, "")
    row("engine's own cache", result["local_s"], "")
    for name, tier in result["tiers"].items():
        if name == next(iter(result["tiers"])):
            row("memory", tier["memory_ttft_s"], "")
        row(name, tier["ttft_s"], "equal" if tier["answers_equal"] else "NOT equal")
    console.print(table)


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    parser.add_argument("--stores", default=",".join(STORES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--memory", default="1GiB", help="the keeper's (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result = measure(args.model, args.stores.split(","), args.documents, args.memory)
    show(result)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0 if all(tier["answers_equal"] for tier in result["tiers"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
