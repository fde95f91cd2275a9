"""Our names of blocks: each a hash of the block's tokens, seeded with the name of the block before it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvkeep.identity import encode_extra

__all__ = ["Tokens", "chain", "encoded", "packed", "pieces"]

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]

_PIECE = 128  # blocks hashed first: a prompt that nobody holds costs no more
_MOST = 2048


def pieces(data: bytes, size: int, key: int, first: bytes) -> Iterator[list[int]]:
    """Keys of a prompt's whole blocks, some at a time. `first`: what its first block is keyed by as well."""
    step, at, count = 4 * size, 0, _PIECE
    whole = len(data) // step
    while at < whole:
        count = min(count, whole - at)
        blocks = np.frombuffer(data, f"V{step}", count, at * step).tolist()
        if at == 0:
            blocks[0] += first
        yield [key := xxh3_64_intdigest(block, key) for block in blocks]
        at, count = at + count, min(4 * count, _MOST)


def chain(key: int, tokens: Sequence[int], size: int, extras: Sequence[bytes]) -> list[int]:
    """Keys of whole blocks of `size` tokens that follow the block `key`."""
    data, step, keys = packed(tokens), 4 * size, []
    for number, at in enumerate(range(0, len(data), step)):
        block = data[at : at + step]
        key = xxh3_64_intdigest(block + extras[number] if extras else block, key)
        keys.append(key)
    return keys


def packed(tokens: Tokens) -> bytes:
    """Ids as 4 bytes each. Raises OverflowError or TypeError on what is none, in a list."""
    return tokens.astype("u4").tobytes() if isinstance(tokens, np.ndarray) else array("I", tokens).tobytes()


def encoded(extra: Sequence[Any] | None, lora: str | None = None) -> bytes:
    """What a block is keyed by beside its tokens; an engine puts its LoRA first, which the root has.

    Raises TypeError on what has no canonical encoding.
    """
    rest = list(extra or ())
    if lora is not None and rest[:1] == [lora]:
        del rest[0]
    return encode_extra(rest) if rest else b""
