"""Dynamo's own KV indexer, from its public package, on our events: it finds what we hold, medium by medium.

Where KVKEEP_DYNAMO_PYTHON names the Python of an environment with `ai-dynamo-runtime`: it installs nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

pytest.importorskip("vllm")

from vllm.distributed.kv_events import BlockStored, KVEventBatch

from kvbench.compare.engines import http_server
from kvbench.process import free_port
from tests.engines.vllm.test_events import BLOCK, Engine, words

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds


class Indexer:
    """The indexer, and an engine's publisher to which it listens."""

    def __init__(self, url: str, publisher: zmq.Socket[bytes]) -> None:
        self._url, self._publisher, self._sequence = url, publisher, 0

    def hear(self, events: list[Any]) -> None:
        """One message, as vLLM's publisher sends it."""
        payload = msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=events, data_parallel_rank=0))
        self._publisher.send_multipart((b"", self._sequence.to_bytes(8, "big"), payload))
        self._sequence += 1

    def held(self, tokens: list[int]) -> tuple[int, int, int]:
        """Leading tokens that it finds in GPU, memory, disk: each with what lies before it."""
        body = {"model_name": "m", "token_ids": tokens}
        answer = httpx.post(f"{self._url}/query", json=body, trust_env=False).raise_for_status().json()
        found = answer["instances"].get("7", {"gpu": 0, "cpu": 0, "disk": 0})
        return found["gpu"], found["cpu"], found["disk"]

    def active(self) -> bool:
        (worker,) = httpx.get(f"{self._url}/workers", trust_env=False).json()
        return worker["status"] == "active"


@pytest.fixture
def indexer(tmp_path: Path, wait_until: Callable[..., None]) -> Iterator[Indexer]:
    python = os.environ.get("KVKEEP_DYNAMO_PYTHON")
    if python is None:
        pytest.skip("needs KVKEEP_DYNAMO_PYTHON, a Python that has ai-dynamo-runtime")
    assert subprocess.run([python, "-c", "import dynamo.indexer"], check=False).returncode == 0
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.setsockopt(zmq.LINGER, 0)
        events, port = publisher.bind_to_random_port("tcp://127.0.0.1"), free_port()
        url = f"http://127.0.0.1:{port}"
        command = [python, "-m", "dynamo.indexer", "--port", str(port), "--threads", "1"]
        command += ["--block-size", str(BLOCK), "--model-name", "m"]
        command += ["--workers", f"7=tcp://127.0.0.1:{events}"]
        with http_server(command, f"{url}/health", "the indexer", tmp_path / "log", {}, 30.0):
            one = Indexer(url, publisher)
            wait_until(one.active)
            probe = words(BLOCK, 99)
            stored = BlockStored([1], None, probe, BLOCK, None, "GPU", None)
            wait_until(lambda: one.hear([stored]) or one.held(probe)[0])  # its subscription has arrived
            yield one


def test_it_finds_what_is_held(
    indexer: Indexer, keeper_process: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    keeper = keeper_process("--tier", f"fs://{keeper_process.directory()}?capacity=64MiB&write=through")
    engine, prompt = Engine(keeper), words(100)
    assert indexer.held(prompt) == (0, 0, 0)
    engine.save(prompt)
    wait_until(lambda: keeper.figures()["tiers"][0]["stored"] == 3)

    def told(found: tuple[int, int, int], tokens: list[int] = prompt) -> None:
        def holds() -> bool:
            indexer.hear(engine.step())
            return indexer.held(tokens) == found

        wait_until(holds)

    told((0, 96, 96))
    # The engine's own blocks, under the hashes that ours have: what lies below goes on behind them.
    own = [int.from_bytes(name, "big") % 2**64 for name in engine.request(prompt).request.block_hashes]
    indexer.hear([BlockStored(own[:2], None, prompt[: 2 * BLOCK], BLOCK, None, "GPU", None)])
    told((32, 96, 96))
    assert indexer.held([*prompt[:48], *words(50, 2)]) == (32, 48, 48)
    # What memory forgets is taken back; what lies below it stays.
    engine.link.clear()
    told((32, 32, 96))


def test_a_salt_counts_for_as_much_as_in_the_engines_own(
    indexer: Indexer, keeper_process: Callable[..., Any]
) -> None:
    """vLLM 0.32 puts it among a block's extra keys, at which this indexer (1.6.1) does not look: it names a
    worker that holds another tenant's blocks of equal text, of which that worker serves nothing."""
    engine, ours, own = Engine(keeper_process()), words(32, 3), words(32, 4)
    engine.save(ours, cache_salt="tenant")
    (stored,) = engine.step()
    indexer.hear([stored])
    names, extra = [7, 8], stored.extra_keys
    indexer.hear([BlockStored(names, None, own, BLOCK, None, "GPU", None, extra_keys=extra)])
    assert indexer.held(own)[0] == indexer.held(ours)[1]
