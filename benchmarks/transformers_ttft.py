"""What a hit and a miss cost in transformers on a real model, in turns within one run.

    python benchmarks/transformers_ttft.py [--model smollm2] [--tokens 7000] [--dtype float32] [--json FILE]

Time to first token is begin() and generate() of one token. Cold is a prompt that was never seen, with the
cache (`miss`) and without (`alone`), in turns; a hit is the same prompt again. Answers are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from kvkeep.engines.transformers import KVKeepCache

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))


def generate(model: Any, ids: torch.Tensor, past: Any, count: int) -> Any:
    """Greedy, with logits."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def timed(model: Any, ids: torch.Tensor, cache: KVKeepCache | None) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens were loaded; the save comes behind."""
    began = time.perf_counter()
    past = cache.begin(ids) if cache else None
    loaded = past.loaded if past else 0
    generate(model, ids, past, 1)
    seconds = time.perf_counter() - began
    if cache:
        cache.save()
    return seconds, loaded


def compare(model: Any, ids: torch.Tensor, cache: KVKeepCache, count: int) -> dict[str, Any]:
    """The same answer with a hit and without."""
    with cache.begin(ids) as past:
        ours = generate(model, ids, past, count)
    theirs = generate(model, ids, None, count)
    apart = [float((a - b).abs().max()) for a, b in zip(ours.logits, theirs.logits, strict=True)]
    return {"answers_equal": ours.sequences.equal(theirs.sequences), "logits_apart": max(apart)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Alone, miss, hits; then both answers."""
    from document import documents

    folder = ROOT / "demo" / "models" / args.model
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = documents(tokenizer, 2 * args.misses, args.tokens, args.tokens + 500)
    prompts = [torch.tensor([tokenizer.encode(text)[: args.tokens]]) for text in texts]
    timed(model, prompts[0][:, :300], None)  # warms up
    alone, misses, hits = [], [], []
    with KVKeepCache.for_model(model, memory="2GiB") as cache:
        for first, second in zip(prompts[::2], prompts[1::2], strict=True):
            alone.append(timed(model, first, None)[0])
            misses.append(timed(model, second, cache)[0])
        for _ in range(args.rounds):
            seconds, loaded = timed(model, prompts[1], cache)
            hits.append(seconds)
        stats = cache.stats
        gb_per_second = [
            stats.loaded_bytes / max(stats.load_seconds, 1e-9) / 1e9,
            stats.saved_bytes / max(stats.save_seconds, 1e-9) / 1e9,
        ]
        result = compare(model, prompts[1], cache, args.answer)
    middle = statistics.median
    return {
        "model": args.model,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "loaded": loaded,
        "alone_s": alone,
        "miss_s": misses,
        "hit_s": hits,
        "alone_over_hit": middle(alone) / middle(hits),
        "load_save_gb_per_s": gb_per_second,
        **result,
    }


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--misses", type=int, default=1, help="prompts that are computed, with and without")
    parser.add_argument("--rounds", type=int, default=7, help="hits")
    parser.add_argument("--answer", type=int, default=8, help="tokens to compare")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
