"""Which engine holds which block, on which medium: a table per medium from blocks to engines, as bits.

An engine that is cleared gets another bit, at once, however much it held; its blocks are taken off the old
one afterwards, a few at a time, and a bit is given out again when nothing is left under it.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from kvroute.chain import pieces

__all__ = ["LEVELS", "Holders", "Reach"]

LEVELS = 3  # of media: GPU, CPU, storage

Reach = npt.NDArray[np.int64]
"""Tokens, by level and engine's slot."""

_Bits = npt.NDArray[np.uint64]


class Holders:
    """`names`: whose each slot is, or was. A block's holders are bytes, the bit of slot 0 first; those that
    were written while there were fewer slots are shorter."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._tables: tuple[dict[int, bytes], ...] = tuple({} for _ in range(LEVELS))
        self._width = 0  # bytes, a multiple of 8
        self._alone: list[bytes] = []  # for each slot, that it is the only one
        self._live = 0
        self._free: list[int] = []
        self._last = (b"", 0, b"")
        self._room = np.empty(0, np.uint64)
        self._paired: Sequence[Sequence[int]] = ()
        self._nodes: _Nodes | None = None

    def seat(self, name: str) -> int:
        """A slot under which nothing is."""
        slot = self._free.pop() if self._free else len(self.names)
        self._width = max(self._width, slot // 64 * 8 + 8)
        self.names[slot : slot + 1] = [name]
        self._alone[slot : slot + 1] = [(1 << slot).to_bytes(self._width, "little")]
        self._live |= 1 << slot
        self._nodes = None
        return slot

    def retire(self, slot: int) -> None:
        """What is under it does not count any more."""
        self._live ^= 1 << slot

    def free(self, slot: int) -> None:
        """Nothing is under it any more."""
        self._free.append(slot)

    def pair(self, nodes: Sequence[Sequence[int]]) -> None:
        """Slots that can read what others of their node have on CPU or in storage; each is in one node."""
        self._paired, self._nodes = nodes, None

    def hold(self, level: int, key: int, slot: int) -> None:
        """One more holds the block."""
        table = self._tables[level]
        before = table.get(key)
        if before is None:
            table[key] = self._alone[slot]
        elif not _has(before, slot):
            table[key] = self._flipped(before, slot)

    def drop(self, level: int, key: int, slot: int) -> None:
        """One fewer does, if it did."""
        table = self._tables[level]
        before = table.get(key)
        if before is self._alone[slot]:
            del table[key]
        elif before is not None and _has(before, slot):
            if left := self._flipped(before, slot):
                table[key] = left
            else:
                del table[key]

    def drop_all(self, key: int, slot: int) -> None:
        """On all media."""
        for level in range(LEVELS):
            self.drop(level, key, slot)

    def media(self, key: int, slot: int) -> int:
        """Levels on which one holds the block, as bits."""
        found = 0
        for level, table in enumerate(self._tables):
            if (mask := table.get(key)) is not None and _has(mask, slot):
                found |= 1 << level
        return found

    def walk(self, data: bytes, size: int, root: int, first: bytes) -> Reach:
        """Follow one chain: how many tokens each engine holds on each level, faster ones counted in."""
        levels = [level for level, table in enumerate(self._tables) if table]
        reach = np.zeros((1 + len(levels), 8 * self._width), np.int64)
        left, tokens = np.frombuffer(self._live.to_bytes(self._width, "little"), np.uint64), 0
        for keys in pieces(data, size, root, first):
            states = self._states(levels, keys, left)
            number, row, slot = _gone(states)
            reach[1 + number, slot] = tokens + row * size
            left = states[:, -1].copy()
            tokens += len(keys) * size
            if not left.any():
                break
        if tokens:
            reach[1:][np.unpackbits(left.view(np.uint8), axis=-1, bitorder="little").view(np.bool_)] = tokens
        return reach[[bisect(levels, level) for level in range(LEVELS)]]  # an empty level adds nothing

    def _states(self, levels: list[int], keys: list[int], left: _Bits) -> _Bits:
        """By level, who of `left` is left before each block, and after the last; where all blocks have the
        same holders, they count as one."""
        none = bytes(self._width)
        found = [list(map(self._tables[level].get, keys, repeat(none))) for level in levels]
        rows = 1 if all(masks.count(masks[0]) == len(masks) for masks in found) else len(keys)
        shape = len(levels), 1 + rows, self._width // 8
        if self._room.size < math.prod(shape):  # kept: the kernel takes its time to give so much
            self._room = np.empty(shape, np.uint64)
        states = self._room.reshape(-1)[: math.prod(shape)].reshape(shape)
        states[:, 0] = left
        for number, level in enumerate(levels):
            masks = states[number, 1:]
            masks[:] = self._matrix(found[number][:rows])
            if level and self._paired:
                self._nodes = self._nodes or _Nodes(self._paired, self._width)
                self._nodes.spread(masks)
            if number:
                masks |= states[number - 1, 1:]
        return np.bitwise_and.accumulate(states, axis=1, out=states)

    def _matrix(self, masks: list[bytes]) -> _Bits:
        joined = b"".join(masks)
        if len(joined) < len(masks) * self._width:
            joined = b"".join([mask.ljust(self._width, b"\0") for mask in masks])
        return np.frombuffer(joined, np.uint64).reshape(len(masks), -1)

    def _flipped(self, mask: bytes, slot: int) -> bytes:
        """Blocks that follow each other mostly have the same holders: they share one object. Nobody: b""."""
        before, last_slot, last = self._last
        if mask is not before or slot != last_slot:
            bits = int.from_bytes(mask, "little") ^ 1 << slot
            last = bits.to_bytes(self._width, "little") if bits else b""
            self._last = (mask, slot, last)
        return last


class _Nodes:
    """Spreads what one of a node has to all of it, all nodes at once."""

    def __init__(self, nodes: Sequence[Sequence[int]], width: int) -> None:
        nodes = sorted(nodes, key=len, reverse=True)
        self._nth = [np.array([node[n] for node in nodes if len(node) > n]) for n in range(len(nodes[0]))]
        whose = np.full(8 * width, len(nodes))
        for number, node in enumerate(nodes):
            whose[list(node)] = number
        self._whose, self._count = whose.reshape(-1, 8).T, len(nodes)

    def spread(self, masks: _Bits) -> None:
        """In place, a row for each block."""
        columns = np.ascontiguousarray(masks.view(np.uint8).T)
        hit = np.zeros((self._count + 1, len(masks)), np.uint8)  # the last: of no node
        for slots in self._nth:
            hit[: len(slots)] |= columns[slots >> 3] & (1 << (slots & 7)).astype(np.uint8)[:, None]
        hit = np.negative((hit != 0).view(np.uint8))  # all bits
        for bit, nodes in enumerate(self._whose):
            columns |= hit[nodes] & np.uint8(1 << bit)
        masks.view(np.uint8)[:] = columns.T


def _has(mask: bytes, slot: int) -> bool:
    return slot >> 3 < len(mask) and bool(mask[slot >> 3] & 1 << (slot & 7))


def _gone(states: _Bits) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Who drops out: level, block and slot of each."""
    differ = states[:, 1:] != states[:, :-1]
    number, row, word = np.unravel_index(differ.reshape(-1).nonzero()[0], differ.shape)
    words = states[number, row, word] ^ states[number, row + 1, word]
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_).nonzero()[0]
    which = bits >> 6
    return number[which], row[which], 64 * word[which] + (bits & 63)
