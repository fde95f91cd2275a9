"""Which copy engine moves KV between a dense cache and the arena."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from kvkeep import pages
from kvkeep.errors import DeviceError, LayoutError
from kvkeep.transfer import Transfer, make_transfer
from kvkeep.transfer.base import Offsets
from kvkeep.transfer.choose import make_backend
from kvkeep.transfer.pinning import Pinning
from kvkeep.transfer.streams import Backend, Copies, Event, merge, split

__all__ = ["Bus", "Mapped", "StagedTransfer", "as_blocks", "find_backend", "make_copier"]

log = logging.getLogger("kvkeep.transformers")

_STAGE_BYTES = 64 << 20
_STAGES = 2  # that a device copies, at most, while the next one is filled


def as_blocks(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """[heads, columns, size] as [whole blocks, 1, heads, tokens, size], a view."""
    count = states.shape[1] // tokens
    blocks: torch.Tensor = states[:, : count * tokens].unflatten(1, (count, tokens))
    return blocks.transpose(0, 1)[:, None]


def find_backend(devices: set[torch.device]) -> Backend | None:
    """The copies of the one NVIDIA GPU that holds a model; None where it is none, or something lacks."""
    if len(devices) > 1 or not torch.version.cuda or {one.type for one in devices} != {"cuda"}:
        return None
    try:
        return make_backend(next(iter(devices)))
    except (LayoutError, DeviceError) as error:
        log.warning("kvkeep: %s; torch copies it, to and from memory that is not pinned", error)
        return None


class Bus:
    """A device's way to one mapping of the arena, on a stream of its own. One thread at a time calls it.

    Copies are ordered against the calling thread's stream; the bytes of saves, and slots that loads read,
    are settled only when `settle` returns.
    """

    def __init__(self, backend: Backend, arena: memoryview, fd: int) -> None:
        """`fd`: the arena's, which stays the caller's."""
        self._backend, self._arena, self._base = backend, arena, pages.address(arena)
        self._stream = backend.stream(urgent=True)
        self._stages: deque[tuple[Event, torch.Tensor]] = deque()
        self._pinning = Pinning(backend, self._base, len(arena))
        self._pinning.start(fd)

    def copy(self, offsets: Offsets, stage: torch.Tensor, saving: bool) -> None:
        """Between slots and a stage, uint8 [slots, bytes] on the device. Keeps the stage until its copy has
        ended. Blocks where the arena is not pinned yet, and while earlier stages are copied. Raises
        DeviceError."""
        count, size = stage.shape
        rows = Copies(
            stage.data_ptr() + np.arange(count) * size, self._base + offsets, np.full(count, size, np.int64)
        )
        pinned = int(offsets.max()) + size <= self._pinning.registered
        # Behind what fills the stage, or what its memory was used for before.
        self._stream.wait_event(self._backend.current().record_event())
        try:
            copies = split(merge(rows), self._base, self._pinning.step)
            self._backend.copy(self._stream, copies, saving=saving, pinned=pinned)
        finally:
            ended = self._stream.record_event()
            self._stages.append((ended, stage))
        if not saving:
            self._backend.current().wait_event(ended)
        while len(self._stages) > _STAGES:
            self._stages[0][0].synchronize()
            self._stages.popleft()

    def settle(self) -> None:
        """Block until all copies have ended."""
        while self._stages:
            self._stages[0][0].synchronize()
            self._stages.popleft()

    def close(self) -> None:
        """Settle, and let go of the arena."""
        try:
            self.settle()
        finally:
            self._pinning.close()


class Mapped:
    """One mapping of the arena, and a model's way to it. One thread at a time calls it."""

    def __init__(self, arena: memoryview, fd: int, backend: Backend | None, threads: int) -> None:
        """`fd`: the arena's, which stays the caller's."""
        self._arena, self._threads = arena, threads
        self.bus = None if backend is None else Bus(backend, arena, fd)
        if self.bus is None:
            pages.prepare(arena, fd)

    def copier(self, layers: Sequence[tuple[str, torch.Tensor]]) -> Transfer:
        """See `make_copier`."""
        return make_copier(layers, self._arena, self._threads, self.bus)

    def settle(self) -> None:
        """Block until all copies have ended. Raises RuntimeError, torch's, where the device is broken."""
        if self.bus is not None:
            self.bus.settle()

    def close(self) -> None:
        """Settle, and let go of the arena."""
        try:
            if self.bus is not None:
                self.bus.close()
        except RuntimeError as error:  # of a device that is broken: it copies no more
            log.warning("kvkeep: a copy on the device failed: %s", error)


def make_copier(
    layers: Sequence[tuple[str, torch.Tensor]], arena: memoryview, threads: int, bus: Bus | None = None
) -> Transfer:
    """The copy engine for one row of one group; blocks are the tensors' first dimension.

    On a CPU it is that of all engines. Elsewhere slots go over `bus`, or without one by plain torch.
    """
    groups, count = [layers], len(layers[0][1])
    if bus is None and all(tensor.device.type == "cpu" for _, tensor in layers):
        return make_transfer(groups, count, arena, threads)
    return StagedTransfer(groups, count, arena, bus)


class StagedTransfer(Transfer):
    """Whole slots over the bus, and between layers and a staging tensor on the device itself.

    With a `Bus` the bytes are there, or slots were read, when it has settled.
    """

    name = "staged"

    def __init__(
        self,
        layers: Sequence[Sequence[tuple[str, torch.Tensor]]],
        num_blocks: int,
        arena: memoryview,
        bus: Bus | None = None,
    ) -> None:
        super().__init__(layers, num_blocks, arena)
        self._bus = bus

    def _copy(self, group: int, offsets: Offsets, blocks: Offsets, saving: bool) -> int:
        size, tensors = self.layouts[group].block_bytes, self.layers[group]
        device = tensors[0].device
        step = max(1, _STAGE_BYTES // size)
        for first in range(0, len(blocks), step):
            places = offsets[first : first + step]
            which = torch.from_numpy(np.ascontiguousarray(blocks[first : first + step]))
            stage = torch.empty((len(places), size), dtype=torch.uint8, device=device)
            if not saving:
                self._slots(places, stage, saving)
            at = 0
            for tensor in tensors:
                nbytes = tensor[0].numel() * tensor.element_size()
                part = stage[:, at : at + nbytes].view(tensor.dtype).unflatten(1, tensor.shape[1:])
                if saving:
                    part.copy_(tensor[which.to(tensor.device)])
                else:
                    tensor.index_copy_(0, which.to(tensor.device), part.to(tensor.device))
                at += nbytes
            if saving:
                self._slots(places, stage, saving)
        return len(blocks) * size

    def _slots(self, places: Offsets, stage: torch.Tensor, saving: bool) -> None:
        if self._bus is not None:
            self._bus.copy(places, stage, saving)
            return
        # Both ways the bytes are there at the end: the arena is not pinned memory here.
        for place, row in zip(places.tolist(), stage, strict=True):
            slot = self.arena[place : place + stage.shape[1]]
            source, target = (row, slot) if saving else (slot, row)
            target.copy_(source)
