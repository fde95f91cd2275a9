"""Spans: children of the request's own, made where it has one, sent as OTLP that a collector reads."""

import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from kvkeep.cli import main
from kvkeep.keeper.namespaces import Answer, GroupSpec, Namespace
from kvkeep.observe import traces
from kvkeep.observe.watch import Seen
from tests.observe.collector import CALLER, PARENT, TRACE, Collector, collecting
from tests.observe.traffic import CHUNK, Engine, keys_of, traffic

pytest.importorskip("opentelemetry.sdk", reason="pip install 'kvkeep[otel]'")

OTHER = "aa" * 16
GIVEN_UP = f"00-{OTHER}-{CALLER}-01 vendor=a1,other=b"
UNSAMPLED = f"00-{TRACE[::-1]}-{CALLER}-00"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


@pytest.mark.parametrize("http_too", [False, True])
def test_spans_join_the_requests_trace(
    keeper_process, wait_until, collector: Collector, http_too: bool
) -> None:
    options = ["--http", "127.0.0.1:0"] if http_too else []
    below = f"fs://{keeper_process.directory()}?capacity=64MiB"
    keeper = keeper_process("--traces", collector.url, "--tier", below, *options)
    engine = Engine(keeper.connect("engine:0"))
    traffic(engine, rounds=1, documents=2)  # no trace: no span
    wait_until(lambda: not keeper.figures()["tiers"][0]["waiting_chunks"])
    engine.connection.clear()  # what is asked for now comes from the tier
    engine.request(0, 12, trace=UNSAMPLED)
    engine.request(1, 12, trace=PARENT)
    engine.request(1, 12, trace="nonsense")
    given_up = engine.connection.lookup(engine.space, keys_of(5, 3), patience=1e6, trace=GIVEN_UP)
    engine.connection.forget(given_up.ticket)
    keeper.process.terminate()
    keeper.process.wait(20)
    spans = collector.of(TRACE)
    names = sorted(span.name for span in spans)
    assert names == ["kvkeep.fetch", "kvkeep.load", "kvkeep.lookup", "kvkeep.lookup"]
    assert {span.parent_span_id.hex() for span in spans} == {CALLER}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans)
    (fetch,) = [span for span in spans if span.name == "kvkeep.fetch"]
    assert [a.value.int_value for a in fetch.attributes] == [12]
    settling = max(spans, key=lambda span: (span.name == "kvkeep.lookup", span.start_time_unix_nano))
    about = {a.key: a.value.int_value or a.value.string_value for a in settling.attributes}
    assert about.pop("kvkeep.namespace").startswith("SmolLM2")
    assert not about.pop("kvkeep.local_chunks")
    assert about == {f"kvkeep.{what}_chunks": n for what, n in (("asked", 12), ("hit", 12))} | {
        "kvkeep.hit_bytes": 12 * CHUNK
    }
    ended = {span.name: {a.key for a in span.attributes} for span in collector.of(OTHER)}
    assert ended.keys() == {"kvkeep.lookup", "kvkeep.fetch"}
    assert {span.trace_state for span in collector.of(OTHER)} == {"vendor=a1,other=b"}
    assert {span.trace_state for span in spans} == {""}
    assert ended["kvkeep.fetch"] == {"kvkeep.gave_up"}
    assert "kvkeep" in collector.services
    assert not collector.of(TRACE[::-1])


def test_a_dead_collector_is_nobodys_business(keeper_process) -> None:
    keeper = keeper_process("--traces", "http://127.0.0.1:9/v1/traces")
    engine = Engine(keeper.connect("engine:0"))
    assert [engine.request(1, 5, trace=PARENT) for _ in range(3)] == [0, 5, 5]
    keeper.process.terminate()
    assert keeper.process.wait(20) == 0


def test_the_end_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    begun, answer = threading.Event(), threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans):
            begun.set()
            answer.wait(60)
            return SpanExportResult.SUCCESS

    monkeypatch.setattr(traces, "_CLOSE_WAIT", 0.01)
    one = traces.Traces(Hanging())
    space = Namespace(0, bytes(32), "m", (GroupSpec(4096, None),), 1, 1)
    one.looked_up(Seen("e:0", space, b"", Answer(0, 1, 0, Counter()), 0, 0, 0, PARENT), 0, {}, 1e-4)
    one.close()
    assert begun.wait(20)
    assert not answer.is_set()
    answer.set()


def test_an_endpoint_that_is_none(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "serve",
        "--memory",
        "4MiB",
        "--socket",
        str(tmp_path / "k.sock"),
        "--traces",
        "collector:4317",
    ]
    assert main(options) == 2
    assert "OTLP/HTTP URL" in capsys.readouterr().err
