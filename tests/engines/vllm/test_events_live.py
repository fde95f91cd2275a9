"""KV events of a real engine, over its ZMQ publisher: stored, moved below, evicted, cleared, wiped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import zmq

from kvbench.engine import VllmServer, connector_args
from tests.cores import engine_cores
from tests.engines.vllm.consumer import Consumer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

BLOCK, CHUNK = 32, 64
ARGS = ["--dtype", "float32", "--max-model-len", "4096", "--block-size", str(BLOCK)]


def prompt(seed: int, length: int = 700) -> list[int]:
    return [3 + (seed * 7919 + i * (seed + 3) * 31) % 4000 for i in range(length)]


class Subscriber:
    """A subscriber of one engine; checks that no message is lost."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self._socket.connect(endpoint)
        self.consumer = Consumer(BLOCK)
        self.last = -1

    def read(self) -> int:
        """All that has come so far; returns how many messages that were."""
        count = 0
        while self._socket.poll(50):
            topic, number, payload = self._socket.recv_multipart()
            assert topic == b"kv@here@tiny"
            sequence = int.from_bytes(number, "big")
            assert self.last in (-1, sequence - 1)
            self.last = sequence
            self.consumer.read(payload)
            count += 1
        return count

    def close(self) -> None:
        self._socket.close(linger=0)


def test_a_subscriber_knows_what_the_engine_can_load(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    keeper = keeper_process("--tier", f"fs://{tmp_path}/tier?capacity=1GiB", memory="16MiB")
    endpoint = f"ipc://{keeper_process.directory()}/events"
    publisher = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    args = [*ARGS, "--kv-events-config", json.dumps({**publisher, "topic": "kv@here@tiny"})]
    args += connector_args(socket=keeper.socket, chunk_tokens=CHUNK)
    subscriber = Subscriber(endpoint)
    consumer = subscriber.consumer
    with VllmServer(
        tiny_model,
        args,
        log=tmp_path / "engine.log",
        environ={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": engine_cores()},
    ) as engine:
        seeds = iter(range(1000, 2000))

        def heard() -> int:
            engine.complete(prompt(next(seeds), 40), 1)  # shorter than a chunk: a step, and no more
            return subscriber.read()

        def is_held(seed: int, medium: str, tokens: int = 640, step: Callable[[], int] = heard) -> None:
            """Sooner or later consumers know; each look lets the engine step, unless `step` does not."""

            def known() -> bool:
                step()
                return bool(consumer.prefix(prompt(seed), medium) == tokens)

            wait_until(known, 30)

        wait_until(heard, 30)
        expected = engine.complete(prompt(1), 4).text
        is_held(1, "CPU", step=subscriber.read)  # without any further request
        stored = [
            event for event in consumer.events if getattr(event, "token_ids", None) and event.medium == "CPU"
        ]
        assert {len(event.block_hashes) for event in stored} == {CHUNK // BLOCK}
        assert set(consumer.held["CPU", 0]) <= set(consumer.held["GPU", 0])  # one block, one name

        is_held(1, "STORAGE")
        for seed in range(2, 10):  # 22 MiB more
            engine.complete(prompt(seed), 1)
        is_held(9, "CPU")
        is_held(1, "CPU", 0)
        assert consumer.prefix(prompt(1), "STORAGE") == 640

        engine.reset_local_cache()
        is_held(9, "GPU", 0)
        is_held(9, "CPU")
        assert engine.complete(prompt(1), 4).text == expected  # from below, and so into memory again
        is_held(1, "CPU")

        connection = keeper.connect()
        connection.clear()
        wait_until(lambda: heard() and not consumer.held.get(("CPU", 0)), 10)
        assert consumer.prefix(prompt(1), "STORAGE") == 640
        engine.reset_local_cache(external=True)

        def nothing() -> bool:
            heard()
            return not any(held for (medium, _), held in consumer.held.items() if medium != "GPU")

        wait_until(nothing, 30)
        assert engine.metric("vllm:kvkeep_errors_total") == 0
    subscriber.close()
