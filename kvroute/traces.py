"""Spans of what the router does for a request: under the client's span if it sent one, above the engine's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from multidict import CIMultiDict

from kvroute.policy import Choice

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

__all__ = ["Trace", "Traces"]

_HEADERS = ("traceparent", "tracestate")


class Trace:
    """One request's, and what is noted in it; without a span nothing is."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    def note(self, **attributes: str | int) -> None:
        """Attributes, as `kvroute.name`."""
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def chose(self, choice: Choice) -> None:
        """The request goes there; a second choice is told as the first was."""
        told: dict[str, str | int] = {"engine": choice.backend.name, "held_tokens": choice.held}
        self.event("chosen", **told)
        self.note(**told)

    def event(self, name: str, **attributes: str | int) -> None:
        """Something that happened now."""
        if self._span is not None:
            self._span.add_event(f"kvroute.{name}", _named(attributes))


def _named(attributes: dict[str, str | int]) -> dict[str, str | int]:
    return {f"kvroute.{name}": value for name, value in attributes.items()}


class Traces:
    """Makes the spans. Without an exporter there are none, and the client's headers pass as they are."""

    def __init__(self, exporter: SpanExporter | None) -> None:
        self._provider = None
        if exporter is not None:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            self._provider = TracerProvider(resource=Resource.create({"service.name": "kvroute"}))
            self._provider.add_span_processor(BatchSpanProcessor(exporter))

    @contextlib.contextmanager
    def request(self, headers: CIMultiDict[str]) -> Iterator[Trace]:
        """The span of a request, which `headers`, that go on to the engine, then name as its parent."""
        if self._provider is None:
            yield Trace()
            return
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        given = {name: headers[name] for name in _HEADERS if name in headers}
        tracer = self._provider.get_tracer("kvroute")
        span = tracer.start_span("kvroute.request", propagator.extract(given), kind=SpanKind.SERVER)
        ours: dict[str, str] = {}
        propagator.inject(ours, set_span_in_context(span))
        for name, value in ours.items():
            headers[name] = value
        try:
            yield Trace(span)
        except BaseException as error:
            span.record_exception(error)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Export what has ended; bounded by the exporter's timeout."""
        if self._provider is not None:
            self._provider.shutdown()
