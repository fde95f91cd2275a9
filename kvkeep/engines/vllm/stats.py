"""Figures on their way to vLLM's log and /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

__all__ = ["COUNTERS", "KVKeepProm", "KVKeepStats"]

COUNTERS: dict[str, str] = {
    "lookups": "Requests that were looked up.",
    "asked_tokens": "Prompt tokens, beyond local prefix-cache hits, that were looked up.",
    "hit_tokens": "Prompt tokens whose KV the keeper had.",
    "loaded_tokens": "Tokens whose KV was loaded.",
    "loaded_bytes": "Bytes copied from the arena to the engine's KV cache.",
    "load_seconds": "Seconds spent copying from the arena.",
    "saved_tokens": "Tokens whose KV was saved.",
    "saved_bytes": "Bytes copied from the engine's KV cache to the arena.",
    "save_seconds": "Seconds spent copying to the arena.",
    "lookup_seconds": "Seconds the scheduler spent on hashing and lookups.",
    "reserve_seconds": "Seconds the scheduler spent on asking for room, and on the answers.",
    "tier_waits": "Requests that waited to hear from the tiers below memory.",
    "tier_wait_seconds": "Seconds that they waited.",
    "tier_timeouts": "Waits that ended by their deadline, or when computing was as fast.",
    "remote_waits": "Requests that waited for chunks of a prompt that another engine prefilled.",
    "remote_wait_seconds": "Seconds that they waited.",
    "remote_timeouts": "Waits that ended because no more chunks came.",
    "computed_tokens": "Tokens computed in steps large enough to measure prefill by.",
    "compute_seconds": "Seconds that those steps took, without copies.",
    "load_failures": "Loads that failed and were handed back for recompute.",
    "keeper_losses": "Times the keeper was lost.",
    "errors": "Unexpected errors in the connector; each is logged.",
}


class KVKeepStats(KVConnectorStats):
    """Sums since the last report; `data` maps names of COUNTERS to numbers."""

    def add(self, name: str, value: float) -> None:
        """Count."""
        self.data[name] = self.data.get(name, 0) + value

    def reset(self) -> None:
        """Start over."""
        self.data = dict[str, Any]()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Sum with another rank's or another interval's figures."""
        for name, value in other.data.items():
            self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Figures as vLLM's periodic log line shows them."""
        return {name: round(value, 4) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def take(self) -> KVKeepStats | None:
        """Hand the figures over and start anew; None if there are none."""
        if not self.data:
            return None
        taken = KVKeepStats(data=self.data)
        self.data = {}
        return taken


class KVKeepProm(KVConnectorPromMetrics):
    """`vllm:kvkeep_*` counters and whether a keeper is attached."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._per_engine(self._counter_cls, f"vllm:kvkeep_{name}", text)
            for name, text in COUNTERS.items()
        }
        self._attached = self._per_engine(
            self._gauge_cls, "vllm:kvkeep_attached", "1 while the engine is attached to a keeper."
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report."""
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
        if "attached" in transfer_stats_data:
            self._attached[engine_idx].set(transfer_stats_data["attached"])

    def _per_engine(self, kind: type[Counter] | type[Gauge], name: str, text: str) -> dict[int, Any]:
        metric = kind(name=name, documentation=text, labelnames=self._labelnames)
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}
