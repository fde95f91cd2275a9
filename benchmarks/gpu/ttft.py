"""Time to first token in transformers, random weights: recompute against load from the arena, and from disk.

    python benchmarks/gpu/ttft.py [--tokens 2048 8192 32768] [--device cuda] [--disk FOLDER] [--tiny]

`gpu_rows` is what the GPU check calls. The shape is Llama-3.1-8B's; weights do not matter to time. A first
token is a forward over what is not held, to the argmax on the host; a load includes lookup and copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
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
_LEAST_SECONDS = 60.0  # to make the model, start a keeper and measure a first count; not measured yet


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


def load(model: Any, ids: torch.Tensor, cache: KVKeepCache, expected: int) -> tuple[float, bool]:
    """Seconds of a load, and whether its token is the expected one: it is computed in another shape, whose
    rounding may decide between tokens of random weights. Raises RuntimeError where it is no hit."""
    seconds, token, loaded = first_token(model, ids, cache)
    if loaded < ids.shape[1] - 1 - cache.chunk_tokens:
        raise RuntimeError(f"loaded {loaded} of {ids.shape[1]} tokens")
    return seconds, token == expected


def kv_bytes(shape: dict[str, int], tokens: int, dtype: torch.dtype) -> int:
    """Of one prompt."""
    layer = 2 * shape["num_key_value_heads"] * shape["head_dim"] * dtype.itemsize
    return tokens * shape["num_hidden_layers"] * layer


def room(device: str) -> float:
    """Bytes that the device has left; what torch only keeps for later counts."""
    if not device.startswith("cuda"):
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def await_pinned(cache: KVKeepCache, deadline: float) -> float:
    """Wait until the device reaches all of the arena, at most a minute: the share that it does. Before that
    copies go through pageable memory, which is not what is to be measured."""
    deadline = min(deadline, time.monotonic() + 60)
    while (share := cache.pinned) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    return round(share, 3)


def from_memory(
    model: Any, cache: KVKeepCache, prompts: Sequence[torch.Tensor], rounds: int, deadline: float
) -> Iterator[tuple[dict[str, Any], int]]:
    """Per prompt a row of recompute against load, and the first token. Ends before one for which there is
    no time, taking computing as quadratic, or no memory."""
    shape, dtype = model.config.to_dict(), model.dtype
    per_square = 0.0
    for ids in prompts:
        count = ids.shape[1]
        needed = 3 * kv_bytes(shape, count, dtype) + 4 * count * shape["intermediate_size"] * dtype.itemsize
        expected = (3 * rounds + 1) * per_square * count**2
        if time.monotonic() + expected > deadline or needed > room(str(ids.device)):
            return
        cold = [first_token(model, ids, None) for _ in range(rounds)]
        token, recompute = cold[0][1], statistics.median(one[0] for one in cold)
        per_square = recompute / count**2
        first_token(model, ids, cache)
        cache.save()
        before, pinned = cache.stats.loaded_bytes, await_pinned(cache, deadline)
        loads = [load(model, ids, cache, token) for _ in range(rounds)]
        seconds = statistics.median(one[0] for one in loads)
        row = {
            "tokens": count,
            "recompute_s": recompute,
            "load_s": seconds,
            "load_ratio": recompute / seconds,
            "loaded_bytes": (cache.stats.loaded_bytes - before) // rounds,
            "pinned": pinned,
            "same_token": all(same for _, same in loads),
        }
        yield row, token


def from_disk(
    model: Any,
    cache: KVKeepCache,
    found: Sequence[tuple[dict[str, Any], int]],
    prompts: Sequence[torch.Tensor],
) -> Iterator[dict[str, Any]]:
    """Per prompt a row of the load from a restarted keeper's tier: once, as then it is in memory."""
    pinned = await_pinned(cache, math.inf)
    for (row, token), ids in zip(found, prompts, strict=False):
        seconds, same = load(model, ids, cache, token)
        ratio = row["recompute_s"] / seconds
        told = {"disk_s": seconds, "disk_ratio": ratio, "pinned": pinned, "same_token": same}
        yield {"tokens": row["tokens"], **told}


def measure(
    shape: dict[str, int],
    counts: Sequence[int],
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    memory: str = "16GiB",
    disk: Path | None = None,
    rounds: int = 3,
    deadline: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Rows as they are made. One per token count: medians in seconds of recompute and load, and their ratio;
    then, with `disk`, one of the load from there. Counts for which the device's memory or the time until
    `deadline` (monotonic) does not suffice have no row."""
    model = make_model(shape, device, dtype)
    first_token(model, torch.ones((1, 64), dtype=torch.long, device=device), None)  # warms up
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, shape["vocab_size"], (1, count), generator=generator).to(device) for count in counts
    ]
    options = ["--tier", f"fs://{disk}?capacity={memory}"] if disk else []
    found = []
    with keeper(memory, *options) as socket, KVKeepCache.for_model(model, socket=socket) as cache:
        for row, token in from_memory(model, cache, prompts, rounds, deadline):
            found.append((row, token))
            yield row
    if disk and time.monotonic() < deadline:
        waits = {"load_wait": 60.0, "probe_wait": 1.0}  # it is to be measured, however slow it is
        with (
            keeper(memory, *options) as socket,
            KVKeepCache.for_model(model, socket=socket, **waits) as cache,
        ):
            yield from from_disk(model, cache, found, prompts)


def gpu_rows(device: torch.device, seconds: float, dry: bool) -> Iterator[dict[str, Any]]:
    """What `scripts/gpu_check.py` asks for: rows with `what`, within so many seconds; `dry`: tiny."""
    shape, dtype = (TINY, torch.float32) if dry else (LLAMA_8B, torch.bfloat16)
    counts = (500, 800) if dry else (2048, 8192, 32768)
    weights = 0 if dry else 17 << 30
    began, where = time.monotonic(), str(device)
    left = {str(count) for count in counts}
    held = 3 * kv_bytes(shape, sum(counts), dtype) // 2
    if room(where) > weights and (dry or seconds > _LEAST_SECONDS):
        with tempfile.TemporaryDirectory(prefix="kvkeep-") as folder:
            measured = measure(
                shape,
                counts,
                device=where,
                dtype=dtype,
                memory=f"{max(64, held >> 20)}MiB",
                disk=Path(folder) if shutil.disk_usage(folder).free > 2 * held else None,
                rounds=1 if dry else 3,
                deadline=began + seconds,
            )
            try:
                for row in measured:
                    left.discard(str(row["tokens"]))
                    kind = ", from disk" if "disk_s" in row else ""
                    yield {"what": f"time to first token, {row['tokens']} tokens{kind}", **row}
            except torch.OutOfMemoryError as error:
                yield {"what": "time to first token", "failed": str(error)}
    if left:
        yield {"what": "time to first token", "left_out": ", ".join(sorted(left, key=int))}


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
    rows = []
    for row in measure(
        TINY if args.tiny else LLAMA_8B,
        args.tokens,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        memory=args.memory,
        disk=args.disk.resolve() if args.disk else None,
        rounds=args.rounds,
    ):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    text = json.dumps({"device": args.device, "dtype": args.dtype, "rows": rows}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
