"""Request traces in the format of Mooncake's public ones: JSON lines, one request each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

__all__ = ["BLOCK_TOKENS", "FORMAT", "TraceError", "TraceRequest", "read_requests"]

BLOCK_TOKENS = 512
"""Tokens of a prompt that one id stands for; the last id of a prompt may stand for fewer."""

FORMAT = "JSON lines with timestamp, input_length, output_length and hash_ids (a list of integers from 0)"

_Length = Annotated[int, msgspec.Meta(ge=0)]


class TraceError(Exception):
    """The trace cannot be used; the message names the line and says what to do about it."""


class TraceRequest(msgspec.Struct, frozen=True):
    """One request: `timestamp` in ms, lengths in tokens; equal ids mean equal text up to that block's end."""

    timestamp: float
    input_length: _Length
    output_length: _Length
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]


def read_requests(path: Path) -> list[TraceRequest]:
    """Read a trace, in the file's order. TraceError if it is missing or malformed."""
    decoder = msgspec.json.Decoder(TraceRequest)
    try:
        with path.open("rb") as lines:
            return [
                _request(decoder, line, f"{path}, line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except OSError as error:
        raise TraceError(
            f"cannot read the trace {path}: {error.strerror}. Give the path of a file of {FORMAT}."
        ) from error


def _request(decoder: msgspec.json.Decoder[TraceRequest], line: bytes, where: str) -> TraceRequest:
    try:
        request = decoder.decode(line)
    except msgspec.DecodeError as error:
        raise TraceError(
            f"{where}: {error}. Correct the line or give another file; expected: {FORMAT}."
        ) from error
    if len(set(request.hash_ids)) != len(request.hash_ids):
        raise TraceError(
            f"{where}: hash_ids names a block twice. Correct it: an id stands for all text up to its block."
        )
    return request
