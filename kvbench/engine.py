"""A real vLLM server as a child process, and what a client measures on it.

For the demo, the benchmarks and the tests. The engine listens on loopback and ends with the
`with` block, however that is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import httpx

from kvkeep.config import child_environment
from kvkeep.errors import KVKeepError

__all__ = ["Answer", "EngineFailed", "VllmServer", "connector_args", "fastest_dtype"]

_START_DEADLINE = 240.0
_STOP_DEADLINE, _KILL_DEADLINE = 20.0, 5.0
_CPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for POST /reset_prefix_cache
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
}


class EngineFailed(KVKeepError):
    """The engine did not start or did not answer; the message ends with its log's last lines."""


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


def connector_args(**options: Any) -> list[str]:
    """vLLM's flag that switches kvkeep on, with options of `EngineConfig`."""
    transfer = {
        "kv_connector": "KVKeepConnector",
        "kv_connector_module_path": "kvkeep.engines.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
    }
    return ["--kv-transfer-config", json.dumps(transfer)]


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` on a free loopback port."""

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.model = str(model)
        self.log = log
        self._args = list(args)
        self._environ = {**_CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "2", **(environ or {})}
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self._client = httpx.Client(base_url=self.url, timeout=600.0)

    def __enter__(self) -> VllmServer:
        command = [self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", "model"]
        command += ["--enforce-eager", *self._args]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(self._environ),
                start_new_session=True,
            )
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pids(self) -> list[int]:
        """Process ids of the server and its descendants, without Python's resource tracker."""
        assert self._process is not None
        found = [self._process.pid, *_descendants(self._process.pid)]
        return [pid for pid in found if not _is_tracker(pid)]

    def stop(self) -> None:
        """End the engine and all its processes: asked first, killed after a while.

        Python's resource tracker is left to end by itself: when the others are gone it removes what
        they have left in /dev/shm.
        """
        self._client.close()
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        if not _ended(process.pid, _STOP_DEADLINE):
            for pid in _members(process.pid):
                if not _is_tracker(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if not _ended(process.pid, _KILL_DEADLINE):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)

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
        usage: dict[str, Any] = {}
        began, first, text = time.perf_counter(), 0.0, []
        with self._client.stream("POST", path, json=request) as response:
            if response.status_code != httpx.codes.OK:
                raise EngineFailed(f"the engine answered {response.status_code}: {response.read()[:500]!r}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    delta = choice.get("text") or choice.get("delta", {}).get("content")
                    if delta:
                        first = first or time.perf_counter()
                        text.append(delta)
        done = time.perf_counter()
        if not usage:
            raise EngineFailed(f"the engine broke off an answer; {self._tail()}")
        return Answer(
            "".join(text),
            (first or done) - began,
            done - began,
            int(usage["prompt_tokens"]),
            int(usage["completion_tokens"]),
        )

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_DEADLINE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineFailed(
                    f"vLLM ended at start with status {self._process.returncode}; {self._tail()}"
                )
            with contextlib.suppress(httpx.HTTPError):
                if self._client.get("/health", timeout=2.0).status_code == httpx.codes.OK:
                    return
            time.sleep(0.25)
        raise EngineFailed(f"vLLM was not ready within {_START_DEADLINE:g} s; {self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "its log ends with:\n" + "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _members(group: int) -> list[int]:
    """Processes of a process group that still run. An engine's group is its own: nobody else is in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(folder.name))
    return found


def _ended(group: int, seconds: float) -> bool:
    """Wait until nobody of a process group runs any more; False if that takes longer."""
    deadline = time.monotonic() + seconds
    while _members(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
