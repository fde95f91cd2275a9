"""vLLM alone, with kvkeep, its own offloading, LMCache's multiprocess mode: the same prompts, in one run.

The engines are alive at once and one computes at a time. See README.md for what is compared and how.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from setups import CHUNK, OUT, PEER, Setup, busy_seconds, cpu_seconds, set_ups

from kvbench.engine import fastest_dtype

DEMO = Path(__file__).parents[2] / "demo"
TAIL = 8  # tokens past the last whole chunk: what is left to compute at a full hit, the same for all
HIT_TOKENS, MISS_TOKENS = 23 * CHUNK, 4 * CHUNK
SETUPS = ("alone", "kvkeep", "offloading", "lmcache")
LIVES_ON = ("kvkeep", "lmcache")  # their caches, where the engine is restarted
NEED_GIB = 4.5  # for each
QUIET, FOREIGN = 0.10, 0.10  # of both cores: what counts as idle, and what spoils a sample
console = Console(highlight=False, width=None if sys.stdout.isatty() else 118)
began = time.monotonic()


def say(text: str) -> None:
    """One line of progress with the time since the start."""
    console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {text}")


@dataclass
class Sample:
    """One request."""

    phase: str
    setup: str
    prompt: int
    ttft_s: float
    text: str
    foreign: float
    """Share of the machine's CPU that was taken by processes outside this run, and by the host."""
    cpu_s: float
    """CPU seconds of the engine and its cache server."""
    hit_tokens: int
    """Tokens the engine took from the cache outside it."""
    moved: dict[str, float]
    """Bytes and seconds stored and loaded, by the cache's own clock."""


class Bench:
    """The set-ups, and all samples taken of them."""

    def __init__(self, setups: list[Setup], patience: float) -> None:
        self.setups = setups
        self.samples: list[Sample] = []
        self.patience = patience

    def rotation(self, turn: int, names: Sequence[str] = ()) -> list[Setup]:
        """The set-ups, each time another one first."""
        chosen = [setup for setup in self.setups if not names or setup.name in names]
        return chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]

    def ask(self, phase: str, setup: Setup, prompts: list[list[int]], number: int, tokens: int = 8) -> Sample:
        """One request on a quiet machine."""
        engine = setup.engine
        assert engine is not None
        self.settle()
        moved, hits = setup.moved(), engine.metric("vllm:external_prefix_cache_hits_total")
        total, all_own, own, clock = (
            busy_seconds(),
            cpu_seconds(self.pids()),
            cpu_seconds(setup.pids()),
            time.perf_counter(),
        )
        answer = engine.complete(prompts[number], tokens, ignore_eos=True)
        wall, cpu = time.perf_counter() - clock, cpu_seconds(setup.pids()) - own
        foreign = (
            (busy_seconds() - total - (cpu_seconds(self.pids()) - all_own)) / wall / (os.cpu_count() or 1)
        )
        self.settle()  # what a cache does after the answer, and the metrics' way to the API server
        after = setup.moved()
        sample = Sample(
            phase,
            setup.name,
            number,
            answer.ttft_s,
            answer.text,
            round(max(0.0, foreign), 3),
            round(cpu, 2),
            int(engine.metric("vllm:external_prefix_cache_hits_total") - hits),
            {name: after[name] - moved[name] for name in moved},
        )
        self.samples.append(sample)
        noise = f", [red]{foreign:.0%} of the CPU elsewhere[/red]" if foreign > FOREIGN else ""
        say(f"    {phase:<14} {setup.name:<8} {sample.ttft_s:7.3f} s, {sample.hit_tokens} loaded{noise}")
        return sample

    def pids(self) -> list[int]:
        """All processes of this run."""
        return [os.getpid(), *(pid for setup in self.setups for pid in setup.pids())]

    def settle(self) -> None:
        """Wait until the machine is idle, as long as patience lasts."""
        while True:
            before = busy_seconds()
            time.sleep(0.4)
            if (busy_seconds() - before) / 0.4 / (os.cpu_count() or 1) < QUIET or self.patience <= 0:
                return
            self.patience -= 0.4

    def idle(self, setup: Setup, seconds: float = 5.0) -> float:
        """CPU cores that the set-up takes while nothing is asked of it."""
        before = cpu_seconds(setup.pids())
        time.sleep(seconds)
        return (cpu_seconds(setup.pids()) - before) / seconds

    def of(self, phase: str, setup: str) -> list[Sample]:
        """Samples of a phase, without those that other processes disturbed if any is left then."""
        found = [s for s in self.samples if s.phase == phase and s.setup == setup]
        return [s for s in found if s.foreign <= FOREIGN] or found


def prompts_for(model: Path, count: int) -> list[list[int]]:
    """Token ids of documents: whole chunks and a short tail."""
    sys.path.insert(0, str(DEMO))
    from document import documents  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = documents(tokenizer, count, HIT_TOKENS + 100, HIT_TOKENS + 900)
    return [tokenizer.encode(text, add_special_tokens=False)[: HIT_TOKENS + TAIL] for text in texts]


def measure(bench: Bench, model: Path, options: argparse.Namespace) -> dict[str, float]:
    """All phases; returns idle CPU by set-up."""
    prompts, caches = prompts_for(model, options.documents), SETUPS[1:]
    for turn, _ in enumerate(prompts):
        say(f"document {turn + 1}: cold, then the engine's own prefix cache")
        for setup in bench.rotation(turn):
            bench.ask("cold", setup, prompts, turn)
        for repeat in range(options.repeats):
            for setup in bench.rotation(repeat):
                bench.ask("local hit", setup, prompts, turn)
    idle = {setup.name: bench.idle(setup) for setup in bench.setups}
    say("full hits: the engine's own cache is emptied before each")
    full_hits(bench, prompts, options.repeats, "hit")
    say(f"misses: prompts of {MISS_TOKENS + TAIL} tokens that nobody has seen")
    source = random.Random(1)
    unseen = [source.choices(range(1000, 40000), k=MISS_TOKENS + TAIL) for _ in range(options.misses)]
    for number in range(options.misses):
        for setup in bench.rotation(number):
            bench.ask("miss", setup, unseen, number, tokens=1)
    for turn in range(options.restarts):
        say("the engines with a cache are restarted; the cache servers, where there are some, live on")
        for setup in bench.rotation(turn, caches):
            setup.stop()
            setup.start(model)
        for number, _ in enumerate(prompts):
            for setup in bench.rotation(turn + number, caches):
                bench.ask("restart first", setup, prompts, number)
        full_hits(bench, prompts, 2, "restart later")
    return idle


def full_hits(bench: Bench, prompts: list[list[int]], repeats: int, phase: str) -> None:
    """Requests for documents that only the cache outside the engine has."""
    for repeat in range(repeats):
        for number, _ in enumerate(prompts):
            for setup in bench.rotation(repeat + number, SETUPS[1:]):
                assert setup.engine is not None
                setup.engine.reset_local_cache()
                bench.ask(phase, setup, prompts, number)


def rate(bench: Bench, setup: str, way: str, phases: Sequence[str]) -> float | None:
    """GB/s over phases: all bytes by all seconds of the cache's own clock."""
    moved = [s.moved for phase in phases for s in bench.of(phase, setup)]
    seconds = sum(m[f"{way}_s"] for m in moved)
    return sum(m[f"{way}_bytes"] for m in moved) / seconds / 1e9 if seconds else None


def overhead(bench: Bench, setup: str) -> float:
    """Median over prompts of a miss's time against the engine alone on the same prompt."""
    alone = {s.prompt: s.ttft_s for s in bench.of("miss", "alone")}
    ratios = [s.ttft_s / alone[s.prompt] for s in bench.of("miss", setup) if s.prompt in alone]
    return statistics.median(ratios) - 1 if ratios else float("nan")


HIT_PHASES = ("hit", "restart first", "restart later")
ROWS = {
    "cold": "cold",
    "local hit": "engine's own prefix cache",
    "hit": "full hit, engine's own cache emptied",
    "restart first": "engine restarted, first time",
    "restart later": "engine restarted, own cache emptied",
    "miss": f"miss, {MISS_TOKENS + TAIL} new tokens",
}


def summary(bench: Bench, idle: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Figures by set-up."""
    result: dict[str, dict[str, Any]] = {}
    for setup in (setup.name for setup in bench.setups):
        figures: dict[str, Any] = {"idle_cores": round(idle[setup], 3)}
        for phase in ROWS:
            if samples := bench.of(phase, setup):
                times = [s.ttft_s for s in samples]
                figures[phase] = {
                    "median_s": statistics.median(times),
                    "best_s": min(times),
                    "worst_s": max(times),
                    "n": len(times),
                    "cpu_s": statistics.median(s.cpu_s for s in samples),
                }
        if setup != "alone":
            hits = bench.of("hit", setup)
            figures["miss_overhead"] = overhead(bench, setup)
            figures["store_gb_s"] = rate(bench, setup, "store", ("cold", "miss"))
            figures["load_gb_s"] = rate(bench, setup, "load", ("hit",))
            figures["restart_load_gb_s"] = rate(bench, setup, "load", ("restart first",))
            figures["hit_tokens"] = statistics.median(s.hit_tokens for s in hits)
            figures["hit_bytes"] = statistics.median(s.moved["load_bytes"] for s in hits)
        result[setup] = figures
    return result


def show(result: dict[str, Any]) -> None:
    """The table."""
    figures = result["figures"]
    title = (
        f"{result['model']}, {result['dtype']}, {result['prompt_tokens']} tokens; seconds to the first token"
    )
    table = Table("median (best … worst; n)", *figures, title=title)

    def row(name: str, fmt: Any, key: str) -> None:
        table.add_row(name, *(fmt(f[key]) if f.get(key) is not None else "–" for f in figures.values()))

    for phase, name in ROWS.items():
        row(
            name,
            lambda f: f"{f['median_s']:.3f} ({f['best_s']:.3f} … {f['worst_s']:.3f}; {f['n']})",
            phase,
        )
    row("CPU seconds of a miss", lambda f: f"{f['cpu_s']:.2f}", "miss")
    row("CPU seconds of a full hit", lambda f: f"{f['cpu_s']:.2f}", "hit")
    row("miss against vLLM alone, same prompt", lambda f: f"{f:+.1%}", "miss_overhead")
    row("store, GB/s by its own clock", lambda f: f"{f:.2f}", "store_gb_s")
    row("retrieve, GB/s by its own clock", lambda f: f"{f:.2f}", "load_gb_s")
    row("retrieve after a restart, first time", lambda f: f"{f:.2f}", "restart_load_gb_s")
    row("tokens loaded per hit", lambda f: f"{f:.0f}", "hit_tokens")
    row("bytes copied per hit", lambda f: f"{f / 1e6:.1f} MB", "hit_bytes")
    row("cores while idle", lambda f: f"{f:.3f}", "idle_cores")
    console.print(table)
    if not result["hits_whole"]:
        console.print(
            "[red]not every hit was loaded whole: these times do not compare; see the samples[/red]"
        )
    console.print(
        f"answers equal across set-ups and phases: {'yes' if result['answers_equal'] else '[red]NO[/red]'}; "
        f"{result['disturbed']} of {len(result['samples'])} samples disturbed by other processes; "
        f"shared memory in LMCache: {'on' if result['lmcache_shared_memory'] else '[red]OFF: unfair[/red]'}"
    )


def kv_token_bytes(model: Path, dtype: str) -> int:
    """KV bytes of one token."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = 4 if dtype == "float32" else 2
    return int(config["num_hidden_layers"] * config["num_key_value_heads"] * head * 2 * width)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns the figures."""
    model, dtype = DEMO / "models" / "smollm2", fastest_dtype()
    OUT.mkdir(exist_ok=True)
    args = ["--dtype", dtype, "--max-model-len", "8192"]
    with set_ups(options.setups, args, kv_token_bytes(model, dtype)) as setups:
        for setup in setups:
            say(f"starting vLLM: {setup.name}")
            setup.start(model)
        bench = Bench(setups, options.patience)
        figures = summary(bench, measure(bench, model, options))
    texts: dict[int, set[str]] = {}
    for sample in bench.samples:
        if sample.phase != "miss":
            texts.setdefault(sample.prompt, set()).add(sample.text)
    hits = [
        sample
        for sample in bench.samples
        if sample.phase == "hit" or (sample.phase in HIT_PHASES and sample.setup in LIVES_ON)
    ]
    peer = "lmcache" in options.setups
    engine_log = (OUT / "lmcache-1.log").read_text(errors="replace") if peer else ""
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": dtype,
        "prompt_tokens": HIT_TOKENS + TAIL,
        "figures": figures,
        "answers_equal": all(len(found) == 1 for found in texts.values()),
        "hits_whole": all(sample.hit_tokens == HIT_TOKENS for sample in hits),
        "disturbed": sum(s.foreign > FOREIGN for s in bench.samples),
        "lmcache_shared_memory": "EngineDrivenContextShm" in engine_log or not peer,
        "samples": [asdict(sample) for sample in bench.samples],
    }


def main() -> int:
    """Run; exit code 1 if an answer differed, a hit was not whole, or LMCache had no shared memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures and every sample")
    parser.add_argument("--documents", type=int, default=2, help="long prompts (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="hits per document (default: %(default)s)")
    parser.add_argument(
        "--misses", type=int, default=10, help="prompts nobody has seen (default: %(default)s)"
    )
    parser.add_argument("--restarts", type=int, default=2, help="engine restarts (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for an idle machine")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=SETUPS, help="default: all")
    options = parser.parse_args()
    if "lmcache" in options.setups and not (PEER / "lmcache").exists():
        raise SystemExit("LMCache has no environment yet: run benchmarks/lmcache/setup.sh")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    if available < (need := NEED_GIB * len(options.setups) * 2**30):
        raise SystemExit(f"these need {need / 2**30:.0f} GiB; {available / 2**30:.1f} are free")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and servers end with the run
    result = run(options)
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    fair = result["answers_equal"] and result["hits_whole"] and result["lmcache_shared_memory"]
    return 0 if fair else 1


if __name__ == "__main__":
    raise SystemExit(main())
