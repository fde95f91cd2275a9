"""One engine prefills, another decodes, on one host: answers are those of one engine, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbench.engine import VllmServer, connector_args
from kvroute.options import Options, parse_place
from kvroute.server import Router

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

BLOCK, CHUNK = 32, 64
ARGS = [
    "--dtype",
    "float32",
    "--max-model-len",
    "4096",
    "--block-size",
    str(BLOCK),
    "--max-num-batched-tokens",
    "256",
]
ANSWER = 12
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
TO_DECODE = {"do_remote_decode": False, "do_remote_prefill": True}
ORCHESTRATED = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))


def prompt(seed: int, length: int = 700) -> list[int]:
    return [3 + (seed * 7919 + i * (seed + 3) * 31) % 4000 for i in range(length)]


def arguments(role: str, socket: str) -> list[str]:
    return [*ARGS, *connector_args(role, socket=socket, chunk_tokens=CHUNK, remote_wait=20.0)]


class Couple:
    """A prefill and a decode engine, and what a proxy before them does."""

    def __init__(self, prefill: VllmServer, decode: VllmServer) -> None:
        self.prefill, self.decode = prefill, decode

    def alone(self, tokens: list[int]) -> str:
        """As one engine answers that has nothing from anywhere."""
        return self.decode.complete(tokens, ANSWER, cache_salt="alone").text

    def prefilled(self, tokens: list[int], **params: Any) -> dict[str, Any]:
        """The prefill engine's answer to a proxy."""
        body = {"model": "model", "prompt": tokens, "temperature": 0, "max_tokens": 1, "stream": False}
        body["kv_transfer_params"] = TO_PREFILL | params
        response = httpx.post(f"{self.prefill.url}/v1/completions", json=body, timeout=120.0)
        response.raise_for_status()
        return response.json()

    def decoded(self, tokens: list[int], params: dict[str, Any]) -> tuple[str, int]:
        """The decode engine's answer, and how many tokens it loaded for it."""
        before = self.decode.metric("vllm:kvkeep_loaded_tokens_total")
        text = self.decode.complete(tokens, ANSWER, kv_transfer_params=params).text
        return text, int(self.decode.metric("vllm:kvkeep_loaded_tokens_total") - before)


def as_production_stack_does(couple: Couple) -> None:
    told = couple.prefilled(prompt(1), **ORCHESTRATED)["kv_transfer_params"]
    assert told["do_remote_prefill"] is True
    assert (told["remote_num_tokens"], told["remote_all"], told["remote_port"]) == (640, True, None)
    told["remote_host"] = "127.0.0.1"
    assert couple.decoded(prompt(1), told) == (couple.alone(prompt(1)), 640)


def as_llm_d_does(couple: Couple, clear: Callable[[], object]) -> None:
    expected = couple.alone(prompt(2))
    couple.prefilled(prompt(2))
    assert couple.decoded(prompt(2), TO_DECODE) == (expected, 640)
    # What the prefill engine has in its own cache, and the keeper not any more, is offered again.
    clear()
    couple.decode.reset_local_cache()
    couple.prefilled(prompt(2))
    assert couple.decoded(prompt(2), TO_DECODE) == (expected, 640)


def both_at_once(couple: Couple, pool: ThreadPoolExecutor) -> None:
    """The decode engine waits for what the other one is still computing, and computes nothing of it."""
    tokens = prompt(3, 1500)
    prefilled = pool.submit(couple.prefilled, tokens)
    text, loaded = couple.decoded(tokens, TO_DECODE)
    assert loaded == 1472
    assert prefilled.result()["kv_transfer_params"]["remote_num_tokens"] == 1472
    assert couple.decode.metric("vllm:kvkeep_remote_waits_total") >= 1
    assert text == couple.alone(tokens)


def through_a_router(couple: Couple) -> None:
    """`kvkeep route --at-once`: the same, asked by our own router."""
    tokens = prompt(8, 1500)
    waits = couple.decode.metric("vllm:kvkeep_remote_waits_total")
    loaded = couple.decode.metric("vllm:kvkeep_loaded_tokens_total")

    async def play() -> str:
        places = parse_place(couple.prefill.url, "prefill"), parse_place(couple.decode.url, "decode")
        router = Router(Options(places, listen="127.0.0.1:0", policy="round-robin", at_once=True))
        await router.start()
        try:
            body = {"model": "model", "prompt": tokens, "temperature": 0, "max_tokens": ANSWER}
            async with httpx.AsyncClient(timeout=120.0) as client:
                response = await client.post(f"{router.url}/v1/completions", json=body)
            assert router.figures.retries == router.figures.prefill_failed == 0
            return response.raise_for_status().json()["choices"][0]["text"]
        finally:
            await router.close()

    text = asyncio.run(play())
    assert couple.decode.metric("vllm:kvkeep_remote_waits_total") == waits + 1
    assert couple.decode.metric("vllm:kvkeep_loaded_tokens_total") == loaded + 1472
    assert text == couple.alone(tokens)


def a_keeper_that_dies(couple: Couple, keeper: Any, wait_until: Callable[..., None]) -> None:
    """While the decode engine waits for chunks of which none has come: it computes at once."""
    tokens = prompt(5, 1500)
    timeouts = couple.decode.metric("vllm:kvkeep_remote_timeouts_total")
    lookups = keeper.figures()["counters"]["lookups"]
    with ThreadPoolExecutor(1) as pool:
        decoded = pool.submit(couple.decoded, tokens, TO_DECODE)
        wait_until(lambda: keeper.figures()["counters"]["lookups"] > lookups, 60)
        assert not decoded.done()
        keeper.process.kill()
        text, loaded = decoded.result(120)
    assert loaded == 0
    assert couple.decode.metric("vllm:kvkeep_remote_timeouts_total") == timeouts
    assert text == couple.alone(tokens)


def a_decode_engine_that_dies(couple: Couple, keeper: Any, wait_until: Callable[..., None]) -> None:
    """In the middle of an answer: whoever reads it sees an error, the other engine and the keeper go on."""
    tokens = prompt(6)
    expected = couple.alone(tokens)
    body = {"model": "model", "prompt": tokens, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    body["kv_transfer_params"] = couple.prefilled(tokens)["kv_transfer_params"]
    sessions, read = keeper.figures()["sessions"], list[str]()

    def ask() -> None:
        with httpx.stream("POST", f"{couple.decode.url}/v1/completions", json=body, timeout=60.0) as answer:
            for text in answer.iter_text():
                if not read:
                    kill(couple.decode)
                read.append(text)

    with pytest.raises(httpx.TransportError):
        ask()
    assert read
    assert "[DONE]" not in "".join(read)
    wait_until(lambda: keeper.figures()["leases"] == keeper.figures()["reservations"] == 0, 20)
    wait_until(lambda: keeper.figures()["sessions"] == sessions - 1, 20)
    assert couple.prefilled(prompt(7))["kv_transfer_params"]["remote_num_tokens"] == 640
    couple.prefill.reset_local_cache()
    assert couple.prefill.complete(tokens, ANSWER).text == expected
    assert couple.prefill.metric("vllm:kvkeep_errors_total") == 0


def kill(engine: VllmServer) -> None:
    for pid in engine.pids:
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def couple_at(socket: str, model: Path, folder: Path) -> Iterator[Couple]:
    """Both engines on one keeper, a core each: threads of both on one would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    servers = [
        VllmServer(
            model,
            arguments(role, socket),
            log=folder / role,
            environ={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)},
        )
        for role, core in (("kv_producer", cores[0]), ("kv_consumer", cores[-1]))
    ]
    with servers[0] as prefill, servers[1] as decode:
        yield Couple(prefill, decode)


def test_one_prefills_and_one_decodes(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    keeper = keeper_process(memory="256MiB")
    with couple_at(keeper.socket, tiny_model, tmp_path) as couple, ThreadPoolExecutor(2) as pool:
        as_production_stack_does(couple)
        as_llm_d_does(couple, keeper.connect("clear").clear)
        both_at_once(couple, pool)
        through_a_router(couple)

        tokens = prompt(4, 3500)
        stored = keeper.figures()["counters"]["stored_chunks"]
        doomed = pool.submit(couple.prefilled, tokens)
        wait_until(lambda: keeper.figures()["counters"]["stored_chunks"] > stored + 8, 60)
        decoded = pool.submit(couple.decoded, tokens, TO_DECODE)
        wait_until(lambda: keeper.figures()["counters"]["stored_chunks"] > stored + 16, 60)
        kill(couple.prefill)
        assert doomed.exception(60) is not None
        text, loaded = decoded.result(120)
        assert 8 * CHUNK < loaded < 3456
        assert couple.decode.metric("vllm:kvkeep_remote_timeouts_total") == 1
        assert text == couple.alone(tokens)
        assert couple.decode.metric("vllm:kvkeep_errors_total") == 0
    wait_until(lambda: keeper.figures()["leases"] == keeper.figures()["reservations"] == 0, 20)


def test_the_keeper_or_the_decode_engine_dies(
    tiny_model: Path, keeper_process: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    keeper = keeper_process(memory="256MiB")
    with couple_at(keeper.socket, tiny_model, tmp_path) as couple:
        a_keeper_that_dies(couple, keeper, wait_until)
        keeper.process.wait(20)
        keeper = keeper_process(memory="256MiB", socket=keeper.socket)
        for engine in (couple.prefill, couple.decode):
            wait_until(lambda engine=engine: attached(engine), 60)
        a_decode_engine_that_dies(couple, keeper, wait_until)


def attached(engine: VllmServer) -> bool:
    """Whether it has found a keeper; it looks for one in its steps."""
    engine.complete([5, 6, 7], 1)
    return engine.metric("vllm:kvkeep_attached") == 1
