"""What a slow or hung store costs requests: those that miss, and those whose KV it holds.

    python benchmarks/slow_store.py [--rounds 8] [--json FILE]

One engine; a keeper without a tier, one on a directory, one on the same directory made slow (2 s a verb,
1 MB/s), one on it hung; keepers take turns, so that whatever else the machine does falls on all. Each
round has a prompt that nobody has seen, and, from the empty memory of a keeper just started, the document
that the directory holds.
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

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from benchmarks.tiers import attached, figures, keeper  # noqa: E402
from kvbench.engine import VllmServer, connector_args, fastest_dtype  # noqa: E402

console = Console(stderr=True, highlight=False)
LENGTH = 1500


def fresh(number: int) -> list[int]:
    """A prompt that shares no chunk with another one."""
    return [100 + 37 * number + (i * (number + 3) * 31) % 4000 for i in range(LENGTH)]


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
        }
        args = ["--dtype", fastest_dtype(), "--max-model-len", "8192", *connector_args(socket=socket)]
        seconds: dict[str, dict[str, list[float]]] = {name: {"miss": [], "held": []} for name in urls}
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
                        for kind in ("miss", "held", "miss"):
                            engine.reset_local_cache()
                            prompt = held if kind == "held" else fresh(number)
                            number += kind == "miss"
                            seconds[name][kind].append(engine.complete(prompt, 1).ttft_s)
                console.print(f"  round {turn} of {rounds}")
    base = statistics.median(seconds["no tier"]["miss"])
    return {
        "prompt_tokens": LENGTH,
        "rounds": rounds,
        "keepers": {
            name: {
                "miss_s": statistics.median(kinds["miss"]),
                "miss_over_no_tier": statistics.median(kinds["miss"]) / base,
                "miss_quartiles_s": statistics.quantiles(kinds["miss"]),
                "miss_most_s": max(kinds["miss"]),
                "held_s": statistics.median(kinds["held"]),
                "held_most_s": max(kinds["held"]),
            }
            for name, kinds in seconds.items()
        },
    }


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
