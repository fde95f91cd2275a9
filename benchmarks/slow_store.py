"""What a slow or hung store costs requests: those that miss, and those whose KV it holds.

    python benchmarks/slow_store.py [--rounds 8] [--json FILE]

One engine; a keeper without a tier, one on a directory, one on the same directory made slow (2 s a verb,
1 MB/s), one on it hung, one on it that tells what it holds and hangs when it is to give it; keepers take
turns, so that whatever else the machine does falls on all, and each has prepared its memory before it is
asked. Each round has prompts that nobody has seen, and, from the empty memory of a keeper just started, the
document that the directory holds. A rest before each, since a wait may leave work behind.

A request may wait `probe_wait` to hear what a tier holds (or 1 % of what computing takes), and for what it
holds `load_wait`, or as long as computing takes. The excess is what it took beyond computing and that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from benchmarks.tiers import attached, figures, keeper  # noqa: E402
from kvbench.engine import VllmServer, connector_args, fastest_dtype  # noqa: E402
from kvkeep.config import EngineConfig  # noqa: E402

console = Console(stderr=True, highlight=False)
LENGTH = 1500
REST = 2.0  # seconds
WAITED = "vllm:kvkeep_tier_wait_seconds_total"


def fresh(number: int) -> list[int]:
    """A prompt that shares no chunk with another one."""
    return [100 + 37 * number + (i * (number + 3) * 31) % 4000 for i in range(LENGTH)]


def prepared(socket: str) -> None:
    """Wait until the keeper has all its memory: until then it takes a core of the engine's."""
    deadline = time.monotonic() + 120
    while (state := figures(socket))["prefaulted_bytes"] < state["memory_bytes"]:
        if time.monotonic() > deadline:
            raise SystemExit("the keeper has not prepared its memory within two minutes")
        time.sleep(0.2)


def ask(engine: VllmServer, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and of those, seconds that it waited for tiers."""
    engine.reset_local_cache()
    time.sleep(REST)
    before = engine.metric(WAITED)
    took = engine.complete(prompt, 1).ttft_s
    return took, engine.metric(WAITED) - before


def deadlines(compute: float) -> dict[str, dict[str, float]]:
    """By keeper and kind of prompt, how long a request may wait, where it gets nothing."""
    config = EngineConfig()
    probe = max(config.probe_wait, 0.01 * compute)
    load = probe + min(config.load_wait, compute)
    kinds = {"miss": probe, "held": probe}
    return {"no tier": {"miss": 0.0}, "directory": {"miss": probe}, "slow": kinds, "hung": kinds} | {
        "hung in get": {"miss": probe, "held": load}
    }


def measure(rounds: int) -> dict[str, Any]:
    """TTFT per keeper, of misses and of the held document."""
    model = ROOT / "demo" / "models" / "smollm2"
    held = fresh(0)
    here = Path(__file__).parent / "out"
    here.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=here) as out:
        socket, log, store = f"{out}/k.sock", Path(out) / "keeper.log", f"fs://{out}/kv?capacity=4GiB"
        faulty = "faulty+" + store + "&write=never"
        urls = {
            "no tier": [],
            "directory": [store + "&write=never"],
            "slow": [faulty + "&fault_latency=2s&fault_bandwidth=1MB"],
            "hung": [faulty + "&fault_hang=yes"],
            "hung in get": [faulty + "&fault_hang=yes&fault_verbs=get"],
        }
        args = ["--dtype", fastest_dtype(), "--max-model-len", "8192", *connector_args(socket=socket)]
        seconds: dict[str, dict[str, list[tuple[float, float]]]] = {
            name: {"miss": [], "held": []} for name in urls
        }
        with VllmServer(model, args, log=Path(out) / "engine.log") as engine:
            with keeper(socket, "1GiB", [store], log):
                attached(engine)
                engine.complete(held, 1)
                console.print(f"the store holds {figures(socket)['chunks']} chunks after this")
            number = 1
            for turn in range(rounds):
                names = list(urls) if turn % 2 else list(urls)[::-1]
                for name in names:
                    with keeper(socket, "1GiB", urls[name], log):
                        attached(engine)
                        prepared(socket)
                        for kind in ("miss", "held", "miss"):
                            prompt = held if kind == "held" else fresh(number)
                            number += kind == "miss"
                            seconds[name][kind].append(ask(engine, prompt))
                console.print(f"  round {turn} of {rounds}")
    compute = statistics.median(took for took, _ in seconds["no tier"]["miss"])
    allowed = deadlines(compute)
    return {
        "prompt_tokens": LENGTH,
        "rounds": rounds,
        "compute_s": compute,
        "keepers": {
            name: {kind: summary(rows, compute, allowed[name].get(kind)) for kind, rows in kinds.items()}
            for name, kinds in seconds.items()
        },
    }


def summary(rows: list[tuple[float, float]], compute: float, deadline: float | None) -> dict[str, Any]:
    """Of one keeper and kind; `deadline` None: it loads, or has nothing to wait for."""
    took, waited = ([row[at] for row in rows] for at in (0, 1))
    out = {"median_s": statistics.median(took), "over_compute": statistics.median(took) / compute}
    out |= {"all_s": took, "most_s": max(took), "waited_most_s": max(waited)}
    if deadline is not None:
        beyond = compute + deadline
        out |= {"deadline_s": deadline, "waited_excess_most_s": max(waited) - deadline}
        out |= {"excess_s": out["median_s"] - beyond, "excess_most_s": max(took) - beyond}
    return out


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    text = json.dumps(measure(args.rounds), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
