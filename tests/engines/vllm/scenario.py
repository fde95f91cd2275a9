"""One engine's life, told by a script: the same prompts with and without kvkeep. Run as a program.

Writes, for each named phase, the greedy tokens of every request and how many prompt tokens came
from a cache. The test beside it compares runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def token_stream(length: int, seed: int, vocabulary: int = 4000) -> list[int]:
    """Deterministic token ids, different for every seed from the first token on."""
    state, out = seed * 2654435761 % 2**32, []
    for _ in range(length):
        state = (state * 1664525 + 1013904223) % 2**32
        out.append(100 + state // 7 % vocabulary)
    return out


class Life:
    """An engine and what it answered so far."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine = LLM(enforce_eager=True, dtype="float32", disable_log_stats=False, **options)
        self.phases: dict[str, Any] = {}

    def ask(
        self,
        name: str,
        prompts: list[list[int]],
        tokens: int = 8,
        reset: bool = False,
        salt: str | None = None,
    ) -> list[list[int]]:
        """One batch: all prompts at once. With `reset`, the engine's own prefix cache is emptied first."""
        from vllm import SamplingParams

        if reset:
            assert self.engine.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        extra = {} if salt is None else {"cache_salt": salt}
        outputs = self.engine.generate(
            [{"prompt_token_ids": ids, **extra} for ids in prompts], sampling, use_tqdm=False
        )
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        self.phases[name] = {
            "tokens": answers,
            "cached": [output.num_cached_tokens for output in outputs],
            "prompt": [len(ids) for ids in prompts],
        }
        return answers

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of the engine."""
        return {found.name: found.value for found in self.engine.get_metrics() if hasattr(found, "value")}

    def attach(self) -> None:
        """Wait until the engine is in a session: it joins one in its steps."""
        for _ in range(300):
            if self.metrics().get("vllm:kvkeep_attached") == 1:
                return
            self.ask("attaching", [token_stream(9, 999)], tokens=1)
            time.sleep(0.1)
        raise TimeoutError("the engine has not attached to a keeper")


def mixed(life: Life) -> None:
    """Hits and misses of every kind: 60 requests."""
    base = [token_stream(length, seed) for seed, length in enumerate((40, 97, 129, 200, 310, 420, 1150))]
    life.ask("miss", base)
    life.ask("full hit", base, reset=True)
    life.ask("local hit", base)
    shared = [
        base[5][:cut] + token_stream(37 + cut % 50, 50 + cut) for cut in (31, 32, 64, 100, 161, 256, 319, 419)
    ]
    life.ask("shared prefixes", shared, reset=True)
    life.ask("shared prefixes again", shared, reset=True)
    for index, prompt in enumerate(shared):
        life.ask(f"one by one {index}", [prompt], reset=True)
    # Longer than Gemma's sliding window of 512: only the last window of those groups is needed.
    long = [base[6][:cut] + token_stream(45, 150 + cut) for cut in (600, 1024)]
    life.ask("beyond the window", long, reset=True)
    life.ask("beyond the window again", long, reset=True)
    # Half of the prefix in the engine's own cache, the rest in kvkeep.
    life.ask("local part", [base[5][:150]], reset=True)
    life.ask("local and external", [base[5]])
    first = life.ask("first round", [base[3], base[4]], tokens=70, reset=True)
    second = [base[3 + i] + first[i] + token_stream(20, 80 + i) for i in range(2)]
    life.ask("second round", second, tokens=12, reset=True)
    fresh = [token_stream(90 + 23 * i, 200 + i) for i in range(4)]
    batch = [base[2], fresh[0], shared[3], fresh[1], base[5], fresh[2], second[0], fresh[3]]
    life.ask("concurrent", batch, tokens=24, reset=True)
    life.ask("concurrent again", batch, tokens=24, reset=True)


def crowded(life: Life) -> None:
    """More requests than the engine's KV cache holds: they are preempted and resumed."""
    prompts = [token_stream(130 + 9 * i, 300 + i) for i in range(6)]
    life.ask("preempted", prompts, tokens=80)
    life.ask("preempted again", prompts, tokens=80, reset=True)


def broken(life: Life) -> None:
    """The first load and the third fail (faulty.py), each in a step that completes further chunks."""
    whole = token_stream(800, 400)
    # Both load the same chunks; in one step the second one takes them from the engine's own cache.
    prompts = [whole, whole[:320] + token_stream(170, 401)]
    life.ask("cold", prompts, tokens=24, salt="cold")
    life.ask("head", [whole[:330]], tokens=4)
    life.ask("first load", prompts, tokens=24, reset=True)
    life.attach()
    life.ask("second load", prompts, tokens=24, reset=True)
    life.ask("third load", prompts, tokens=24, reset=True)
    life.ask("off", prompts, tokens=24, reset=True)


def drafts(life: Life) -> None:
    """Texts that repeat themselves, so that n-grams of them are proposed, and often rejected."""
    prompts = [token_stream(37, 500 + i) * 3 + token_stream(11, 510 + i) for i in range(4)]
    first = life.ask("first", prompts, tokens=150)
    life.ask("again", prompts, tokens=150, reset=True)
    whole = [prompt + answer for prompt, answer in zip(prompts, first, strict=True)]
    life.ask("second round", [ids + token_stream(20, 520) for ids in whole], tokens=20, reset=True)
    life.phases["prompts"] = prompts
    life.ask("all in prompts", whole, tokens=1, reset=True, salt="prefilled")


def twice(life: Life) -> None:
    """A miss, and what could be a hit."""
    for name in ("first", "again"):
        life.ask(name, [token_stream(200, 600)], reset=True)


STORIES = {story.__name__: story for story in (mixed, crowded, broken, drafts, twice)}


def main() -> None:
    """Run the phases and write the answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--options", type=json.loads, required=True, help="arguments of vllm.LLM")
    parser.add_argument("--connector", type=json.loads, default=None, help="options of kvkeep; absent: off")
    parser.add_argument("--module", default="kvkeep.engines.vllm", help="where the connector comes from")
    parser.add_argument("--in-process", action="store_true", help="engine and worker in this one")
    parser.add_argument("--story", choices=STORIES, default="mixed")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    options = args.options
    if args.in_process:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        options["distributed_executor_backend"] = "uni"
    if args.connector is not None:
        options["kv_transfer_config"] = {
            "kv_connector": "KVKeepConnector",
            "kv_connector_module_path": args.module,
            "kv_role": "kv_both",
            "kv_connector_extra_config": args.connector,
        }
    life = Life(options)
    STORIES[args.story](life)
    life.phases["metrics"] = life.metrics()
    args.out.write_text(json.dumps(life.phases))


if __name__ == "__main__":
    main()
