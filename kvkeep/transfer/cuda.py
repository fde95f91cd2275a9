"""The copy engine of GPUs: which piece goes where and when, in streams of its own.

Nothing here blocks the calling thread while the device works, but where it says so. Copies wait for the
engine's stream and the engine's stream for copies, by events. Independent of CUDA itself: that is a
`Backend`, of which tests have another one.

Slots hold a block's pieces in the order in which the device holds them, so nothing is ever transposed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.background import Busy, never
from kvkeep.errors import DeviceError
from kvkeep.layout import group_layout
from kvkeep.transfer.base import Move, Offsets, Transfer, describe_layers
from kvkeep.transfer.kernels import WORD
from kvkeep.transfer.pinning import Pinning
from kvkeep.transfer.streams import Backend, Copies, Event, Pending, merge, split

__all__ = ["CudaTransfer"]

_KERNEL_BELOW = 28 << 10
"""Bytes of a piece below which a kernel loads it; vLLM's figure for an H100. Not measured yet by us."""
_KERNEL_FROM = 16
"""Pieces of that kind that are worth a launch; vLLM's figure for an H100. Not measured yet by us."""
_ONE_BY_ONE, _AT_ONCE = 64, 4096
"""Copies from which on they are submitted on another thread, where each is a call, and where all are one. Not
measured yet."""
_STAGES = 16
"""Steps in which a load arrives, at most: what the first one takes cannot be hidden. Not measured yet."""
_STAGE_BYTES = 4 << 20
"""Bytes that a stage is worth. Not measured yet on a GPU."""


class _Reading(NamedTuple):
    blocks: Offsets
    pending: Pending


class CudaTransfer(Transfer):
    """Copies by DMA, and small pieces by a kernel.

    `save` and `load` keep the interface's promise to return when the bytes are there. An engine that
    computes meanwhile uses `start_save` and `start_load`, all from one thread, and then
    - calls `fence(blocks)` before anything overwrites blocks that it has passed to `start_save`;
    - calls `arrive(layer)` before it reads a layer of what it loads layer by layer.
    What nobody reads before it is there, `start_apart` loads.
    """

    name = "cuda"

    def __init__(
        self,
        layers: Sequence[Sequence[tuple[str, torch.Tensor]]],
        num_blocks: int,
        arena: memoryview,
        backend: Backend,
    ) -> None:
        super().__init__(layers, num_blocks, arena)
        self.backend = backend
        self.pinning = Pinning(backend, arena)
        self._numbers = _numbers(layers)
        self._owners = [self._owner_of_pieces(group, num_blocks) for group in layers]
        self._saves, self._loads = backend.stream(), backend.stream(urgent=True)
        self._submitting = threading.Lock()  # nothing is let go of between a look at it and the submission
        self._reading: list[_Reading] = []
        self._arrivals: dict[int, Event] = {}
        self._last: Event | None = None
        self._beside: ThreadPoolExecutor | None = None

    def prepare(self, fd: int, busy: Busy = never) -> None:
        """Whatever `busy` says: the engine computes on the device."""
        self.pinning.start(fd)

    def close(self) -> None:
        """Refuses copies from here on, and waits for those under way first."""
        with self._submitting:
            super().close()
        try:
            if self._beside is not None:
                self._beside.shutdown()
            self.settle()
        finally:
            self.pinning.close()

    def settle(self) -> None:
        """Block until the copies that have been submitted have ended."""
        for stream in (self._saves, self._loads):
            stream.record_event().synchronize()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Submit in here, and what is pinned stays so until that has ended. Raises DeviceError if closed."""
        with self._submitting:
            if self._closed.is_set():
                raise DeviceError("the session that this copy is of has ended")
            yield

    def start_save(self, moves: Sequence[Move], *, hold: bool = False) -> Pending:
        """Paged KV, as the engine's stream leaves it, → arena.

        `hold`: the engine's stream waits for it, where its blocks may be overwritten unannounced.
        Raises LayoutError before anything is copied, or DeviceError.
        """
        nbytes = self._check_all(moves)
        copies = self._plan(moves)
        with self._open():
            self._saves.wait_event(self.backend.current().record_event())
            began = self._saves.record_event()
            ended = self._submit(self._save, copies, self._pinned(moves))
        pending = Pending(nbytes, began, ended)
        self._reading.append(_Reading(np.concatenate([move.blocks for move in moves]), pending))
        if hold:
            self.backend.current().wait_event(pending.event)
        return pending

    def _save(self, copies: Copies, pinned: bool) -> Event:
        self.backend.copy(self._saves, copies, saving=True, pinned=pinned)
        return self._saves.record_event()

    def start_load(self, moves: Sequence[Move], order: Sequence[str] = ()) -> Pending:
        """Arena → paged KV; the engine's stream goes on when the bytes are there.

        `order`: layers that the engine will ask for by `arrive`, in its order; their bytes come while it
        computes. The others' it awaits before all. Blocks where the arena is not pinned yet. Raises
        LayoutError before anything is copied, or DeviceError: then some of it may have been.
        """
        nbytes = self._check_all(moves)
        known = list(dict.fromkeys(self._numbers[name] for name in order if name in self._numbers))
        stages = [sorted(set(self._numbers.values()) - set(known)), *_stages(known, nbytes)]
        plans = [self._plan(moves, layers) for layers in stages]
        with self._open():
            pinned = self._pinned(moves)
            # Behind the blocks' last users, and behind what `fence` has put before them.
            self._loads.wait_event(self.backend.current().record_event())
            began = ended = self._loads.record_event()
            self._arrivals = {}
            for layers, copies in zip(stages, plans, strict=True):
                self._load(copies, pinned)
                ended = self._loads.record_event()
                self._arrivals |= dict.fromkeys(layers, ended)
                self._last = ended  # where a later stage is refused too: what is under way has to end first
        if len(plans[0].sizes):
            self.backend.current().wait_event(self._arrivals[stages[0][0]])
        return Pending(nbytes, began, ended)

    def start_apart(self, moves: Sequence[Move], after: Event) -> Pending:
        """Arena → paged KV, behind `after` of the engine's stream, which does not wait: nobody may read or
        write these blocks until the bytes are there.

        Raises LayoutError before anything is copied, or DeviceError, as `Pending` may: when what had been
        begun has ended, so that the blocks can go to others.
        """
        nbytes = self._check_all(moves)
        copies = self._plan(moves)
        with self._open():
            self._loads.wait_event(after)
            began = self._loads.record_event()
            ended = self._submit(self._load_apart, copies, self._pinned(moves))
        return Pending(nbytes, began, ended)

    def _load_apart(self, copies: Copies, pinned: bool) -> Event:
        try:
            self._load(copies, pinned)
        except DeviceError:
            self._loads.record_event().synchronize()
            raise
        return self._loads.record_event()

    def _submit(
        self, submit: Callable[[Copies, bool], Event], copies: Copies, pinned: bool
    ) -> Event | Future[Event]:
        """On a thread beside the engine's what blocks its caller: a copy from or to pageable memory until the
        device has come to it, many copies until the driver's queue has room."""
        if pinned and len(copies.sizes) < (_AT_ONCE if self.backend.batches else _ONE_BY_ONE):
            return submit(copies, True)
        if self._beside is None:
            self._beside = ThreadPoolExecutor(1, "kvkeep-copies", self.backend.attend)
        return self._beside.submit(submit, copies, pinned)

    def _load(self, copies: Copies, pinned: bool) -> None:
        small = (copies.sizes < _KERNEL_BELOW) & pinned
        for column in copies:
            small &= column % WORD == 0
        if np.count_nonzero(small) < _KERNEL_FROM:
            small[:] = False
        if small.any():
            self.backend.gather(self._loads, Copies(*(column[small] for column in copies)))
        if not small.all():
            rest = Copies(*(column[~small] for column in copies))
            self.backend.copy(self._loads, rest, saving=False, pinned=pinned)

    def arrive(self, layer: str) -> None:
        """Have the engine's stream wait for this layer's bytes, if they are on their way."""
        event = self._arrivals.get(self._numbers.get(layer, -1))
        if event is not None:
            self.backend.current().wait_event(event)

    def end_forward(self) -> None:
        """The engine has submitted a forward: what follows is behind all of its load."""
        if self._last is not None:
            self.backend.current().wait_event(self._last)
            self._arrivals, self._last = {}, None

    def fence(self, blocks: Offsets) -> None:
        """Have the engine's stream wait for the saves that still read any of these blocks.

        The calling thread waits only for what is still being submitted on another.
        """
        self._reading = [reading for reading in self._reading if not reading.pending.done()]
        for reading in self._reading:
            if np.isin(blocks, reading.blocks).any():
                self.backend.current().wait_event(reading.pending.event)

    def _copy(self, group: int, offsets: Offsets, blocks: Offsets, saving: bool) -> int:
        moves = [Move(group, offsets, blocks)]
        pending = self.start_save(moves) if saving else self.start_load(moves)
        pending.wait()
        return pending.nbytes

    def _check_all(self, moves: Sequence[Move]) -> int:
        for move in moves:
            self._check(*move)
        return sum(len(move.blocks) * self.layouts[move.group].block_bytes for move in moves)

    def _plan(self, moves: Sequence[Move], layers: Sequence[int] | None = None) -> Copies:
        """Copies of all pieces, or of those that belong to some layers, by their numbers."""
        parts = []
        for move in moves:
            pieces: npt.NDArray[np.bool_] | slice = slice(None)
            if layers is not None:
                pieces = np.isin(self._owners[move.group], layers)
            parts.append(merge(Copies(*self._places(move.group, move.offsets, move.blocks, pieces))))
        together = Copies(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return split(together, self._base, self.pinning.step)

    def _owner_of_pieces(self, group: Sequence[tuple[str, torch.Tensor]], num_blocks: int) -> Offsets:
        owners, described = list[int](), describe_layers(group)
        for index, (name, _) in enumerate(group):
            pieces = len(group_layout(described[: index + 1], num_blocks).pieces)
            owners += [self._numbers[name]] * (pieces - len(owners))
        return np.array(owners)

    def _pinned(self, moves: Sequence[Move]) -> bool:
        ends = (int(m.offsets.max()) + self.layouts[m.group].block_bytes for m in moves if len(m.offsets))
        return max(ends, default=0) <= self.pinning.registered


def _numbers(layers: Sequence[Sequence[tuple[str, torch.Tensor]]]) -> dict[str, int]:
    """Of each layer; one for those that keep their KV in one tensor, which `group_layout` moves once."""
    found: dict[str, int] = {}
    for group in layers:
        first: dict[object, int] = {}
        for name, tensor in group:
            found[name] = first.setdefault((tensor.data_ptr(), tensor.shape), len(found))
    return found


def _stages(order: Sequence[int], nbytes: int) -> list[list[int]]:
    count = max(1, min(len(order), _STAGES, nbytes // _STAGE_BYTES))
    return [layers.tolist() for layers in np.array_split(np.array(order, np.int64), count) if len(layers)]
