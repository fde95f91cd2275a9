"""Which engine holds which block, on which medium: a table per medium from blocks to engines, as bits.

An engine that is cleared gets another bit, at once, however much it held; its blocks are taken off the old
one afterwards, a few at a time, and a bit is given out again when nothing is left under it.
"""

from __future__ import annotations

from itertools import accumulate, islice
from operator import and_, or_, xor

from kvroute.chain import pieces

__all__ = ["LEVELS", "Holders", "Reach", "longest"]

LEVELS = 3  # of media: GPU, CPU, storage

Reach = tuple[list[int], list[int], list[int]]
"""Per level, by an engine's slot, tokens."""

_FEW = 32


class Holders:
    """`names`: whose each bit is, or was; `together`: who can read what others have on CPU or in storage."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.together: list[int] = []
        self._tables: tuple[dict[int, int], ...] = tuple({} for _ in range(LEVELS))
        self._live = 0
        self._free: list[int] = []
        self._last = (0, 0, 0)

    def seat(self, name: str) -> int:
        """A bit that nothing is under."""
        slot = self._free.pop() if self._free else len(self.names)
        self.names[slot : slot + 1] = [name]
        self._live |= 1 << slot
        return 1 << slot

    def retire(self, bit: int) -> None:
        """What is under it does not count any more."""
        self._live ^= bit

    def free(self, bit: int) -> None:
        """Nothing is under it any more."""
        self._free.append(bit.bit_length() - 1)

    def hold(self, level: int, key: int, bit: int) -> None:
        """One more holds the block."""
        table = self._tables[level]
        before = table.get(key, 0)
        if not before & bit:
            table[key] = self._flipped(before, bit)

    def drop(self, level: int, key: int, bit: int) -> None:
        """One fewer does, if it did."""
        table = self._tables[level]
        before = table.get(key, 0)
        if before == bit:
            del table[key]
        elif before & bit:
            table[key] = self._flipped(before, bit)

    def drop_all(self, key: int, bit: int) -> None:
        """On all media."""
        for level in range(LEVELS):
            self.drop(level, key, bit)

    def has(self, level: int, key: int, bit: int) -> bool:
        """Whether one holds the block."""
        return bool(self._tables[level].get(key, 0) & bit)

    def walk(self, data: bytes, size: int, root: int, first: bytes) -> Reach:
        """Follow one chain: how many tokens each engine holds on each level, faster ones counted in."""
        levels = [level for level, table in enumerate(self._tables) if table]
        reach = {level: [0] * len(self.names) for level in levels}
        alive, tokens = dict.fromkeys(levels, 0), 0
        spread: dict[int, int] = {}
        for keys in pieces(data, size, root, first):
            masks: list[int] = []
            for level in levels:
                found = list(map(self._tables[level].get, keys))
                if level and self.together:
                    found = [mask and (spread.get(mask) or self._spread(spread, mask)) for mask in found]
                masks = _joined(masks, found)
                left = alive[level] if tokens else masks[0] & self._live
                alive[level] = _descend(left, masks, tokens, size, reach[level])
            tokens += len(keys) * size
            if not any(alive.values()):
                break
        for level, left in alive.items():
            _note(left, tokens, reach[level])
        gpu = reach.get(0) or [0] * len(self.names)
        cpu = reach.get(1, gpu)  # a level that is empty adds nothing to those before
        return gpu, cpu, reach.get(2, cpu)

    def _spread(self, known: dict[int, int], mask: int) -> int:
        known[mask] = wide = mask
        for bits in self.together:
            if mask & bits:
                known[mask] = wide = wide | bits
        return wide

    def _flipped(self, mask: int, bit: int) -> int:
        """Blocks that follow each other mostly have the same holders: they share one integer."""
        before, last_bit, last = self._last
        if mask is not before or bit != last_bit:
            last = mask ^ bit
            self._last = (mask, bit, last)
        return last


def _joined(faster: list[int], found: list[int | None]) -> list[int]:
    """Who holds each block on this medium or on a faster one."""
    masks = [mask or 0 for mask in found]
    if not faster:
        return masks
    if _same(faster) and _same(masks):
        return [faster[0] | masks[0]] * len(masks)
    return list(map(or_, faster, masks))


def _descend(alive: int, masks: list[int], start: int, size: int, reach: list[int]) -> int:
    """Who of `alive` holds all these blocks; the others are noted with where they stopped."""
    left = list(accumulate(masks[:1] if _same(masks) else masks, and_, initial=alive))
    for number, gone in enumerate(map(xor, left, islice(left, 1, None))):
        if gone:
            _note(gone, start + number * size, reach)
    return left[-1]


def _same(masks: list[int]) -> bool:
    """Whether all are one: blocks that follow each other mostly have the same holders."""
    return masks.count(masks[0]) == len(masks)


def longest(one: Reach, other: Reach) -> Reach:
    """By blocks of either size."""
    gpu, cpu, storage = (list(map(max, a, b)) for a, b in zip(one, other, strict=True))
    return gpu, cpu, storage


def _note(engines: int, tokens: int, reach: list[int]) -> None:
    if engines.bit_count() > _FEW:
        for slot, bit in enumerate(bin(engines)[:1:-1]):
            if bit == "1":
                reach[slot] = tokens
        return
    while engines:
        slot = engines.bit_length() - 1
        reach[slot] = tokens
        engines ^= 1 << slot
