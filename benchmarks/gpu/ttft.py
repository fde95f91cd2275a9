"""Time to first token in transformers, random weights: recompute against load from the arena, and from disk.

    python benchmarks/gpu/ttft.py [--tokens 2048 8192 32768] [--device cuda] [--disk FOLDER] [--tiny]

`measure` is what the GPU check calls. The shape is Llama-3.1-8B's; weights do not matter to time. A first
token is a forward over what is not held, to the argmax on the host; a load includes lookup and copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from kvkeep.engines.transformers import KVKeepCache
from kvkeep.errors import KeeperUnavailable
from kvkeep.wire.client import Connection

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}


@contextlib.contextmanager
def keeper(memory: str, *options: str) -> Iterator[str]:
    """Run `kvkeep serve`; yields its socket. At the end it writes to its tiers what they lack."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as folder:
        socket = f"{folder}/keeper.sock"
        command = [
            sys.executable,
            "-m",
            "kvkeep.cli",
            "serve",
            "--socket",
            socket,
            "--memory",
            memory,
            *options,
        ]
        process = subprocess.Popen(command)
        try:
            for _ in range(400):
                with contextlib.suppress(KeeperUnavailable):
                    Connection.open(socket, "probe").close()
                    break
                time.sleep(0.05)
            yield socket
        finally:
            process.terminate()
            process.wait(120)


def make_model(shape: dict[str, int], device: str, dtype: torch.dtype) -> Any:
    """A Llama of this shape with random weights, made on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(default)


def first_token(model: Any, ids: torch.Tensor, cache: KVKeepCache | None) -> tuple[float, int, int]:
    """Seconds to the first token, the token, and how many columns were loaded."""
    began = time.perf_counter()
    past = cache.begin(ids) if cache else transformers.DynamicCache(config=model.config)
    loaded = past.get_seq_length()
    with torch.no_grad():
        logits = model(ids[:, loaded:], past_key_values=past, logits_to_keep=1).logits
    token = int(logits[0, -1].argmax())
    return time.perf_counter() - began, token, loaded


def loads(model: Any, ids: torch.Tensor, cache: KVKeepCache, expected: int, rounds: int) -> list[float]:
    """Seconds of `rounds` loads. Raises where one is no hit or its token is another."""
    times = []
    for _ in range(rounds):
        seconds, token, loaded = first_token(model, ids, cache)
        if loaded < ids.shape[1] - 1 - cache.chunk_tokens or token != expected:
            raise RuntimeError(
                f"loaded {loaded} of {ids.shape[1]} tokens; token {token}, expected {expected}"
            )
        times.append(seconds)
    return times


def measure(
    shape: dict[str, int],
    counts: Sequence[int],
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    memory: str = "16GiB",
    disk: Path | None = None,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """One row per token count: medians in seconds of recompute, load and (with `disk`) load from disk by a
    keeper that was restarted, and the ratios of recompute to each."""
    model = make_model(shape, device, dtype)
    first_token(model, torch.ones((1, 64), dtype=torch.long, device=device), None)  # warms up
    generator = torch.Generator().manual_seed(0)
    options = ["--tier", f"fs://{disk}?capacity={memory}"] if disk else []
    rows = []
    for count in counts:
        ids = torch.randint(3, shape["vocab_size"], (1, count), generator=generator).to(device)
        cold = [first_token(model, ids, None) for _ in range(rounds)]
        token, row = cold[0][1], {"tokens": count, "recompute_s": statistics.median(one[0] for one in cold)}
        for place in ("load_s", "disk_s") if disk else ("load_s",):
            with keeper(memory, *options) as socket, KVKeepCache.for_model(model, socket=socket) as cache:
                if place == "load_s":
                    first_token(model, ids, cache)
                    row["loaded_bytes"] = cache.stats.loaded_bytes
                    cache.save()
                # Of the first load from a disk only: then it is in memory.
                times = loads(model, ids, cache, token, rounds if place == "load_s" else 1)
                row[place] = statistics.median(times)
                row["loaded_bytes"] = cache.stats.loaded_bytes // len(times)
            row[place.replace("_s", "_ratio")] = row["recompute_s"] / row[place]
        rows.append(row)
    return rows


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", default="16GiB")
    parser.add_argument("--disk", type=Path, help="a folder for a tier on disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try it out")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    rows = measure(
        TINY if args.tiny else LLAMA_8B,
        args.tokens,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        memory=args.memory,
        disk=args.disk.resolve() if args.disk else None,
        rounds=args.rounds,
    )
    text = json.dumps({"device": args.device, "dtype": args.dtype, "rows": rows}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
