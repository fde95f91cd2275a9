"""`kvkeep bench lookup`: what a lookup costs the engine's scheduler, from token ids to the answer.

Each round takes the prompt as a Python list of token ids, as vLLM has it, hashes it and asks a real
keeper, another process, through its socket. The lease is given back outside of the time taken. The
index holds so many chunks without any bytes behind them: slots are a page each and never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvbench.servers import own_keeper
from kvkeep.errors import ConfigError, KeeperUnavailable
from kvkeep.identity import KEY_BYTES, ChainHasher, fingerprint
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

__all__ = ["add_arguments", "run"]

_SLOT = 4096
_BATCH = 8192  # chunks per reservation while filling
_VARIANTS = 8  # held prompts of each length; rounds take turns, so that no cache is warmer than in use
_ANSWER = 60.0  # seconds
_VOCABULARY = 150_000
_KINDS = ("hit", "half", "miss")


class Case(NamedTuple):
    """One row: rounds with prompts of `tokens` ids against an index of `held_chunks`."""

    tokens: int
    held_chunks: int
    kind: str
    rounds_ms: list[float]
    hash_ms: list[float]


class Probe:
    """The bench's side of one keeper: prompts by number, and what of them is held."""

    def __init__(self, connection: Connection, chunk_tokens: int, lengths: list[int]) -> None:
        self.connection = connection
        self.chunk_tokens = chunk_tokens
        self._print = fingerprint({"bench": "lookup", "chunk_tokens": chunk_tokens})
        self.space = self._open()
        self.held = 0
        self.variants = 0
        ids = np.random.default_rng(1).integers(0, _VOCABULARY, max(lengths)).tolist()
        self._prompts = {length: ids[:length] for length in lengths}
        self._chunks = sum(length // chunk_tokens for length in lengths)

    def prompt(self, length: int, variant: int) -> list[int]:
        """Token ids whose first, and so every key, is this variant's own."""
        return [_VOCABULARY + length + variant, *self._prompts[length][1:]]

    def keys(self, tokens: list[int]) -> bytes:
        """What the engine adapter does with a prompt before it asks."""
        hasher = ChainHasher(self._print, self.chunk_tokens)
        hasher.extend(tokens)
        return hasher.keys(0, hasher.chunks)

    def fill(self, total: int) -> None:
        """Hold `total` chunks: as many variants of the prompts as fit (up to 8), then random keys."""
        fitting = min(_VARIANTS, self.variants + (total - self.held) // max(self._chunks, 1))
        if not fitting:
            raise ConfigError(f"--held must be at least {self._chunks}: the chunks of the prompts themselves")
        for variant in range(self.variants, fitting):
            for length in self._prompts:
                self._hold(self.keys(self.prompt(length, variant)))
        self.variants = fitting
        while self.held < total:
            self._hold(os.urandom(KEY_BYTES * min(_BATCH, total - self.held)))

    def _hold(self, keys: bytes) -> None:
        count = len(keys) // KEY_BYTES
        item = Reservation(keys, [b"\1" * count], 0, 2**62)
        reserved = self.connection.reserve(self.space, [item])[0]
        if (reserved.offsets[0] < 0).any():
            raise ConfigError("the keeper refused chunks: its memory is too small for this bench")
        self.connection.commit(reserved.reservation, 0)
        self.held += count

    def round(self, tokens: list[int], expected: int) -> tuple[float, float]:
        """One lookup. Returns (ms from the ids to the answer, of which ms for hashing)."""
        began = time.perf_counter()
        keys = self.keys(tokens)
        hashed = time.perf_counter()
        found = self.connection.lookup(self.space, keys)
        done = time.perf_counter()
        if found.chunks != expected:
            raise KeeperUnavailable(f"the keeper found {found.chunks} chunks where it holds {expected}")
        if found.lease:
            self.connection.release(found.lease)
        self._open()  # its answer says that the release has been dealt with
        return 1e3 * (done - began), 1e3 * (hashed - began)

    def _open(self) -> int:
        return self.connection.open_namespace(self._print, "bench lookup", [(_SLOT, None)], 1, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep bench lookup`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--chunk-tokens", type=int, default=16, help="tokens per chunk (default: 16)")
    parser.add_argument(
        "--tokens",
        type=_numbers,
        default=[20_000, 128_000],
        help="prompt lengths, with commas between (default: 20000,128000)",
    )
    parser.add_argument(
        "--held",
        type=_numbers,
        default=[10_000, 100_000, 1_000_000, 2_000_000],
        help="chunks held, with commas between (default: 10000,100000,1000000,2000000)",
    )
    parser.add_argument("--repeat", type=int, default=100, help="rounds per case (default: 100)")


def run(args: argparse.Namespace) -> int:
    """Start a keeper, fill it step by step, measure at each step; returns 0."""
    if min(args.chunk_tokens, args.repeat) < 1:
        raise ConfigError("--chunk-tokens and --repeat must be 1 or more")
    levels, cases = sorted(set(args.held)), list[Case]()
    memory = (levels[-1] + levels[-1] // 4 + 256) * _SLOT
    with own_keeper(memory) as connection, _progress() as progress:
        task = progress.add_task("", total=len(levels) * len(args.tokens) * len(_KINDS))
        probe = Probe(connection, args.chunk_tokens, args.tokens)
        for level in levels:
            progress.update(task, description=f"filling up to {level:,} chunks")
            probe.fill(level)
            for length in args.tokens:
                for kind in _KINDS:
                    progress.update(task, description=f"{kind}: {length:,} tokens, {level:,} chunks held")
                    cases.append(_measure(probe, length, kind, args.repeat))
                    progress.advance(task)
        index = _index_figures(connection.status())
    if args.json:
        print(json.dumps({"chunk_tokens": args.chunk_tokens, "cases": _as_json(cases), **index}))
    else:
        Console().print(_as_table(cases, index, args))
    return 0


def _measure(probe: Probe, length: int, kind: str, repeat: int) -> Case:
    whole = length // probe.chunk_tokens
    shared = whole // 2 * probe.chunk_tokens if kind == "half" else 0
    expected = {"hit": whole, "half": shared // probe.chunk_tokens, "miss": 0}[kind]
    rounds = []
    for number in range(-3, repeat):
        if kind == "hit":
            tokens = probe.prompt(length, number % probe.variants)
        else:
            tokens = _half(probe, length, shared, number) if shared else probe.prompt(length, 1000 + number)
        figures = probe.round(tokens, expected)
        if number >= 0:
            rounds.append(figures)
    return Case(length, probe.held, kind, [total for total, _ in rounds], [part for _, part in rounds])


def _half(probe: Probe, length: int, shared: int, number: int) -> list[int]:
    """A held prompt that goes on in its own way from `shared` tokens on."""
    tokens = probe.prompt(length, number % probe.variants)
    tokens[shared] = _VOCABULARY + 1000 + number
    return tokens


def _index_figures(figures: dict[str, Any]) -> dict[str, float]:
    """Bytes per chunk: the index's own count, and all private memory of the keeper's process."""
    status = Path(f"/proc/{figures['pid']}/status").read_text().splitlines()
    private = next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))
    chunks = max(1, figures["chunks"])
    return {
        "index_bytes_per_chunk": figures["index_bytes"] / chunks,
        "process_bytes_per_chunk": private / chunks,
    }


def _as_json(cases: list[Case]) -> list[dict[str, object]]:
    return [
        {
            "tokens": case.tokens,
            "held_chunks": case.held_chunks,
            "hit": case.kind == "hit",
            "median_ms": float(np.median(case.rounds_ms)),
            "p99_ms": float(np.percentile(case.rounds_ms, 99)),
            "hash_ms": float(np.median(case.hash_ms)),
        }
        for case in cases
        if case.kind != "half"
    ]


def _as_table(cases: list[Case], index: dict[str, float], args: argparse.Namespace) -> Table:
    caption = (
        f"{index['index_bytes_per_chunk']:.0f} bytes of index per chunk "
        f"({index['process_bytes_per_chunk']:.0f} with all else that the keeper's process keeps)"
    )
    title = f"From token ids to the keeper's answer: chunks of {args.chunk_tokens}, {args.repeat} rounds each"
    table = Table(title=title, caption=caption)
    for heading in ("tokens", "held chunks", "prompt", "median ms", "p99 ms", "of which hashing"):
        table.add_column(heading, justify="right")
    for case in cases:
        table.add_row(
            f"{case.tokens:,}",
            f"{case.held_chunks:,}",
            case.kind,
            f"{np.median(case.rounds_ms):.2f}",
            f"{np.percentile(case.rounds_ms, 99):.2f}",
            f"{np.median(case.hash_ms):.2f}",
        )
    return table


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas between") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return numbers
