"""Places in the keeper's host memory: slabs of slots of one size.

Bookkeeping only; the memory itself belongs to the server. The arena is cut into equal slabs, a
slab is given to one size class at a time and cut into its slots, so several models and KV-cache
groups share an arena without fragmenting it.
"""

from __future__ import annotations

import numpy as np

from kvkeep.errors import ConfigError
from kvkeep.keeper.index import Records

__all__ = ["ALIGNMENT", "MIN_SLABS", "Arena", "SlotClass"]

ALIGNMENT = 4096
"""Slots start at multiples of a page: O_DIRECT and DMA need it, and streaming stores like it."""

_SLAB_BYTES = 64 << 20
MIN_SLABS = 16


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class SlotClass:
    """Slots of one size: the slabs it owns and those of their slots that are free."""

    def __init__(self, slot_bytes: int, slab_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots_per_slab = slab_bytes // slot_bytes
        self.slabs: set[int] = set()
        self.free: list[int] = []

    @property
    def slots(self) -> int:
        """Slots in all, free ones included."""
        return len(self.slabs) * self.slots_per_slab


class Arena:
    """Hands out byte offsets into `nbytes` of memory. One owner, no locks."""

    def __init__(self, nbytes: int) -> None:
        slab = min(_SLAB_BYTES, nbytes // MIN_SLABS // ALIGNMENT * ALIGNMENT)
        if slab < ALIGNMENT:
            raise ConfigError(f"memory of {nbytes} bytes is too small: give at least {MIN_SLABS * ALIGNMENT}")
        self.slab_bytes = slab
        self.nbytes = nbytes // slab * slab
        self.free_slabs = list(range(self.nbytes // slab - 1, -1, -1))
        self.classes: dict[int, SlotClass] = {}

    def size_class(self, nbytes: int) -> SlotClass:
        """The class for slots of `nbytes`. Raises ConfigError where none can fit a slab."""
        slot = _round_up(nbytes, ALIGNMENT)
        if slot > self.slab_bytes:
            raise ConfigError(
                f"a chunk of {nbytes / 2**20:.1f} MiB does not fit an arena of {self.nbytes / 2**20:.0f} MiB "
                f"(slabs of {self.slab_bytes / 2**20:.1f} MiB): give the keeper --memory of at least "
                f"{MIN_SLABS * slot / 2**20:.0f} MiB, or choose a smaller chunk size"
            )
        return self.classes.setdefault(slot, SlotClass(slot, self.slab_bytes))

    def allocate(self, kind: SlotClass, count: int) -> Records:
        """Up to `count` free slots of a class, as byte offsets; takes free slabs as needed."""
        while len(kind.free) < count and self.free_slabs:
            self._give(kind, self.free_slabs.pop())
        taken = kind.free[max(0, len(kind.free) - count) :]
        del kind.free[len(kind.free) - len(taken) :]
        return np.array(taken[::-1], np.int64)

    def available(self, kind: SlotClass) -> int:
        """Slots that `allocate` could give now."""
        return len(kind.free) + len(self.free_slabs) * kind.slots_per_slab

    def release(self, kind: SlotClass, offsets: Records) -> None:
        """Give slots back; their class keeps them."""
        kind.free.extend(offsets.tolist())

    def move_slab(self, slab: int, source: SlotClass, target: SlotClass) -> None:
        """Give a slab, all of whose slots are free, to another class."""
        start, stop = slab * self.slab_bytes, (slab + 1) * self.slab_bytes
        kept = [offset for offset in source.free if not start <= offset < stop]
        if len(source.free) - len(kept) != source.slots_per_slab:
            raise AssertionError("moving a slab that is in use")
        source.free = kept
        source.slabs.remove(slab)
        self._give(target, slab)

    def _give(self, kind: SlotClass, slab: int) -> None:
        start = slab * self.slab_bytes
        kind.slabs.add(slab)
        kind.free += [start + i * kind.slot_bytes for i in range(kind.slots_per_slab - 1, -1, -1)]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slab and slot is owned once."""
        owned = [slab for kind in self.classes.values() for slab in kind.slabs] + self.free_slabs
        assert sorted(owned) == list(range(self.nbytes // self.slab_bytes))
        for kind in self.classes.values():
            assert len(set(kind.free)) == len(kind.free) <= kind.slots
            assert {offset // self.slab_bytes for offset in kind.free} <= kind.slabs
