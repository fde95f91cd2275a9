"""The connector class that vLLM loads: every hook of the contract, each handed to its side.

This is the edge where the cache meets the engine: the one broad `except` is here. A fault in the
cache is counted, logged with its traceback, and switches the cache off for this process; the
engine computes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvkeep import config as configuration
from kvkeep.engines.vllm.describe import check_engine, preferred_layout
from kvkeep.engines.vllm.metadata import Copies, Handshake, Rank, StepMeta
from kvkeep.engines.vllm.scheduler import SchedulerSide
from kvkeep.engines.vllm.stats import KVKeepProm, KVKeepStats
from kvkeep.engines.vllm.worker import WorkerSide
from kvkeep.errors import ConfigError, KVKeepError, LayoutError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KVKeepConnector"]

log = logging.getLogger("kvkeep.vllm")
_T = TypeVar("_T")
_LAST_COPIES = 5.0  # seconds that a device's last copies may take at the engine's end


class KVKeepConnector(KVConnectorBase_V1, SupportsHMA):
    """kvkeep as vLLM's KV connector. Options: `kv_connector_extra_config`, see `EngineConfig`."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        options = configuration.load(
            configuration.EngineConfig, self._kv_transfer_config.kv_connector_extra_config
        )
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._errors = KVKeepStats()
        if role is KVConnectorRole.SCHEDULER and self._kv_transfer_config.kv_load_failure_policy == "fail":
            # A cache that cannot give what it held is a miss, not the request's failure.
            log.info("kvkeep sets kv_load_failure_policy to recompute")
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
        try:
            check_engine(vllm_config, kv_cache_config)
            if role is KVConnectorRole.SCHEDULER:
                self._scheduler = SchedulerSide(vllm_config, kv_cache_config, options)
            else:
                self._worker = WorkerSide(vllm_config, kv_cache_config, options)
        except LayoutError as error:
            if role is KVConnectorRole.SCHEDULER:  # the workers find the same
                log.warning("kvkeep is off for this engine: %s", error)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """On GPUs a block of all layers in one piece, where the backends have it; else what they choose."""
        return preferred_layout(vllm_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache, not a delivery: a save that is dropped is a later miss."""
        return False

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See base class."""
        worker = self._worker
        if worker is not None:
            self._guard(lambda: worker.register(kv_caches), None)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """This rank's layout, for the namespace."""
        return self._worker.handshake() if self._worker is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before a step overwrites blocks, its own or others': see `WorkerSide.fence`."""
        worker, meta = self._worker, kv_connector_metadata
        if worker is not None and isinstance(meta, StepMeta) and meta.reused is not None:
            self._guard(lambda: worker.fence(meta), None)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step()

    def clear_connector_metadata(self) -> None:
        """A step has ended."""
        meta = self._step()
        super().clear_connector_metadata()
        if self._worker is not None:
            self._worker.end_step(meta)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """All loads that the step's forward reads, before it; and those that requests wait for begin."""
        meta, worker = self._step(), self._worker
        if worker is None or meta is None or meta.idle:
            return
        if meta.unplanned and not self._recomputes:
            raise RuntimeError(
                "kvkeep: a step could not plan its loads, and this engine cannot recompute them"
            )
        worker.fail_blocks(meta.unplanned)
        loaded = self._guard(lambda: worker.load(meta, forward_context), False)
        for name, copies in meta.apart.items():  # behind it: with the first step it takes up the session
            self._begin(worker, meta, name, copies)
        if loaded or meta.loads is None:
            return
        if self._recomputes:
            worker.fail_load(meta)
        else:
            worker.load_again(meta)

    def _begin(self, worker: WorkerSide, meta: StepMeta, name: str, copies: Copies | None) -> None:
        if copies is None or not self._guard(partial(worker.load_apart, meta, name, copies), False):
            worker.refuse(meta, name)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose loads have ended on this rank: each once, also where it failed or was given up."""
        results, worker = KVConnectorTransferResults(), self._worker
        if worker is None:
            return results
        for name in worker.apart.ended():
            results.finished_recving.add(name)
            if not self._guard(partial(worker.settle, name), False):
                results.failed_recving.add(name)
                worker.stats.add("load_failures", 1)
        return results

    def wait_for_layer_load(self, layer_name: str) -> None:
        """On a GPU the device waits for the layer's bytes; on a CPU they are there already."""
        if self._worker is not None:
            self._worker.arrive(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Whole blocks of all layers are saved at once, in `wait_for_save`."""

    def wait_for_save(self) -> None:
        """All saves of the step. After this the blocks have what `handle_preemptions` gives them: on a GPU
        a fence, on a CPU nothing, and nothing to protect."""
        meta, worker = self._step(), self._worker
        if worker is None or meta is None:
            return
        if not worker.end_forward(meta):
            self._errors.add("errors", 1)
            log.error("kvkeep: a forward did not ask for layers that were being loaded; it does not count")
            if not self._recomputes:
                raise RuntimeError("kvkeep: and this engine cannot recompute what it loaded")
            worker.fail_load(meta)
        if meta.saves is not None:
            self._guard(lambda: worker.save(meta), None)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks to recompute."""
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Which session this rank has joined, when the scheduler needs to know."""
        return self._worker.report(self._step()) if self._worker is not None else None

    # Scheduler side

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[Rank, KVConnectorHandshakeMetadata]
    ) -> None:
        """All ranks' layouts are known: open the namespace."""
        scheduler = self._scheduler
        if scheduler is None:
            return
        ranks = {rank: meta for rank, meta in metadata.items() if isinstance(meta, Handshake)}
        expected = self._vllm_config.parallel_config.world_size
        unfit = sorted({meta.unfit for meta in ranks.values()} - {""})
        if unfit or len(ranks) != expected:
            why = "; ".join(unfit) or f"{len(ranks)} of {expected} workers can use it"
            log.warning("kvkeep is off for this engine: %s", why)
            self._scheduler = None
            return
        self._guard(lambda: scheduler.handshake(ranks), None)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond the local hit, None to be asked again; and whether the request
        waits for them while others go on."""
        scheduler = self._scheduler
        if scheduler is None:
            return 0, False
        nothing: int | None = 0
        found = self._guard(lambda: scheduler.matched(request, num_computed_tokens), nothing)
        return found, bool(found) and scheduler.apart

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The engine decided how much to load, and where."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The step's copies."""
        scheduler = self._scheduler
        if scheduler is None:
            return StepMeta(-1, leave=True)
        return scheduler.step(scheduler_output, self._guard)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers reported."""
        scheduler = self._scheduler
        if scheduler is not None:
            self._guard(lambda: scheduler.update(connector_output), None)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Saves are complete within their step, so blocks can go at once."""
        scheduler = self._scheduler
        return False, None if scheduler is None else self._guard(lambda: scheduler.finished(request), None)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same for an engine without the hybrid memory allocator."""
        return self.request_finished_all_groups(request, (block_ids,))

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """See `Events.bind`."""
        if self._scheduler is not None and self._scheduler.events is not None:
            self._scheduler.events.bind(gpu_block_pool)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Chunks of ours that came and went, for the engine's publisher of KV events."""
        scheduler = self._scheduler
        nothing: Sequence[KVCacheEvent] = ()
        return nothing if scheduler is None else self._guard(scheduler.take_events, nothing)

    def has_pending_push_work(self) -> bool:
        """Whether there is something to announce, for which the engine must go on stepping."""
        events = None if self._scheduler is None else self._scheduler.events
        return events is not None and events.pending

    def reset_cache(self) -> bool | None:
        """Forget everything of this namespace, in memory and below."""
        scheduler = self._scheduler
        return True if scheduler is None else self._guard(scheduler.reset, False)

    # Both

    def shutdown(self) -> None:
        """Close connections; a private keeper ends when its last one is gone."""
        if self._scheduler is not None:
            self._scheduler.stop()
        if self._worker is not None:
            self._worker.leave(wait=_LAST_COPIES)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Figures of this side since the last call."""
        side = self._scheduler or self._worker
        taken = side.take_stats() if isinstance(side, SchedulerSide) else side.stats.take() if side else None
        errors = self._errors.take()
        if taken is None or errors is None:
            return taken or errors
        return taken.aggregate(errors)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """See base class."""
        return KVKeepStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """`vllm:kvkeep_*` on the engine's /metrics."""
        return KVKeepProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _recomputes(self) -> bool:
        """Whether the engine recomputes blocks that are said to have failed.

        vLLM 0.32 cannot with several KV-cache groups; and where batches overlap, a request's next step is
        computed by then, from those blocks, and its token is served. With speculative decoding Model Runner
        V1 asks for failed blocks before `wait_for_save`, which finds some.
        """
        config = self._vllm_config
        late = config.speculative_config is not None and not config.use_v2_model_runner
        groups = len(self._kv_cache_config.kv_cache_groups)
        return config.max_concurrent_batches == groups == 1 and not late

    def _step(self) -> StepMeta | None:
        return self._connector_metadata if isinstance(self._connector_metadata, StepMeta) else None

    def _guard(self, action: Callable[[], _T], otherwise: _T) -> _T:
        """Run a hook's action; on a fault, count it, log it, and give the engine `otherwise`."""
        try:
            return action()
        except ConfigError:
            raise  # raised at start-up only: the operator must hear of it
        except LayoutError as error:
            log.warning("kvkeep is off for this engine: %s", error)
            self._off()
        except KVKeepError as error:
            log.warning("kvkeep: %s", error)
        except Exception:
            log.exception("kvkeep: an unexpected error; the cache is off for this process from here on")
            self._off()
        self._errors.add("errors", 1)
        return otherwise

    def _off(self) -> None:
        if self._scheduler is not None:
            self._scheduler.off()
        if self._worker is not None:
            self._worker.leave()


def _log_like_vllm() -> None:
    """Use vLLM's handlers and level for our records, so that they appear in its log."""
    ours, theirs = logging.getLogger("kvkeep"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level or logging.INFO)
        ours.propagate = False
