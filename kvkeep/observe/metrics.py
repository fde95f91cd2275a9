"""The keeper's figures in Prometheus' format, collected when they are asked for: nothing is counted twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.leases import ClaimKind
from kvkeep.keeper.movers import Movers
from kvkeep.keeper.namespaces import Counters, Namespace
from kvkeep.keeper.pins import pinned_bytes
from kvkeep.observe.histogram import Histogram
from kvkeep.observe.watch import MOST_LABELS, Watch
from kvkeep.tiers.base import Usage

__all__ = ["Exporter", "Served", "arena_bytes"]

_OTHERS = "others"
_MODEL_CHARACTERS = 60
_ERROR_KINDS = ("protocol", "silent", "unread", "user", "refused")
_SPACE_COUNTERS = {
    "stored_chunks": "Chunks that engines have saved, all KV-cache groups together.",
    "fetched_chunks": "Chunks read from a tier into the arena.",
    "refused_chunks": "Chunks for which there was no room.",
    "evicted_chunks": "Chunks given up for room.",
    "aborted_chunks": "Chunks reserved and never committed.",
}
_SPACE_HELP = {
    "asked_chunks": "Chunks that requests asked for beyond what their engine had, once a request.",
    "local_chunks": "Chunks that the asking engine had in a cache of its own.",
    "hit_chunks": "Chunks of those asked for that were found, by the place that they came from.",
    "used_bytes": "Bytes of slots that a namespace takes.",
}
_TIER_FIGURES = {
    "errors": "Verbs of a tier that failed.",
    "lost_chunks": "Chunks that were evicted from memory before a tier had them.",
    "asked": "Keys that a tier was asked about.",
    "found": "Keys of those that it had.",
    "refused": "Values that a tier had no room for.",
    "stored": "Values written to a tier.",
    "got_bytes": "Bytes read from a tier.",
    "put_bytes": "Bytes written to a tier.",
}
_TIER_GAUGES = {
    "up": "1 while a tier is in use, 0 while it is switched off after failures.",
    "queue_chunks": "Chunks that wait to be written to a tier.",
    "reading_bytes": "Bytes that are being read from a tier.",
    "used_bytes": "Bytes that a tier holds, as far as it can tell.",
    "capacity_bytes": "Bound of a tier, as far as it can tell.",
}


class Served(Protocol):
    """The keeper's process, as far as it is looked at."""

    keeper: Keeper
    movers: Movers | None
    watch: Watch | None
    errors: Any
    ready: bool
    started: float

    def figures(self) -> dict[str, Any]:
        """What `kvkeep status` shows."""

    def stop(self) -> None:
        """Drain, and end."""


def arena_bytes(keeper: Keeper) -> dict[str, int]:
    """Bytes of the arena by what they are used for."""
    used = int(keeper.usage()[1].sum())
    reserved = sum(int(keeper.slot_bytes(c.records).sum()) for c in keeper.claims.all(ClaimKind.RESERVATION))
    pinned = pinned_bytes(keeper)
    return {
        "held": used - reserved - pinned,
        "pinned": pinned,
        "reserved": reserved,
        "free": keeper.arena.nbytes - used,
    }


class Exporter(Collector):
    """Writes the text of `/metrics`. On the event loop."""

    def __init__(self, served: Served, watch: Watch, tiers: list[str], usage: Mapping[int, Usage]) -> None:
        self._served, self._watch = served, watch
        self._tiers, self._usage = tiers, usage
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All metrics, in the text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: asked at registration, and names here do not clash."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the library."""
        yield from self._keeper()
        yield from self._namespaces()
        if self._served.movers is not None:
            yield from self._tier_figures(self._served.movers)
            yield from self._moves(self._served.movers)

    def _keeper(self) -> Iterator[Metric]:
        served = self._served
        keeper, figures = served.keeper, served.figures()
        info = GaugeMetricFamily("kvkeep_info", "What runs; always 1.", labels=["version", "policy"])
        info.add_metric([figures["version"], figures["policy"]], 1)
        yield info
        yield _gauge("ready", "1 while clients are served.", float(served.ready))
        yield _gauge("start_time_seconds", "When the keeper was started, since the epoch.", served.started)
        arena = GaugeMetricFamily("kvkeep_arena_bytes", "Bytes of the arena by use.", labels=["use"])
        for use, nbytes in arena_bytes(keeper).items():
            arena.add_metric([use], nbytes)
        yield arena
        yield _gauge("prefaulted_bytes", "Bytes of the arena prepared ahead.", figures["prefaulted_bytes"])
        yield _gauge("index_bytes", "Memory of the index of chunks.", figures["index_bytes"])
        for name in ("chunks", "leases", "reservations", "sessions", "connections"):
            yield _gauge(name, f"Number of {name} now.", figures[name])
        yield _counter("lookups", "Lookups answered.", keeper.counters.lookups)
        yield _counter("stored_bytes", "Bytes that became readable.", keeper.counters.stored_bytes)
        errors = CounterMetricFamily("kvkeep_errors", "Clients dropped, requests refused.", labels=["kind"])
        for kind in _ERROR_KINDS:
            errors.add_metric([kind], served.errors[kind])
        yield errors
        seconds = HistogramMetricFamily("kvkeep_lookup_seconds", "Seconds that the keeper took for a lookup.")
        _add(seconds, [], self._watch.seconds)
        yield seconds

    def _namespaces(self) -> Iterator[Metric]:
        keeper, watch = self._served.keeper, self._watch
        spaces = keeper.namespaces[:MOST_LABELS]
        names = [*map(_label, spaces), *([_OTHERS] if len(keeper.namespaces) > MOST_LABELS else [])]
        used = keeper.usage()[1]
        sums = [vars(space.counters) for space in spaces]
        rest = {
            name: value - sum(counters[name] for counters in sums)
            for name, value in dataclasses.asdict(keeper.counters).items()
        }
        for name, text in _SPACE_COUNTERS.items():
            assert name in Counters.__dataclass_fields__
            yield _family(CounterMetricFamily, name, text, names, [row[name] for row in [*sums, rest]])
        at = [*range(len(spaces)), MOST_LABELS]
        for name, totals in (("asked_chunks", watch.asked), ("local_chunks", watch.local)):
            yield _family(CounterMetricFamily, name, _SPACE_HELP[name], names, [totals[i] for i in at])
        hits = CounterMetricFamily(
            "kvkeep_hit_chunks", _SPACE_HELP["hit_chunks"], labels=["namespace", "tier"]
        )
        for number, name in zip(at, names, strict=False):
            for tier in ("memory", *self._tiers):
                hits.add_metric([name, tier], watch.hits[number][tier])
        yield hits
        nbytes = [*used[: len(spaces)].tolist(), int(used[len(spaces) :].sum())]
        yield _family(GaugeMetricFamily, "used_bytes", _SPACE_HELP["used_bytes"], names, nbytes)

    def _tier_figures(self, movers: Movers) -> Iterator[Metric]:
        rows = movers.figures()
        for name, text in _TIER_FIGURES.items():
            values = [row[name] for row in rows]
            yield _family(CounterMetricFamily, f"tier_{name}", text, self._tiers, values, "tier")
        reads = CounterMetricFamily(
            "kvkeep_tier_reads", "Values that were read from a tier, by outcome.", labels=["tier", "result"]
        )
        for tier, row in zip(self._tiers, rows, strict=True):
            for result in ("hits", "misses", "damaged"):
                reads.add_metric([tier, result], float(str(row[result])))
        yield reads
        usage = [self._usage.get(number, Usage()) for number in range(len(rows))]
        gauges: dict[str, list[Any]] = {
            "up": [row["available"] for row in rows],
            "queue_chunks": [row["waiting_chunks"] for row in rows],
            "reading_bytes": [row["reading_bytes"] for row in rows],
            "used_bytes": [one.used_bytes for one in usage],
            "capacity_bytes": [one.capacity_bytes for one in usage],
        }
        for name, values in gauges.items():
            yield _family(GaugeMetricFamily, f"tier_{name}", _TIER_GAUGES[name], self._tiers, values, "tier")

    def _moves(self, movers: Movers) -> Iterator[Metric]:
        labels = ["tier", "verb"]
        seconds = HistogramMetricFamily("kvkeep_move_seconds", "Seconds of a tier's batches.", labels=labels)
        nbytes = HistogramMetricFamily("kvkeep_move_bytes", "Bytes that batches moved.", labels=labels)
        for tier, opened in zip(self._tiers, movers.tiers, strict=True):
            for verb, histogram in opened.tier.seconds.items():
                _add(seconds, [tier, verb], histogram)
            for verb, histogram in opened.tier.nbytes.items():
                _add(nbytes, [tier, verb], histogram)
        yield from (seconds, nbytes)


def _label(space: Namespace) -> str:
    return f"{space.fingerprint.hex()[:8]} {space.label[:_MODEL_CHARACTERS]}"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kvkeep_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"kvkeep_{name}", text, value=value)


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    labels: list[str],
    values: list[Any],
    label: str = "namespace",
) -> Metric:
    """One metric by one label; None is left out."""
    family = kind(f"kvkeep_{name}", text, labels=[label])
    for one, value in zip(labels, values, strict=False):
        if value is not None:
            family.add_metric([one], float(value))
    return family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    family.add_metric(labels, buckets=histogram.buckets(), sum_value=histogram.sum)
