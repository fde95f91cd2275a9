"""Which copy engine moves KV between a dense cache and the arena."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from kvkeep import pages
from kvkeep.errors import DeviceError, LayoutError
from kvkeep.transfer import Transfer, make_transfer
from kvkeep.transfer.base import Move, Offsets
from kvkeep.transfer.choose import make_backend
from kvkeep.transfer.cuda import CudaTransfer
from kvkeep.transfer.streams import Backend, Event, Pending
from kvkeep.wire.client import Connection

__all__ = ["Bus", "Mapped", "StagedTransfer", "as_blocks", "find_backend", "make_copier"]

log = logging.getLogger("kvkeep.transformers")

_STAGE_BYTES = 64 << 20
_STAGES = 3  # one is filled or emptied while others are copied
_ALIGN = 16  # bytes


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
        return make_backend(frozenset(devices))
    except (LayoutError, DeviceError) as error:
        log.warning("kvkeep: %s; torch copies it, to and from memory that is not pinned", error)
        return None


class Bus:
    """A device's way to one mapping of the arena: stages there, in turn. One thread at a time calls it.

    Copies are ordered against the calling thread's stream; the bytes of saves, and slots that loads read,
    are settled only when `settle` returns. Raises DeviceError.
    """

    def __init__(
        self, backend: Backend, arena: memoryview, fd: int, sizes: Sequence[int], device: torch.device
    ) -> None:
        """`fd`: the arena's, which stays the caller's. `sizes`: of slots, in bytes."""
        width = -(-max(sizes) // _ALIGN) * _ALIGN
        self.rows = max(1, _STAGE_BYTES // width)
        self._memory = torch.empty((_STAGES * self.rows, width), dtype=torch.uint8, device=device)
        self._groups = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
        layers = [[("stage", self._memory[:, :size])] for size in self._groups]
        self._transfer = CudaTransfer(layers, len(self._memory), arena, backend)
        self._transfer.prepare(fd)
        self._turn, self._left = 0, dict[int, Event]()
        self._pending: list[Pending] = []

    @property
    def pinned(self) -> float:
        """The share of the arena that is pinned."""
        return self._transfer.pinning.registered / len(self._transfer.arena)

    def save(self, offsets: Offsets, size: int, fill: Callable[[torch.Tensor], None]) -> None:
        """Have a stage filled, uint8 [slots, size], and copied to the slots."""
        with self._stage(len(offsets), size) as (rows, stage):
            fill(stage)
            self._pending.append(self._transfer.start_save([Move(self._groups[size], offsets, rows)]))

    def load(self, offsets: Offsets, size: int, drain: Callable[[torch.Tensor], None]) -> None:
        """Copy the slots to a stage, and have it emptied. Blocks where the arena is not pinned yet."""
        with self._stage(len(offsets), size) as (rows, stage):
            self._pending.append(self._transfer.start_load([Move(self._groups[size], offsets, rows)]))
            drain(stage)

    @contextlib.contextmanager
    def _stage(self, count: int, size: int) -> Iterator[tuple[Offsets, torch.Tensor]]:
        """The next one, behind those who had it before, maybe on another thread's stream."""
        turn, current = self._turn, self._transfer.backend.current()
        first = turn * self.rows
        rows = np.arange(first, first + count)
        if (left := self._left.get(turn)) is not None:
            current.wait_event(left)
        self._transfer.fence(rows)
        try:
            yield rows, self._memory[first : first + count, :size]
        finally:
            self._left[turn], self._turn = current.record_event(), (turn + 1) % _STAGES

    def settle(self) -> None:
        """Block until all copies have ended."""
        pending, self._pending = self._pending, []
        for one in pending:
            one.wait()

    def close(self) -> None:
        """Let go of the arena when all copies have ended, and of the stages when nobody reads them."""
        self._transfer.close()
        for left in self._left.values():
            left.synchronize()


class Mapped:
    """One mapping of the arena, and a model's way to it. One thread at a time calls it."""

    def __init__(
        self,
        link: Connection,
        backend: Backend | None,
        threads: int,
        sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        """`sizes`: of slots; `device`: the model's. Raises OSError: no memory to map it."""
        self._arena, self._threads = link.map_arena(), threads
        self.bus = None if backend is None else Bus(backend, self._arena, link.arena_fd, sizes, device)
        if self.bus is None:
            pages.prepare(self._arena, link.arena_fd)

    def copier(self, layers: Sequence[tuple[str, torch.Tensor]]) -> Transfer:
        """See `make_copier`."""
        return make_copier(layers, self._arena, self._threads, self.bus)

    @property
    def pinned(self) -> float:
        """The share of the arena that a device reaches directly; 1 on a CPU."""
        return 1.0 if self.bus is None else self.bus.pinned

    def settle(self) -> None:
        """Block until all copies have ended. Raises DeviceError, or torch's RuntimeError of a device that is
        broken."""
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
        step = max(1, _STAGE_BYTES // size) if self._bus is None else self._bus.rows
        for first in range(0, len(blocks), step):
            places = offsets[first : first + step]
            # Behind the device's back: nothing in here waits for it, unless blocks have gaps.
            move = partial(_move, tensors, _index(blocks[first : first + step], tensors[0].device), saving)
            if self._bus is None:
                self._by_torch(places, size, move, saving)
            elif saving:
                self._bus.save(places, size, move)
            else:
                self._bus.load(places, size, move)
        return len(blocks) * size

    def _by_torch(
        self, places: Offsets, size: int, move: Callable[[torch.Tensor], None], saving: bool
    ) -> None:
        """Both ways the bytes are there at the end: the arena is not pinned memory here."""
        stage = torch.empty((len(places), size), dtype=torch.uint8, device=self.layers[0][0].device)
        slots = [self.arena[place : place + size] for place in places.tolist()]
        if saving:
            move(stage)
        for slot, row in zip(slots, stage, strict=True):
            source, target = (row, slot) if saving else (slot, row)
            target.copy_(source)
        if not saving:
            move(stage)


def _index(blocks: Offsets, device: torch.device) -> slice | torch.Tensor:
    first, last = int(blocks[0]), int(blocks[-1])
    if np.array_equal(blocks, np.arange(first, last + 1)):
        return slice(first, last + 1)
    return torch.from_numpy(np.ascontiguousarray(blocks)).to(device)


def _move(
    tensors: Sequence[torch.Tensor], which: slice | torch.Tensor, saving: bool, stage: torch.Tensor
) -> None:
    """Between blocks of all layers and a stage, uint8 [blocks, bytes]."""
    at = 0
    for tensor in tensors:
        nbytes = tensor[0].numel() * tensor.element_size()
        part = stage[:, at : at + nbytes].view(tensor.dtype).unflatten(1, tensor.shape[1:])
        here = which if isinstance(which, slice) else which.to(tensor.device)
        if saving:
            part.copy_(tensor[here], non_blocking=True)
        else:
            tensor[here] = part.to(tensor.device, non_blocking=True)
        at += nbytes
