"""Spans of what the keeper does for a request, as children of the span that the engine was sent.

The engine passes `traceparent` and `tracestate` of a request on with its lookup; without, there is no span.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from kvkeep.observe.watch import Seen

__all__ = ["Traces", "otlp"]

_MOST_OPEN, _CLOSE_WAIT = 4096, 5.0


def otlp(endpoint: str) -> SpanExporter:
    """An exporter to an OTLP/HTTP endpoint, such as http://collector:4318/v1/traces. Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import trace  # noqa: F401 (the exporter alone is not enough)
    except ImportError as error:
        raise ConfigError(f"--traces needs {error.name}: pip install 'kvkeep[otel]'") from error
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"--traces takes an OTLP/HTTP URL, such as http://127.0.0.1:4318/v1/traces: {endpoint}"
        )
    return OTLPSpanExporter(endpoint, timeout=5)


class Traces:
    """Makes the spans, on the event loop; they are exported by a thread of the library's."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "kvkeep"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvkeep")
        # By ticket and by lease; the oldest are dropped unfinished, as are those of clients that vanish.
        self._fetches: OrderedDict[int, Span] = OrderedDict()
        self._loads: OrderedDict[int, Span] = OrderedDict()

    def looked_up(self, seen: Seen, nbytes: int, tiers: Mapping[str, int], seconds: float) -> None:
        """A lookup took so long, found so many bytes and ends now; `tiers`: chunks by where they came from
        while the request waited."""
        now, answer = time.time_ns(), seen.answer
        about: dict[str, str | int] = {
            "kvkeep.namespace": seen.space.label,
            "kvkeep.local_chunks": answer.local,
            "kvkeep.asked_chunks": answer.asked,
            "kvkeep.hit_chunks": answer.found,
            "kvkeep.hit_bytes": nbytes,
        }
        self._start("kvkeep.lookup", seen.trace, now - int(seconds * 1e9), about).end(now)
        fetch = self._fetches.pop(seen.settles, None)
        if fetch is not None:
            fetch.set_attributes({f"kvkeep.chunks_from.{tier}": chunks for tier, chunks in tiers.items()})
            fetch.end(now)
        if seen.ticket:
            self._keep(self._fetches, seen.ticket, self._start("kvkeep.fetch", seen.trace, now))
        if seen.lease:
            about = {"kvkeep.chunks": answer.found, "kvkeep.bytes": nbytes}
            self._keep(self._loads, seen.lease, self._start("kvkeep.load", seen.trace, now, about))

    def gave_up(self, ticket: int) -> None:
        """The request of a ticket waits no more, and takes nothing of what was fetched for it."""
        fetch = self._fetches.pop(ticket, None)
        if fetch is not None:
            fetch.set_attribute("kvkeep.gave_up", True)
            fetch.end()

    def released(self, lease: int, read: bool) -> None:
        """A lease is over: all ranks have read, or it was given back and there was no load."""
        load = self._loads.pop(lease, None)
        if load is not None and read:
            load.end()

    def close(self) -> None:
        """Export what has ended, for _CLOSE_WAIT seconds at most: the library tries a collector that is gone
        again for each batch."""
        closing = threading.Thread(target=self._provider.shutdown, name="kvkeep-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_WAIT)

    def _start(self, name: str, trace: str, at: int, about: Mapping[str, str | int] | None = None) -> Span:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent, _, state = trace.partition(" ")
        context = TraceContextTextMapPropagator().extract({"traceparent": parent, "tracestate": state})
        return self._tracer.start_span(name, context, attributes=about, start_time=at)

    @staticmethod
    def _keep(spans: OrderedDict[int, Span], number: int, span: Span) -> None:
        spans[number] = span
        while len(spans) > _MOST_OPEN:
            spans.popitem(last=False)
