"""Traces of requests: reading them, and what is in one.

A trace is JSON lines with `timestamp`, `input_length`, `output_length` and `hash_ids`, one id per block
of the prompt; equal ids mean equal text up to the end of that block (the format of Mooncake's public
traces). Files that `kvkeep serve --record` writes have more: see docs/sizing.md.
"""

from collections.abc import Callable
from itertools import chain as joined
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from kvkeep.errors import ConfigError
from kvkeep.keeper.policy.base import Ids

__all__ = ["FORMAT", "Trace", "TraceError", "TraceRequest", "read_requests", "read_trace"]

FORMAT = "JSON lines with timestamp, input_length, output_length and hash_ids (a list of integers from 0)"
_MOONCAKE_TOKENS = 512


class TraceError(ConfigError):
    """The trace cannot be replayed; the message says what to do about it."""


class Trace(NamedTuple):
    """Requests as chains of blocks, numbered densely from 0 to `unique` - 1."""

    chains: list[Ids]
    """Per request, the blocks of its prompt and of its answer, as far as the trace knows that one."""
    unique: int
    asked: list[int]
    """Per request, how many leading blocks of its chain it looks up; what follows is only saved."""
    local: list[int]
    """Per request, how many leading blocks the engine had itself."""
    lengths: list[int]
    """Per request, tokens of its prompt: the last of its blocks may hold fewer than a block's."""
    block_tokens: int = _MOONCAKE_TOKENS
    block_bytes: int | None = None
    """Of one block's KV; None: the trace does not say."""

    @classmethod
    def of(cls, chains: list[Ids], unique: int) -> "Trace":
        """A trace of whole prompts, in blocks of 512 tokens."""
        lengths = [len(chain) for chain in chains]
        tokens = [_MOONCAKE_TOKENS * blocks for blocks in lengths]
        return cls(chains, unique, lengths, [0] * len(chains), tokens)

    @property
    def blocks(self) -> int:
        """All blocks looked up, repeated ones included."""
        return sum(self.asked) - sum(self.local)


_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class TraceRequest(msgspec.Struct, frozen=True):
    """One request: `timestamp` in ms, lengths in tokens."""

    timestamp: float
    input_length: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    hash_ids: list[_Id]
    output_ids: list[_Id] = []
    local: Annotated[int, msgspec.Meta(ge=0)] = 0
    block_tokens: _Count = _MOONCAKE_TOKENS
    block_bytes: _Count | None = None


def read_trace(path: Path, line_read: Callable[[int], object] = lambda nbytes: None) -> Trace:
    """Read a trace as chains of blocks. TraceError if it is missing, malformed or has no blocks."""
    requests = read_requests(path, line_read)
    if not any(request.hash_ids for request in requests):
        raise TraceError(f"the trace {path} is empty: no request in it has a block. Give a file of {FORMAT}.")
    return _dense(requests)


def read_requests(path: Path, line_read: Callable[[int], object] = lambda nbytes: None) -> list[TraceRequest]:
    """Read a trace's requests, in the order of their times. TraceError if it is missing or malformed.

    `line_read` is told the length of each line, for those who show progress.
    """
    decoder = msgspec.json.Decoder(TraceRequest)
    requests = list[TraceRequest]()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    request = _parse(decoder, line, f"{path}, line {number}")
                    _check_blocks(requests[:1], request, f"{path}, line {number}")
                    requests.append(request)
                line_read(len(line))
    except OSError as error:
        raise TraceError(
            f"cannot read the trace {path}: {error.strerror}. Give the path of a file of {FORMAT}."
        ) from error
    return sorted(requests, key=lambda request: request.timestamp)


def _dense(requests: list[TraceRequest]) -> Trace:
    chains = [request.hash_ids + request.output_ids for request in requests]
    blocks = np.fromiter(joined.from_iterable(chains), np.int64)
    unique, dense = np.unique(blocks, return_inverse=True)
    ends = np.cumsum([len(chain) for chain in chains])[:-1]
    return Trace(
        np.split(dense, ends),
        len(unique),
        [len(request.hash_ids) for request in requests],
        [request.local for request in requests],
        [request.input_length for request in requests],
        requests[0].block_tokens,
        requests[0].block_bytes,
    )


def _parse(decoder: "msgspec.json.Decoder[TraceRequest]", line: bytes, where: str) -> TraceRequest:
    try:
        request = decoder.decode(line)
    except msgspec.DecodeError as error:
        raise TraceError(
            f"{where}: {error}. Correct the line or give another file; expected: {FORMAT}."
        ) from error
    if len({*request.hash_ids, *request.output_ids}) != len(request.hash_ids) + len(request.output_ids):
        raise TraceError(
            f"{where}: hash_ids names a block twice. Correct it: an id stands for all text up to its block."
        )
    if request.local > len(request.hash_ids):
        raise TraceError(
            f"{where}: local is {request.local}, of {len(request.hash_ids)} blocks. Correct the line."
        )
    return request


def _check_blocks(first: list[TraceRequest], request: TraceRequest, where: str) -> None:
    if first and (first[0].block_tokens, first[0].block_bytes) != (request.block_tokens, request.block_bytes):
        raise TraceError(
            f"{where}: blocks of another size than those before: more than one model. Give each model's "
            "lines as a file of its own (they differ in block_tokens, block_bytes or namespace)."
        )
