"""A real vLLM server with kvkeep: features of its API, and processes that die at the worst moment."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbench.engine import VllmServer, connector_args
from kvkeep.cli.main import main
from kvkeep.identity import tenant_of
from kvkeep.wire.client import Connection
from tests.cores import engine_cores
from tests.observe.collector import CALLER, PARENT, TRACE, collecting

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ARGS = ["--dtype", "float32", "--max-model-len", "4096", "--block-size", "32"]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": engine_cores()}
HIT = 576
"""Tokens of a prompt of 700 that whole chunks hold: six blocks of 32 make 0.75 MiB of this model."""


def prompt(seed: int, length: int = 700) -> list[int]:
    return [3 + (seed * 7919 + i * (seed + 3) * 31) % 4000 for i in range(length)]


def figures(socket: str) -> dict[str, Any]:
    connection = Connection.open(socket, "test", timeout=10.0)
    try:
        return connection.status()
    finally:
        connection.close()


def test_what_must_not_be_mixed_is_not(
    tiny_model: Path, lora: Path, keeper_process: Callable[..., Any], tmp_path: Path
) -> None:
    """Cache salt and LoRA are in the key; reset reaches the keeper; `kvkeep warm` fills it; metrics are on
    /metrics."""
    keeper = keeper_process(memory="256MiB")
    args = [*ARGS, "--enable-lora", "--lora-modules", f"adapter={lora}", "--max-lora-rank", "8"]
    args += connector_args(socket=keeper.socket, log_interval=1)
    with VllmServer(tiny_model, args, log=tmp_path / "engine.log", environ=SMALL) as engine:

        def loaded() -> float:
            return engine.metric("vllm:kvkeep_loaded_tokens_total")

        def again(**params: Any) -> tuple[str, float]:
            engine.reset_local_cache()
            before = loaded()
            return engine.complete(prompt(1), 12, **params).text, loaded() - before

        cold, nothing = again()
        assert nothing == 0
        assert again() == (cold, HIT)
        assert again(cache_salt="tenant a") == (cold, 0)
        assert again(cache_salt="tenant a") == (cold, HIT)
        assert again(cache_salt="tenant b") == (cold, 0)
        told = {row["tenant"]: row for row in figures(keeper.socket)["tenants"]}
        for salt, counts in (("tenant a", (6, 3, 3)), ("tenant b", (3, 0, 3))):
            row = told.pop(tenant_of(salt).hex())
            assert tuple(row[f"{name}_chunks"] for name in ("asked", "hit", "stored")) == counts
        assert told == {}
        adapted, found = again(model="adapter")
        assert found == 0
        assert adapted != cold
        assert again(model="adapter") == (adapted, HIT)
        engine.reset_local_cache(external=True)
        assert again() == (cold, 0)

        document, before = tmp_path / "document.txt", loaded()
        document.write_text(" ".join(f"w{token}" for token in prompt(5)))
        assert main(["warm", "--url", engine.url, str(document)]) == 0
        engine.reset_local_cache()
        engine.complete(document.read_text() + " w7 w8", 1)
        assert loaded() - before == HIT
        assert engine.metric("vllm:kvkeep_attached") == 1
        assert engine.metric("vllm:kvkeep_errors_total") == 0
        assert engine.metric("vllm:kvkeep_saved_bytes_total") > 0
    assert "kvkeep: " in (tmp_path / "engine.log").read_text()
    assert figures(keeper.socket)["leases"] == 0


def test_two_ranks_and_a_restart(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path
) -> None:
    """Tensor parallelism: both parts of a chunk come back, in another engine, to the right rank."""
    keeper = keeper_process(memory="256MiB")
    environ = {**SMALL, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    answers = []
    for life, load_by in enumerate(("layers", "layers", "request")):
        log = tmp_path / f"engine{life}.log"
        args = [*ARGS, "--tensor-parallel-size", "2"]
        args += connector_args(socket=keeper.socket, load_by=load_by)
        with VllmServer(tiny_model, args, log=log, environ=environ) as engine:
            answers.append(engine.complete(prompt(2), 12).text)
            assert engine.metric("vllm:kvkeep_loaded_tokens_total") == (HIT if life else 0)
    assert answers[0] == answers[1] == answers[2]
    (space,) = figures(keeper.socket)["namespaces"]
    assert "tp2" in space["label"]
    assert figures(keeper.socket)["reservations"] == 0


@pytest.mark.parametrize("load_by", ["layers", "request"])
def test_the_keeper_dies_and_another_takes_over(
    load_by: str,
    tiny_model: Path,
    keeper_process: Callable[..., Any],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    """kill -9 of the keeper amid loads and saves: every answer is right; the next keeper is found."""
    first = keeper_process(memory="256MiB")
    args = [*ARGS, *connector_args(socket=first.socket, timeout=0.5, load_by=load_by)]
    with VllmServer(tiny_model, args, log=tmp_path / "engine.log", environ=SMALL) as engine:
        expected = {seed: engine.complete(prompt(seed), 24).text for seed in range(6)}

        def ask(seed: int) -> bool:
            return engine.complete(prompt(seed), 24).text == expected[seed]

        def storm(rounds: int, then: Callable[[], None]) -> None:
            timer = threading.Timer(0.3, then)
            timer.start()
            with ThreadPoolExecutor(6) as pool:
                for _ in range(rounds):
                    engine.reset_local_cache() if rounds == 1 else None
                    assert all(pool.map(ask, range(6)))
            timer.join()

        engine.reset_local_cache()
        storm(6, first.process.kill)
        lost = engine.metric("vllm:kvkeep_keeper_losses_total")
        second = keeper_process(memory="256MiB", socket=first.socket)

        def attached() -> bool:
            engine.complete(prompt(99, 40), 1)  # a session is joined in steps of the engine
            return engine.metric("vllm:kvkeep_attached") == 1

        wait_until(attached, 60)
        assert lost == 1
        for reset in (True, True):
            if reset:
                engine.reset_local_cache()
            storm(1, lambda: None)
        assert engine.metric("vllm:kvkeep_errors_total") == 0
        held = figures(second.socket)
        assert held["counters"]["hit_chunks"] > 0
        assert held["leases"] == held["reservations"] == 0


def test_the_engine_dies(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """kill -9 of the whole engine while it saves: its claims vanish, what it committed is served."""
    keeper = keeper_process(memory="256MiB")
    args = [*ARGS, *connector_args(socket=keeper.socket)]
    with VllmServer(tiny_model, args, log=tmp_path / "one.log", environ=SMALL) as engine:
        expected = engine.complete(prompt(0), 12).text
        pool = ThreadPoolExecutor(4)
        running = [pool.submit(engine.complete, prompt(seed, 3000), 4) for seed in range(1, 5)]
        wait_until(lambda: figures(keeper.socket)["counters"]["stored_chunks"] > 40, 60)
        for pid in engine.pids:
            os.kill(pid, signal.SIGKILL)
        for future in running:
            assert future.exception(timeout=60) is not None
        pool.shutdown()

    def balanced() -> bool:
        now = figures(keeper.socket)
        return now["sessions"] == 1 and now["leases"] == now["reservations"] == 0  # 1: this test's own

    wait_until(balanced, 20)
    with VllmServer(tiny_model, args, log=tmp_path / "two.log", environ=SMALL) as engine:
        assert engine.complete(prompt(0), 12).text == expected
        assert engine.metric("vllm:kvkeep_loaded_tokens_total") == HIT


def test_a_store_that_hangs_or_is_slow_ends_in_computing(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """One says what it holds, and never gives it: the request computes once its time is over. One takes 2 s
    to say anything: nobody waits for that, whether it holds the prompt or not. Answers are the same."""
    store = f"fs://{tmp_path}/kv?capacity=1GiB"
    keeper = keeper_process("--tier", store, memory="256MiB")
    patience = {"load": "always", "probe_wait": 1.0, "load_wait": 1.0}
    args = [*ARGS, *connector_args(socket=keeper.socket, **patience)]
    names = ("loaded_tokens", "tier_waits", "tier_timeouts", "errors", "tier_wait_seconds")
    losses = 0
    with VllmServer(tiny_model, args, log=tmp_path / "engine.log", environ=SMALL) as engine:

        def attached() -> bool:
            engine.complete(prompt(99, 40), 1)
            metrics = ("vllm:kvkeep_keeper_losses_total", "vllm:kvkeep_attached")
            return [engine.metric(name) for name in metrics] == [losses, 1]

        def asked(seed: int) -> list[float]:
            engine.reset_local_cache()
            before = [engine.metric(f"vllm:kvkeep_{name}_total") for name in names]
            assert engine.complete(prompt(seed), 12).text == cold[seed]
            return [
                engine.metric(f"vllm:kvkeep_{name}_total") - then
                for name, then in zip(names, before, strict=True)
            ]

        cold = {1: engine.complete(prompt(1), 12).text}
        keeper.close()  # which writes what the store lacks
        cold[2] = engine.complete(prompt(2), 12).text
        for fault in ("hang=yes&fault_verbs=get", "latency=2s&fault_bandwidth=1MB"):
            faulty = f"faulty+{store}&write=never&fault_{fault}"
            keeper = keeper_process("--tier", faulty, memory="256MiB", socket=keeper.socket)
            losses += 1
            wait_until(attached, 60)
            wait_until(lambda keeper=keeper: keeper.figures()["tiers"][0]["latency_s"] is not None, 30)
            *counted, waited = asked(1)
            if "hang" in fault:
                assert counted == [0, 1, 1, 0]
                assert patience["load_wait"] <= waited < patience["load_wait"] + 10.0
                shown = keeper.figures()
                assert (shown["tiers"][0]["found"], shown["tiers"][0]["hits"]) == (3, 0)
                assert shown["namespaces"][0]["hit_chunks"] == 0 < shown["namespaces"][0]["asked_chunks"]
            else:
                assert [*counted, waited, *asked(2)] == [0] * 10
            keeper.close()


def test_spans_of_the_keeper_join_the_engines(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """A request with a traceparent: one trace, with the engine's span and the keeper's under its caller."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'kvkeep[otel]'")
    environ = {**SMALL, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with collecting() as collector:
        keeper = keeper_process("--traces", collector.url, memory="256MiB")
        args = [*ARGS, "--otlp-traces-endpoint", collector.url, *connector_args(socket=keeper.socket)]
        with VllmServer(tiny_model, args, log=tmp_path / "engine.log", environ=environ) as engine:
            engine.complete(prompt(1), 2)  # without a trace
            engine.reset_local_cache()
            body = {"model": "model", "prompt": prompt(1), "max_tokens": 2}
            headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
            asked = {"json": body, "headers": headers, "timeout": 120.0}
            httpx.post(f"{engine.url}/v1/completions", **asked).raise_for_status()
            assert engine.metric("vllm:kvkeep_loaded_tokens_total") == HIT
            wait_until(lambda: len(collector.of(TRACE)) >= 3, 60)  # they are sent every few seconds
        spans = {span.name: span for span in collector.of(TRACE)}
    assert sorted(spans) == ["kvkeep.load", "kvkeep.lookup", "llm_request"]
    assert {span.parent_span_id.hex() for span in spans.values()} == {CALLER}
    assert {span.trace_state for span in spans.values()} == {"vendor=1"}
    whole, lookup = spans["llm_request"], spans["kvkeep.lookup"]
    assert whole.start_time_unix_nano <= lookup.start_time_unix_nano
    assert lookup.end_time_unix_nano <= whole.end_time_unix_nano


def is_measured(engine: VllmServer, capsys: pytest.CaptureFixture[str]) -> None:
    """`kvkeep bench serve` on a real server: what the server counts is what was asked for."""
    options = ["--scale", "0.02", "--requests", "9", "--rate", "20", "--ignore-eos", "--json"]
    assert main(["bench", "serve", "multi_round", "--url", engine.url, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    counts = [found[name] for name in ("requests", "errors", "short_answers", "output_tokens")]
    assert counts == [9, 0, 0, 9 * 8]
    assert found["lengths_by"] == "tokenize"
    first, round_growth = 64 + 8, 8 + 8  # system prompt and question; then an answer and a question
    assert found["prompt_tokens"] == pytest.approx(3 * (3 * first + 3 * round_growth), rel=0.15)
    assert found["latency_s"]["mean"] >= found["ttft_s"]["mean"] > 0  # all tokens may come in one event


def test_a_private_keeper_lives_and_ends_with_its_engine(
    tiny_model: Path,
    tmp_path: Path,
    short_dir: Path,
    wait_until: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {**SMALL, "XDG_RUNTIME_DIR": str(short_dir)}
    args = [*ARGS, *connector_args(memory="128MiB")]
    with VllmServer(tiny_model, args, log=tmp_path / "engine.log", environ=environ) as engine:
        first = engine.complete(prompt(5), 8).text
        engine.reset_local_cache()
        assert engine.complete(prompt(5), 8).text == first
        assert engine.metric("vllm:kvkeep_loaded_tokens_total") == HIT
        assert len(list((short_dir / "kvkeep").glob("*.sock"))) == 1
        is_measured(engine, capsys)
    # It was not killed with the engine's processes: it ends by itself, and leaves no socket and no lock.
    wait_until(lambda: not any((short_dir / "kvkeep").iterdir()), 30)


def test_a_wrong_option_stops_the_start(tiny_model: Path, tmp_path: Path) -> None:
    from kvbench.engine import EngineFailed

    with (
        pytest.raises(EngineFailed),
        VllmServer(
            tiny_model, [*ARGS, *connector_args(chunk_tokens=48)], log=tmp_path / "log", environ=SMALL
        ),
    ):
        pass
    assert "no multiple of the engine's block size 32" in (tmp_path / "log").read_text()
