"""Worker side of the connector, one per rank: copies blocks between paged KV and the arena."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.forward_context import get_forward_context

from kvkeep.config import EngineConfig
from kvkeep.engines.link import connect
from kvkeep.engines.vllm.describe import describe_backends, describe_scales, describe_tensors
from kvkeep.engines.vllm.device import Device, by_blocks, replays_whole_graphs
from kvkeep.engines.vllm.joined import Apart, Joined, Joining
from kvkeep.engines.vllm.metadata import NOWHERE, Copies, Handshake, Rank, Session, StepMeta, WorkerMeta
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.errors import DeviceError, KeeperUnavailable, LayoutError
from kvkeep.layout import group_layout
from kvkeep.transfer import Transfer, make_transfer
from kvkeep.transfer.base import Move, describe_layers
from kvkeep.transfer.choose import make_backend
from kvkeep.transfer.pipeline import load_beside
from kvkeep.transfer.reference import ReferenceTransfer
from kvkeep.transfer.streams import Pending
from kvkeep.wire.client import Connection

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvkeep.transfer.cuda import CudaTransfer

__all__ = ["WorkerSide"]

log = logging.getLogger("kvkeep.vllm")

_PREFILL_TOKENS = 64  # a step of fewer says little about prefill
_REST = 0.1  # seconds without a step after which the engine is taken to rest


class WorkerSide:
    """State of one rank. Hooks come from one thread; joining a later session has its own."""

    def __init__(self, vllm_config: VllmConfig, kv_config: KVCacheConfig, config: EngineConfig) -> None:
        self.config = config
        self.stats = KVKeepStats()
        self._kv_config = kv_config
        self._engine_id: str = vllm_config.kv_transfer_config.engine_id
        self._compilation = vllm_config.compilation_config
        self._modules: dict[str, object] = self._compilation.static_forward_context
        self._layers: list[list[tuple[str, torch.Tensor]]] = []
        self._rank: Rank = (0, 0)
        self._handshake: Handshake | None = None
        self._joined: Joined | None = None
        self._joining = Joining(self._join)
        self._session: Session | None = None
        self._failed_blocks: set[int] = set()
        self._off = False
        self._began = 0.0
        self._rests_since = 0.0
        self._loading = 0.0
        self._device: Device | None = None
        self._source: Joined | None = None  # of the step's load
        self.apart = Apart()
        """Loads of whole requests, beside the steps."""

    # Start

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine's KV tensors, by layer. Describes them, and joins the first session.

        A layout that we do not know is told in the handshake: the scheduler side warns, once for all.
        """
        try:
            self._handshake = self._begin(kv_caches)
        except LayoutError as error:
            self._handshake = Handshake(NOWHERE, [], [], str(error))
            self.leave()

    def _begin(self, kv_caches: dict[str, torch.Tensor]) -> Handshake:
        groups = self._kv_config.kv_cache_groups
        blocks = self._kv_config.num_blocks
        self._layers = [
            [(name, by_blocks(kv_caches[name], blocks)) for name in group.layer_names] for group in groups
        ]
        self._rank = (get_pp_group().rank_in_group, get_tp_group().rank_in_group)
        described = [describe_layers(layers) for layers in self._layers]
        layouts = [group_layout(layers, self._kv_config.num_blocks) for layers in described]
        text = [
            describe_tensors(plain, [tensor.dtype for _, tensor in layers], layers[0][1].device.type)
            + describe_scales([name for name, _ in layers], self._modules)
            + describe_backends([name for name, _ in layers], self._modules, layers[0][1].device.type)
            for plain, layers in zip(described, self._layers, strict=True)
        ]
        backend = make_backend(frozenset(tensor.device for layers in self._layers for _, tensor in layers))
        if backend is not None:
            self._device, self.apart = Device(backend), Apart(backend.attend)
        try:
            self._joined = self._join("", 0)
        except (KeeperUnavailable, OSError) as error:
            log.warning("kvkeep: %s; the engine runs without it and goes on looking", error)
        whole = self._device is not None and replays_whole_graphs(self._compilation)
        sizes = [layout.block_bytes for layout in layouts]
        return Handshake(self._joined.place if self._joined else NOWHERE, text, sizes, whole_graphs=whole)

    def handshake(self) -> Handshake | None:
        """What `register` found. Asked for once the engine has captured its graphs."""
        if self._joined is not None:
            self._joined.prepare(self._at_work)
        return self._handshake

    def _join(self, keeper: str, epoch: int) -> Joined:
        """`keeper`: its identity, or none: whichever. Raises KVKeepError, or OSError: no memory to map it."""
        connection = connect(self.config, self._engine_id, epoch, arena=True)
        here = connection.keeper
        if keeper not in ("", here):
            connection.close()
            raise KeeperUnavailable(f"keeper {here[:8]} is here, not {keeper[:8]}: is this another host?")
        try:
            arena, threads = connection.map_arena(), self.config.copy_threads
            transfer = make_transfer(self._layers, self._kv_config.num_blocks, arena, threads)
        except BaseException:
            connection.close()
            raise
        return Joined(epoch, connection, transfer)

    # One step

    def begin_step(self) -> None:
        """The engine is about to run a step."""
        self._rests_since = math.inf
        self._began, self._loading = time.perf_counter(), self.stats.data.get("load_seconds", 0.0)
        if self._device is not None:
            self._device.collect(self.stats)
            self._device.begin_step(self._on_device)

    def end_forward(self, meta: StepMeta) -> bool:
        """The step's forward is done: count how fast it was, where it was prefill enough to tell.

        On a GPU it is submitted only. Returns False where it read KV that may not have been there.
        """
        if self._device is not None:
            tells = meta.loads is None and meta.scheduled_tokens >= _PREFILL_TOKENS
            return self._device.end_forward(self._on_device, meta.scheduled_tokens if tells else 0)
        if meta.scheduled_tokens < _PREFILL_TOKENS:
            return True
        loading = self.stats.data.get("load_seconds", 0.0) - self._loading
        self.stats.add("computed_tokens", meta.scheduled_tokens)
        self.stats.add("compute_seconds", max(0.0, time.perf_counter() - self._began - loading))
        return True

    def end_step(self, meta: StepMeta | None) -> None:
        """The engine has run a step."""
        self._rests_since = time.monotonic()
        if meta is not None and meta.leave and not self._off:
            self.leave()

    def _at_work(self) -> bool:
        """Whether the engine runs steps, also to a thread that is none of its own."""
        return time.monotonic() - self._rests_since < _REST

    @property
    def _on_device(self) -> CudaTransfer | None:
        return self._joined.device if self._joined is not None else None

    def fence(self, meta: StepMeta) -> None:
        """Before the step: saves that still read blocks which it writes go first, on the device."""
        joined = self._joined
        if meta.reused is None or joined is None or joined.device is None or joined.leaving:
            return
        try:
            joined.device.fence(meta.reused)
        except DeviceError:
            self.stop()  # nothing that is still being saved is to be taken for good
            raise

    def arrive(self, layer: str) -> None:
        """A forward has come to this layer."""
        if self._device is not None:
            self._device.arrive(self._on_device, layer, get_forward_context)

    def load(self, meta: StepMeta, context: ForwardContext) -> bool:
        """Arena → paged KV, for everything this step's forward reads. Returns True when it is there, or,
        on a GPU, is certain to be before it is read."""
        self._source = None
        self._follow(meta)
        if meta.loads is None:
            return True
        joined = self._source = self._entered(meta)
        release = partial(joined.tell, self._rank, Connection.release, meta.loads.claims, self._reader)
        if joined.device is not None and self._device is not None:
            pending = self._device.load(joined.device, self._moves(meta.loads), context)
            nbytes = pending.nbytes
            self._device.after(pending, "load_seconds", release, joined.close)
        else:
            began = time.perf_counter()
            nbytes = self._copy(joined.transfer, meta.loads, saving=False)
            self.stats.add("load_seconds", time.perf_counter() - began)
            release()
        self.stats.add("loaded_bytes", nbytes)
        self._count(meta.loads, "loaded_tokens")
        return True

    def load_apart(self, meta: StepMeta, name: str, copies: Copies) -> bool:
        """Begin to load for a request that waits for it, beside this step and later ones. False, or an error,
        where that cannot be: nothing of it is under way then."""
        joined, moves = self._entered(meta), self._moves(copies)
        copy: Callable[[], float] = partial(load_beside, joined.transfer, moves)
        if joined.device is not None and self._device is not None:
            copy = self._device.load_apart(joined.device, moves).wait
        self.apart.begin(name, joined, copies, copy, self._rank, self._reader)
        return True

    def settle(self, name: str) -> bool:
        """Count a load that `apart` says has ended. True where its bytes are there; raises what was wrong."""
        if (done := self.apart.settle(name)) is None:
            return False
        seconds, copies = done
        assert self._handshake is not None
        for group, rows in copies.blocks.items():
            self.stats.add("loaded_bytes", sum(map(len, rows)) * self._handshake.block_bytes[group])
        self.stats.add("load_seconds", seconds)
        self._count(copies, "loaded_tokens")
        return True

    def refuse(self, meta: StepMeta, name: str) -> None:
        """A load for which a request waits cannot be begun. This rank leaves the session, with which its
        lease ends; other requests' loads go on to their end."""
        self.apart.refuse(name)
        if self._joined is not None and self._joined.epoch == meta.epoch:
            self.stop()

    def load_again(self, meta: StepMeta) -> None:
        """Second try after a failed load, by the reference engine; raises if that fails too, or the bytes are
        not leased to this rank any more."""
        assert meta.loads is not None
        joined = self._source or self._entered(meta)
        if joined.device is not None:
            joined.device.settle()  # what was begun is not to come after this, nor to read slots of others
        arena: Any = joined.transfer.arena.numpy()
        slow = ReferenceTransfer(self._layers, self._kv_config.num_blocks, arena)
        self._copy(slow, meta.loads, saving=False)
        joined.tell(self._rank, Connection.release, meta.loads.claims, self._reader)

    def save(self, meta: StepMeta) -> None:
        """Paged KV → arena, for the chunks that this step completed. On a GPU it is there when the keeper
        hears of it, from another thread."""
        joined = self._joined
        if meta.saves is None or joined is None or joined.epoch != meta.epoch or joined.closed:
            return
        assert self._session is not None
        part = self._session.part[self._rank]
        if not (copies := meta.saves.given(joined.reserved(self._rank, meta.saves))).claims:
            return
        commit = partial(joined.tell, self._rank, Connection.commit, copies.claims, part)
        if self._rank in self._session.replicas:
            if joined.device is None or self._device is None:
                commit()
            else:  # behind what the step loaded, of which it is not known yet that it came
                now = joined.device.backend.current().record_event()
                self._device.after(Pending(0, now, now), "save_seconds", commit, joined.close)
            return
        if joined.device is not None and self._device is not None:
            # Where the engine zeroes blocks, Model Runner V2 does so before it tells us of the step.
            hold = self._kv_config.needs_kv_cache_zeroing
            try:
                pending = joined.device.start_save(self._moves(copies), hold=hold)
            except DeviceError:
                self.stop()  # what was reserved ends with the session, when what was begun has ended
                raise
            nbytes = pending.nbytes
            self._device.after(pending, "save_seconds", commit, joined.close)
        else:
            began = time.perf_counter()
            nbytes = self._copy(joined.transfer, copies, saving=True)
            self.stats.add("save_seconds", time.perf_counter() - began)
            commit()
        self.stats.add("saved_bytes", nbytes)
        self._count(copies, "saved_tokens")

    def fail_load(self, meta: StepMeta) -> None:
        """Hand the blocks of a failed load back to the engine for recompute."""
        assert meta.loads is not None
        self.fail_blocks([int(block) for rows in meta.loads.blocks.values() for row in rows for block in row])

    def fail_blocks(self, blocks: list[int]) -> None:
        """Report blocks whose load failed.

        This rank leaves the session: the leases end with it, and so do the reservations for what this
        step computes from those blocks, which must not be saved.
        """
        if blocks:
            self._failed_blocks.update(blocks)
            self.stats.add("load_failures", 1)
            self.stop()

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self, meta: StepMeta | None) -> WorkerMeta | None:
        """Tell the scheduler which session this rank is in, while it waits for that or has to know."""
        lost = self._off or (self._joined is not None and self._joined.closed)
        if not lost and (meta is None or meta.session is None):
            return None
        return WorkerMeta({self._rank: NOWHERE if lost or self._joined is None else self._joined.place})

    def leave(self, wait: float = 0.0) -> None:
        """Take part in no session any more; the scheduler side hears of it with the next report. `wait`: see
        `Joined.close`."""
        self._off = True
        self._joining.stop()
        self.stop(wait)

    def stop(self, wait: float = 0.0) -> None:
        """Leave the session, if there is one: to end, or to begin a new one. `wait`: see `Joined.close`."""
        if self._joined is not None:
            self._joined.close(wait)

    # Below

    def _entered(self, meta: StepMeta) -> Joined:
        """The session that the step is of. Raises KeeperUnavailable where its leases are none of ours."""
        joined = self._joined
        if joined is None or joined.epoch != meta.epoch or joined.left:
            raise KeeperUnavailable(
                f"rank {self._rank} is not in session {meta.epoch}, in which it is to load"
            )
        return joined

    @property
    def _reader(self) -> int:
        return self._readers().index(self._rank)

    def _readers(self) -> list[Rank]:
        assert self._session is not None
        return sorted(self._session.part_offset)

    def _copy(self, transfer: Transfer, copies: Copies, saving: bool) -> int:
        move = transfer.save if saving else transfer.load
        return sum(move(*one) for one in self._moves(copies))

    def _moves(self, copies: Copies) -> list[Move]:
        assert self._session is not None
        assert self._handshake is not None
        moves = []
        for group in copies.blocks:
            size = self._handshake.block_bytes[group]
            slots, index = np.concatenate(copies.offsets[group]), np.concatenate(copies.index[group])
            offsets = slots + self._session.part_offset[self._rank][group] + index * size
            moves.append(Move(group, offsets, np.concatenate(copies.blocks[group])))
        return moves

    def _count(self, copies: Copies, name: str) -> None:
        if self._session is not None and self._readers()[0] == self._rank:
            self.stats.add(name, copies.tokens)

    def _follow(self, meta: StepMeta) -> None:
        """Join the session that the scheduler works in; in the background, except that it is known."""
        if meta.session is None:
            return
        self._session = meta.session
        if (found := self._joining.take(meta.session.place)) is not None:
            if self._joined is not None:
                self._joined.close()
            self._joined = found
            found.prepare(self._at_work)
        have = self._joined is not None and self._joined.place == meta.session.place
        if not (have or self._off):
            self._joining.begin(meta.session.place)
