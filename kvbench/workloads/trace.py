"""Replay of a request trace: its times, its lengths, and which prompts begin alike."""

from __future__ import annotations

from kvbench.trace import FORMAT, TraceRequest, read_requests
from kvbench.workloads.base import Given, Request, Scale, Workload
from kvbench.workloads.prose import Passage
from kvkeep.errors import ConfigError

__all__ = ["TRACE"]

_LEAST_BLOCK = 16


def _build(given: Given) -> list[Request]:
    assert given.data is not None
    traced = read_requests(given.data)
    if not traced:
        raise ConfigError(f"the trace {given.data} is empty; expected: {FORMAT}")
    began = traced[0].timestamp
    return [
        Request(
            user,
            0,
            "",
            (),
            _blocks(given.scale, one),
            given.scale.tokens(max(1, one.output_length), 1),
            (one.timestamp - began) / 1000,
        )
        for user, one in enumerate(traced)
    ]


def _blocks(scale: Scale, request: TraceRequest) -> tuple[str | Passage, ...]:
    """One passage for each id, a space between; the last is as much shorter as the prompt ends early."""
    block = scale.tokens(request.block_tokens, _LEAST_BLOCK)
    parts: list[str | Passage] = []
    for number, block_id in enumerate(request.hash_ids):
        left = request.input_length - number * request.block_tokens
        size = block if left >= request.block_tokens else max(1, round(block * left / request.block_tokens))
        parts += [Passage(f"block {block_id}", size), " "]
    return tuple(parts[:-1]) or (Passage("empty", _LEAST_BLOCK),)


TRACE = Workload(
    "trace",
    "a trace with its own times and answer lengths: text for each block id, 512 tokens if it says no other",
    0.0,
    _build,
    data=f"the trace: {FORMAT}",
    needs_data=True,
)
