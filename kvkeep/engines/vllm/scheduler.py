"""Scheduler side of the connector: what to load, what to save. Runs on the engine's busy loop.

A load is promised only for chunks that are leased, and only once every worker maps the arena, so
a promise is kept even if the keeper dies in the next instant. Nothing here waits for anything but
answers of the keeper, each bounded by `timeout`; one that does not come is the last that is waited for.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Identity, Link, Opened
from kvkeep.engines.vllm.describe import attends_to_all, describe_model, group_window
from kvkeep.engines.vllm.events import Events, events_wanted
from kvkeep.engines.vllm.geometry import Geometry, arrange, blocks_written
from kvkeep.engines.vllm.handover import Arrivals, answer
from kvkeep.engines.vllm.metadata import Handshake, Offered, Place, Rank, Session, StepMeta, WorkerMeta
from kvkeep.engines.vllm.promises import Guard, Promises
from kvkeep.engines.vllm.reader import Reader, give_back
from kvkeep.engines.vllm.report import Reporter
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.engines.vllm.saves import Saves
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.errors import KeeperUnavailable, KVKeepError, RequestRefused
from kvkeep.identity import fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["SchedulerSide"]

log = logging.getLogger("kvkeep.vllm")
_T = TypeVar("_T")


class SchedulerSide:
    """State of one engine's scheduler side. One thread."""

    def __init__(self, vllm_config: VllmConfig, kv_config: KVCacheConfig, config: EngineConfig) -> None:
        self.config = config
        self.stats = KVKeepStats()
        self._vllm_config = vllm_config
        self._kv_config = kv_config
        self._engine_id: str = vllm_config.kv_transfer_config.engine_id
        # With the other role `kv_transfer_params` are for a connector beside this one.
        self._hands_over = vllm_config.kv_transfer_config.kv_role in ("kv_producer", "kv_consumer")
        specs = [group.kv_cache_spec for group in kv_config.kv_cache_groups]
        self._block_tokens = [int(spec.block_size) for spec in specs]
        self._windows = [group_window(spec) for spec in specs]
        self._geometry: Geometry | None = None  # fixed once the workers have said what they hold
        self._chunk_tokens = 0
        self._fingerprint = b""
        self._link: Link | None = None
        self._keeper: Opened | None = None
        self._session: Session | None = None
        self._joined: dict[Rank, Place] = {}
        self._ranks: list[Rank] = []
        self._ready = False
        self._requests: dict[str, Tracked] = {}
        self._promises = Promises()
        self._whole = attends_to_all(specs)
        self._told = False
        self._disabled = False
        self._reporter = Reporter(config.log_interval)
        whole = self._windows.index(None) if None in self._windows else None
        self._reader = Reader(config, self.stats, whole)
        self._arrivals = Arrivals(config, self.stats, whole or 0)
        self._description: dict[str, object] = {}
        self.events = Events(vllm_config, kv_config) if events_wanted(vllm_config) else None
        """What this engine publishes of the chunks that it met; None where it publishes nothing."""
        self._fences = vllm_config.device_config.device_type != "cpu"
        self._saves = Saves(config, self.stats, self.events, self._met)

    # Start

    def handshake(self, workers: dict[Rank, Handshake]) -> None:
        """The workers have registered their KV caches: fix the namespace, and open it."""
        self._ranks = sorted(workers)
        groups = range(len(self._windows))
        block_bytes = [sum(workers[rank].block_bytes[group] for rank in self._ranks) for group in groups]
        geometry = Geometry.choose(self._block_tokens, self._windows, block_bytes, self.config.chunk_tokens)
        self._geometry, self._chunk_tokens = geometry, geometry.chunk_tokens
        description = describe_model(
            self._vllm_config, self._kv_config, geometry.chunk_tokens, self.config.model_id
        )
        description["layouts"] = [[list(rank), workers[rank].layout] for rank in self._ranks]
        self._description, self._fingerprint = description, fingerprint(description)
        self._session, slot = arrange(geometry, workers, max(1, self._kv_config.kv_tp_replicas))
        specs = list(zip(slot, geometry.window_chunks(), strict=True))
        parts, readers = len(self._session.part), len(self._ranks)
        identity = Identity(self._fingerprint, self._label(), specs, parts, readers, geometry.chunk_tokens)
        self._link = Link(self.config, self._engine_id, identity)
        whole = any(worker.whole_graphs for worker in workers.values())
        self._promises.apart = whole if self.config.load_by == "auto" else self.config.load_by == "request"
        self._joined = {rank: workers[rank].place for rank in self._ranks}
        log.info(
            "kvkeep namespace %s: chunks of %d tokens, %.2f MiB; %d groups, %d ranks; loads by %s",
            self._fingerprint.hex()[:12],
            geometry.chunk_tokens,
            sum(slot) / 2**20,
            len(slot),
            len(self._ranks),
            "request" if self.apart else "layers",
        )
        self._open_first()

    def _open_first(self) -> None:
        assert self._link is not None
        try:
            self._adopt(self._link.open(0))
            if not self._all_joined():
                log.warning("kvkeep: not all workers have found this keeper yet, or theirs is another host's")
        except KeeperUnavailable as error:
            log.warning("kvkeep: %s; the engine runs without it and goes on looking", error)
            self._link.reopen(1)

    def _label(self) -> str:
        model = self._vllm_config.model_config
        return f"{str(model.model).rstrip('/').split('/')[-1]} {model.dtype} tp{len(self._ranks)}"

    # Reading

    @property
    def apart(self) -> bool:
        """Whether requests wait for their loads, while the engine computes for others."""
        return self._promises.apart

    def matched(self, request: Request, local: int) -> int | None:
        """Tokens beyond `local` whose KV is held and leased. None while more is on its way from a tier: the
        engine asks again. Leaves at least one to compute, but where the engine takes its last token back."""
        if not self._ready or request.skip_reading_prefix_cache:
            return 0
        tracked = self._track(request)
        end = request.num_tokens - (0 if self.apart and self._whole else 1)
        first, limit = local // self._chunk_tokens, end // self._chunk_tokens
        if not tracked.cacheable or tracked.load_failed:
            return 0
        try:
            if not self._reader.look(self._keeper, tracked, first, limit, self._chunk_tokens):
                return None
            if self._arrivals.waits(self._keeper, tracked, self._fingerprint, limit, self._chunk_tokens):
                return None
        except (KeeperUnavailable, RequestRefused) as error:
            self._lose(error)
        return max(0, (first + tracked.found) * self._chunk_tokens - local)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """The engine took `external` of the tokens that `matched` offered, and gave them blocks."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        asked = max(0, tracked.asked[1] - tracked.asked[0]) * self._chunk_tokens
        if asked:
            self.stats.add("asked_tokens", asked)
        if not external:
            self._give_back(tracked)
            return
        local = (tracked.first + tracked.found) * self._chunk_tokens - external
        self.stats.add("hit_tokens", external)
        self._promises.make(tracked, blocks.get_block_ids(), local, external)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """A request is over: let go of it. Returns parameters for the engine that goes on with it, if any."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._give_back(tracked)
            self._try(self._reader.tell_all)
        if not self._hands_over:
            return None
        self._try(self._saves.settle)  # that says how much of it the keeper has taken
        saved = tracked if self._ready else None
        return answer(request.kv_transfer_params, request.status, self._engine_id, saved, self._chunk_tokens)

    # One step

    def step(self, output: SchedulerOutput, guard: Guard) -> StepMeta:
        """Everything the workers have to copy in this step.

        `guard(action, otherwise)` runs what may fail. A promised load that cannot be planned is
        handed to the workers as failed: the engine has counted its tokens as computed.
        """
        if self.events is not None:
            self.events.look_out()
        for action in (self._saves.settle, self._reader.tell):
            guard(partial(self._try, action), None)
        planned = self._promises.plan(self._geometry, guard, self._met)
        saves = guard(lambda: self._plan_saves(output), None) if self._ready else None
        epoch = self._session.epoch if self._session is not None else -1  # that the plans are of
        if not self._ready:
            guard(self._renew, None)
        meta = StepMeta(epoch, planned.loads, planned.apart, saves, unplanned=planned.unplanned)
        meta.scheduled_tokens, meta.leave = output.total_num_scheduled_tokens, self._disabled
        if self._fences:
            meta.reused = blocks_written(output, planned.all())
        if not meta.scheduled_tokens:
            self._reader.rest(self._arrivals.rests() or self._promises.waits)
        if self._session is not None and not (self._told and self._all_joined()):
            meta.session, self._told = self._session, True
        meta.idle = not (planned.loads or planned.apart or planned.unplanned or meta.session)
        return meta

    def off(self) -> None:
        """Promise nothing more; what has been promised is still planned."""
        self._ready, self._disabled = False, True
        self.stats.data["attached"] = 0
        if self._link is not None:
            self._link.stop()
        if self._keeper is not None:  # the workers leave with the next step: then the session's claims end
            self._keeper.connection.close()
            self._keeper = None

    def _plan_saves(self, output: SchedulerOutput) -> Offered | None:
        keeper, geometry = self._keeper, self._geometry
        if keeper is None or geometry is None:
            return None
        return self._try(lambda _: self._saves.plan(keeper, geometry, self._requests, output))

    # Results and housekeeping

    def update(self, output: KVConnectorOutput) -> None:
        """What the workers reported after a step."""
        if output.is_empty():
            return
        self._promises.arrived(output.finished_recving or ())
        for name in output.failed_recving & self._requests.keys():
            self._requests[name].load_failed = True
        if isinstance(output.kv_connector_worker_meta, WorkerMeta):
            self._joined |= output.kv_connector_worker_meta.joined
            if self._ready and (lost := [rank for rank in self._ranks if not self._is_in(rank)]):
                self._lose(KeeperUnavailable(f"worker(s) {lost}, by pipeline and tensor rank, lost it"))
            self._set_ready()
        if isinstance(output.kv_connector_stats, KVKeepStats):
            self._reporter.add(output.kv_connector_stats)
            self._reader.speed.add(output.kv_connector_stats)

    def take_stats(self) -> KVKeepStats | None:
        """Figures since the last call; logs the periodic line when it is due."""
        taken = self.stats.take()
        self._reporter.add(taken)
        self._reporter.maybe_log(self._keeper)
        return taken

    def reset(self) -> bool:
        """Serve nothing that was saved so far, from memory or from any tier.

        Weights may have been replaced under the running engine, which no digest of files shows: from here
        on it works in a namespace of its own.
        """
        self._fingerprint = fingerprint(self._description | {"reset": uuid.uuid4().hex})
        for tracked in self._requests.values():
            tracked.cacheable = False  # part of its KV may be from before
            if not self._promises.holds(tracked):
                self._give_back(tracked)
        if self.events is not None:
            self.events.forget()
        if self._link is None:
            return True
        self._link.rename(self._fingerprint)
        if self._keeper is None:
            return True
        try:
            self._keeper.connection.clear(self._keeper.namespace)
            self._keeper = self._link.renew(self._keeper)
        except KVKeepError as error:
            self._lose(error)
            return False
        return True

    def stop(self) -> None:
        """The engine shuts down."""
        if self._link is not None:
            self._link.stop()
        if self._keeper is not None:
            self._keeper.connection.close()

    def take_events(self) -> Sequence[KVCacheEvent]:
        """What has become of chunks that this engine's requests met, since the last call."""
        if (events := self.events) is None:
            return ()
        self._try(self._saves.settle)  # before the keeper is asked what has come of that
        return self._try(lambda keeper: events.take(keeper if self._ready else None)) or ()

    def _met(self, tracked: Tracked, first: int, last: int) -> None:
        if self.events is not None:
            self.events.met(tracked, self._fingerprint, self._chunk_tokens, first, last)

    def _track(self, request: Request) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = Tracked(request, self._fingerprint, self._chunk_tokens, self._hands_over)
            self._requests[request.request_id] = tracked
        return tracked

    def _give_back(self, tracked: Tracked) -> None:
        self._try(lambda keeper: give_back(keeper, tracked))

    def _try(self, action: Callable[[Opened | None], _T]) -> _T | None:
        try:
            return action(self._keeper)
        except (KeeperUnavailable, RequestRefused) as error:
            self._lose(error)
            return None

    def _lose(self, error: KVKeepError) -> None:
        """Go on without a keeper, and look for the next one.

        Loads already promised stay good: workers keep the old arena mapped until they join a new
        session, which they learn of in a later step.
        """
        if self._keeper is None or self._link is None:
            return
        where = self._keeper.connection.path
        log.warning("kvkeep: lost the keeper at %s (%s); going on without it", where, error)
        self.stats.add("keeper_losses", 1)
        self.stats.data["attached"] = 0
        self._keeper.connection.close()
        self._link.reopen(self._keeper.epoch + 1)
        self._keeper, self._ready = None, False
        for tracked in self._requests.values():
            tracked.next_save = 0
            if not self._promises.holds(tracked):
                tracked.forget_claim()

    def _renew(self) -> None:
        if self._keeper is not None and not self._ready and self._keeper.connection.ended:
            # Nothing else would notice: nothing is asked of it until all are in, and they never will be.
            self._lose(KeeperUnavailable("it went away before all workers had joined"))
        if self._link is None or (opened := self._link.fresh()) is None:
            return
        try:
            self._adopt(self._link.renew(opened))  # a reset may have come while it was being looked for
        except KVKeepError as error:
            self._keeper = opened
            self._lose(error)

    def _adopt(self, opened: Opened) -> None:
        assert self._session is not None
        self._keeper = opened
        self._session = replace(self._session, place=(opened.connection.keeper, opened.epoch))
        self._told = False
        self._set_ready()

    def _is_in(self, rank: Rank) -> bool:
        return self._session is not None and self._joined.get(rank) == self._session.place

    def _all_joined(self) -> bool:
        return all(map(self._is_in, self._ranks))

    def _set_ready(self) -> None:
        if not (self._ready or self._disabled) and self._keeper is not None and self._all_joined():
            self._ready = True
            self.stats.data["attached"] = 1
            log.info("kvkeep: attached to keeper %s", self._keeper.connection.keeper[:8])
