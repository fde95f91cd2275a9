"""The kernel for many small pieces: the device's own cores read pinned host memory.

A copy engine takes a few microseconds per piece, whatever its size; below some tens of KiB that is more
than the bytes take. vLLM found the same (`v1/kv_offload/cpu/swap_blocks_triton.py`: under 28 KiB, 16
pieces or more, on an H100).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["PROGRAMS", "WORD", "copy_words"]

WORD = 8
"""Bytes that addresses and sizes are multiples of."""
PROGRAMS = 16
"""Programs that share the pieces: enough reads in flight to fill the bus, and cores left to the model.
Not measured yet on a GPU."""
_WORDS, _WARPS = 1024, 4  # of a program: 8 KiB in each of its steps; not measured yet on a GPU


@triton.jit(do_not_specialize=["count"])  # else it is compiled again for multiples of 16
def _copy_words(table, count, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    # table: int64 [3, count]: addresses to write, addresses to read, bytes
    lane = tl.arange(0, WORDS)
    piece = tl.program_id(0)
    while piece < count:
        target = tl.load(table + piece).to(tl.pointer_type(tl.int64))
        source = tl.load(table + count + piece).to(tl.pointer_type(tl.int64))
        words = tl.load(table + 2 * count + piece) // 8
        for start in range(0, words, WORDS):
            at = start + lane
            inside = at < words
            tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)
        piece += tl.num_programs(0)


def copy_words(table: torch.Tensor) -> None:
    """Copy pieces on the current stream. `table`: int64 [3, n] on the device: targets, sources, bytes."""
    count = table.shape[1]
    _copy_words[(min(PROGRAMS, count),)](table, count, WORDS=_WORDS, num_warps=_WARPS)
