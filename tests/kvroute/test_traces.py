"""Spans between the client's and the engine's."""

import asyncio

import pytest

from benchmarks.stand_in import StandIn
from tests.kvroute.scene import DOCUMENT, Scene, played, scene
from tests.observe.test_traces import PARENT, TRACE, UNSAMPLED, Collector, collector

__all__ = ["collector"]

pytest.importorskip("opentelemetry.sdk", reason="pip install 'kvkeep[otel]'")


async def told(s: Scene, engine: StandIn, **headers: str) -> str | None:
    """The parent that the engine is told of a request."""
    await s.ask(DOCUMENT, headers=headers)
    return engine.stats.headers[-1].get("traceparent")


def test_a_span_between_the_client_s_and_the_engine_s(collector: Collector) -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], traces=collector.url) as s:
            parent = await told(s, s.engines[1], traceparent=PARENT)
            assert s.engines[0].stats.headers[-1]["traceparent"] == parent
            unsampled = await told(s, s.engines[1], traceparent=UNSAMPLED)
            assert unsampled is not None
            assert unsampled.endswith("-00")
            await asyncio.sleep(0)
        (span,) = collector.spans
        assert "kvroute" in collector.services
        assert parent == f"00-{TRACE}-{span.span_id.hex()}-01"
        assert (span.name, span.parent_span_id.hex()) == ("kvroute.request", PARENT.split("-")[2])
        attributes = {one.key: one.value for one in span.attributes}
        assert attributes["kvroute.model"].string_value == "stand-in"
        assert attributes["kvroute.prompt_tokens"].int_value == 400
        assert attributes["kvroute.engine"].string_value in s.router.pool.backends
        names = [event.name for event in span.events]
        order = ["kvroute.prefill", "kvroute.prefilled", "kvroute.chosen", "kvroute.first_byte"]
        assert names == order

    played(play)


def test_a_request_that_nobody_traces_begins_one(collector: Collector) -> None:
    async def play() -> None:
        async with scene(1, traces=collector.url) as s:
            parent = await told(s, s.engines[0])
        (span,) = collector.spans
        assert parent is not None
        assert parent.split("-")[2] == span.span_id.hex()
        assert not span.parent_span_id

    played(play)


def test_without_traces_the_client_s_headers_pass() -> None:
    async def play() -> None:
        async with scene(1) as s:
            assert await told(s, s.engines[0], traceparent=PARENT) == PARENT
            assert await told(s, s.engines[0]) is None

    played(play)
