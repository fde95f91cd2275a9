"""A real vLLM server as a child process, and what a client measures on it.

For the demo, the benchmarks and the tests. The engine listens on loopback and ends with the
`with` block, however that is left.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from kvbench.load.stream import AnswerStream, StreamError
from kvbench.process import EngineFailed, ServerProcess, free_port, tail
from kvkeep.config import environment

__all__ = [
    "CPU_ENVIRONMENT",
    "OFFLOADING",
    "Answer",
    "EngineFailed",
    "VllmServer",
    "connector_args",
    "cores_by_role",
    "fastest_dtype",
    "lmcache_args",
    "offloading",
    "vllm_command",
]

CPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for POST /reset_prefix_cache
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
}


OFFLOADING = Path(__file__).parents[1] / "benchmarks" / "offloading"
"""What makes vLLM's own offloading run on a CPU; a source tree has it."""


class Answer(NamedTuple):
    """One streamed answer."""

    text: str
    ttft_s: float
    """From sending the request to the first token, in seconds."""
    latency_s: float
    prompt_tokens: int
    output_tokens: int


def fastest_dtype() -> str:
    """bfloat16 where the CPU computes it; elsewhere it is emulated, and float32 is 3× faster."""
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def cores_by_role(cores: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The cores of engines that prefill, and of those that decode: halves, or a single core for both."""
    half = max(1, len(cores) // 2)
    return cores[:half], cores[half:] or cores


def connector_args(role: str = "kv_both", **options: Any) -> list[str]:
    """vLLM's flag that switches kvkeep on in a `kv_role`, with options of `EngineConfig`."""
    return _transfer("KVKeepConnector", options, role, kv_connector_module_path="kvkeep.engines.vllm")


def lmcache_args(port: int) -> list[str]:
    """vLLM's flag that switches LMCache on, with its server on this port."""
    return _transfer("LMCacheMPConnector", {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port})


def offloading(memory: int) -> tuple[list[str], dict[str, str]]:
    """vLLM's flag that switches its own offloading on, to `memory` bytes of a CPU; and its environment."""
    options = {"spec_name": "CpuEngineOffloadingSpec", "spec_module_path": "cpu_offloading"}
    places = [str(OFFLOADING), *environment(["PYTHONPATH"]).values()]
    args = _transfer("OffloadingConnector", {**options, "cpu_bytes_to_use": memory})
    return args, {"PYTHONPATH": ":".join(places)}


def _transfer(connector: str, options: dict[str, Any], role: str = "kv_both", **more: str) -> list[str]:
    transfer = {"kv_connector": connector, **more, "kv_role": role, "kv_connector_extra_config": options}
    return ["--kv-transfer-config", json.dumps(transfer)]


def vllm_command(python: str, model: str, port: int, args: Sequence[str] = ()) -> list[str]:
    """vLLM's server on a loopback port, its model named `model`."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    return [*command, "--enforce-eager", *args]


class VllmServer(ServerProcess):
    """`python -m vllm.entrypoints.openai.api_server` on a free port of `host`; `on`: see `servers.keeper`."""

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
        host: str = "127.0.0.1",
        on: Sequence[str] = (),
    ) -> None:
        port = free_port()
        self.url = f"http://{host}:{port}"
        log.unlink(missing_ok=True)
        super().__init__(
            [*on, *vllm_command(python, str(model), port, [*args, "--host", host])],
            self._healthy,
            log=log,
            name="vLLM",
            environ={**CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "2", **(environ or {})},
        )
        self._client = httpx.Client(base_url=self.url, timeout=600.0)

    def stop(self) -> None:
        """End the engine and all its processes: asked first, killed after a while."""
        self._client.close()
        super().stop()

    def complete(self, prompt: str | list[int], max_tokens: int = 16, **params: Any) -> Answer:
        """One streamed, greedy completion."""
        return self._stream("/v1/completions", {"prompt": prompt}, max_tokens, params)

    def chat(self, text: str, max_tokens: int = 16, **params: Any) -> Answer:
        """One streamed, greedy answer to a user's message."""
        body = {"messages": [{"role": "user", "content": text}]}
        return self._stream("/v1/chat/completions", body, max_tokens, params)

    def reset_local_cache(self, external: bool = False) -> None:
        """Empty the engine's own prefix cache (and, if asked, kvkeep's share of it)."""
        query = {"reset_external": "true"} if external else {}
        self._client.post("/reset_prefix_cache", params=query).raise_for_status()

    def metric(self, name: str) -> float:
        """Sum over labels of one metric of /metrics; 0 if it is not there."""
        lines = self._client.get("/metrics").text.splitlines()
        values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith((name + "{", name + " "))]
        return sum(map(float, values))

    def _stream(self, path: str, body: dict[str, Any], max_tokens: int, params: dict[str, Any]) -> Answer:
        request = {"model": "model", "temperature": 0, "max_tokens": max_tokens, "stream": True}
        request |= {"stream_options": {"include_usage": True}, **body, **params}
        stream, began = AnswerStream(), time.perf_counter()
        with self._client.stream("POST", path, json=request) as response:
            if response.status_code != httpx.codes.OK:
                raise EngineFailed(f"the engine answered {response.status_code}: {response.read()[:500]!r}")
            try:
                for data in response.iter_bytes():
                    stream.feed(data, time.perf_counter())
                stream.finish()
            except StreamError as error:
                raise EngineFailed(f"{error}; {tail(self.log)}") from error
        first, last = stream.times[0] - began, time.perf_counter() - began
        return Answer(stream.text, first, last, stream.prompt_tokens, stream.output_tokens)

    def _healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get("/health", timeout=2.0).status_code == httpx.codes.OK
        return False
