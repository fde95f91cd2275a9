"""Two engines that prefill and one that decodes, on two hosts with a keeper each, behind `kvkeep route`.

All parts are the real ones, in processes of their own: any can be killed and started again. The engines, and
the keepers, live in network namespaces; the router and its clients here, as on a third host.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from kvbench.compare.engines import http_server
from kvbench.engine import VllmServer, connector_args, cores_by_role
from kvbench.process import ServerProcess, free_port
from kvbench.servers import figures, keeper
from tests.hosts.network import Host
from tests.tiers.place import Proxy

__all__ = ["CHUNK", "Fleet", "Question", "Stream", "fleet_on"]

CHUNK = 64
ARGS = ["--dtype", "float32", "--max-model-len", "4096", "--block-size", "32"]
ARGS += ["--max-num-batched-tokens", "256"]
PEERS = 7440
SETTLED = 30.0  # seconds


class Question(NamedTuple):
    """A prompt of `length` tokens, and the length of its answer."""

    seed: int
    length: int
    answer: int

    @property
    def tokens(self) -> list[int]:
        return [3 + (self.seed * 7919 + i * (self.seed + 3) * 31) % 4000 for i in range(self.length)]

    @property
    def body(self) -> dict[str, Any]:
        """A request of which nothing is held anywhere, and whose answer has that length."""
        limits = {"temperature": 0, "max_tokens": self.answer, "ignore_eos": True}
        return {"model": "model", "prompt": self.tokens, "cache_salt": uuid.uuid4().hex, **limits}


class Stream:
    """One streamed answer, as a client reads it."""

    def __init__(self, question: Question, url: str, pool: ThreadPoolExecutor, limit: float) -> None:
        self.question, self.error, self.whole = question, "", False
        self._read = list[str]()
        self._ended: Future[None] = pool.submit(self._run, url, limit)

    @property
    def text(self) -> str:
        return "".join(self._read)

    def begun(self, tokens: int = 4) -> bool:
        """Whether so many tokens are here, or it is over."""
        return len(self._read) >= tokens or self._ended.done()

    def end(self, seconds: float) -> Stream:
        """Wait for its end. Raises TimeoutError."""
        self._ended.result(max(0.0, seconds))
        return self

    def _run(self, url: str, limit: float) -> None:
        body = self.question.body | {"stream": True}
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=limit) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    self.error = f"{answer.status_code} {answer.text}"
                for line in answer.iter_lines():
                    self._line(line)
        except httpx.TransportError as error:
            self.error = self.error or repr(error)

    def _line(self, line: str) -> None:
        if line == "data: [DONE]":
            self.whole = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            self.error = self.error or str(event.get("error", ""))
            self._read += [choice["text"] for choice in event.get("choices", ()) if choice["text"]]


class Fleet:
    """The parts, and their clients. Engines that prefill are on the host `near`, the other one on `far`."""

    def __init__(self, model: Path, folder: Path, place: Path, near: Host, far: Host) -> None:
        self.near, self.far, self._folder = near, far, folder
        self._sockets = {near: str(place / "near.sock"), far: str(place / "far.sock")}
        self._token = place / "token"
        self._token.write_text("0123456789abcdef0123456789abcdef")
        self._pool = ThreadPoolExecutor(16)
        self._answers: dict[Question, str] = {}
        self._way = Proxy((near.address, PEERS), far.store)
        self._keepers: dict[Host, ServerProcess] = {}
        self.shared = False
        self.prefills = [self._engine(model, "kv_producer", near, f"prefill{number}") for number in (0, 1)]
        self.decode = self._engine(model, "kv_consumer", far, "decode")
        self._router: ServerProcess | None = None
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def _engine(self, model: Path, role: str, host: Host, name: str) -> VllmServer:
        options = {"socket": self._sockets[host], "chunk_tokens": CHUNK, "remote_wait": 10.0, "timeout": 5.0}
        # Each kind on cores of its own: threads of several engines on one core wait for each other's steps.
        cores = cores_by_role(sorted(os.sched_getaffinity(0)))[role == "kv_consumer"]
        environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        environ["VLLM_HOST_IP"] = "127.0.0.1"
        args = [*ARGS, *connector_args(role, **options)]
        where: dict[str, Any] = {"host": host.address, "on": host.command()}
        return VllmServer(model, args, log=self._folder / name, environ=environ, **where)

    @property
    def engines(self) -> list[VllmServer]:
        return [*self.prefills, self.decode]

    def start(self, questions: Sequence[Question]) -> None:
        """All engines; what one of them answers alone, before there is any keeper."""
        list(self._pool.map(lambda engine: engine.__enter__(), self.engines))
        self._answers = {question: self._alone(question) for question in questions}

    def _alone(self, question: Question) -> str:
        answer = httpx.post(f"{self.decode.url}/v1/completions", json=question.body, timeout=120.0)
        text: str = answer.raise_for_status().json()["choices"][0]["text"]
        return text

    def share(self) -> None:
        """From now on one keeper for all, as on one host."""
        self._leave()
        Path(self._sockets[self.far]).symlink_to(self._sockets[self.near])
        self._keep(self.near)
        self.shared = True
        self._meet()

    def part(self) -> None:
        """From now on a keeper on each host, of which the far one reads the near one."""
        if self.shared:
            self._leave()
        self.mend()

    def _leave(self) -> None:
        for server in self._keepers.values():
            server.stop()
        self._keepers, self.shared = {}, False
        Path(self._sockets[self.far]).unlink(missing_ok=True)

    def _keep(self, host: Host) -> None:
        token, log = f"token_file={self._token}", self._folder / f"{host.name}.log"
        tiers = [f"peer://{host.store}:{self._way.port}?{token}&timeout=1s"] if host is self.far else []
        lends = ["--peers", f"{host.address}:{PEERS}?{token}&plain=yes"] if host is self.near else []
        server = keeper(self._sockets[host], "128MiB", tiers, log, drain_s=0, args=lends, on=host.command())
        self._keepers[host] = server.__enter__()

    def route(self, *options: str, prefills: int = 2) -> None:
        """A router for so many of the engines that prefill, in place of the last one."""
        if self._router is not None:
            self._router.stop()
        words = [sys.executable, "-m", "kvkeep.cli", "route", "--listen", f"127.0.0.1:{self._port}"]
        words += ["--policy", "round-robin", "--check-interval", "0.5", "--drain", "1", *options]
        words += [word for engine in self.prefills[:prefills] for word in ("--prefill", engine.url)]
        words += ["--decode", self.decode.url]
        server = http_server(words, f"{self.url}/health", "kvkeep route", self._folder / "router", {}, 60.0)
        self._router = server.__enter__()

    def mend(self) -> None:
        """Start what was killed, mend links, and wait until all parts have found each other."""
        for host in (self.near, self.far):
            host.restore()
            if (server := self._keepers.get(host)) is None or server.status is not None:
                self._keep(host)
        for engine in self.engines:
            if engine.status is not None:
                ServerProcess.stop(engine)
                engine.__enter__()
        if self._router is None or self._router.status is not None:
            self.route("--at-once")
        self._meet()
        until(lambda: self.figures(self.far)["tiers"][0]["available"])
        until(lambda: httpx.get(f"{self.url}/health").is_success)  # it has asked the engines again

    def _meet(self) -> None:
        for engine in self.engines:
            until(lambda engine=engine: _attached(engine))

    def kill(self, part: str) -> None:
        """kill -9 of one part, or a host's link cut, by its name."""
        if part.startswith("link"):
            (self.near if part.endswith("near") else self.far).cut()
            return
        servers: dict[str, ServerProcess | None] = {"decode": self.decode, "router": self._router}
        servers |= {"prefill": self.prefills[0], "near": self._keepers[self.near]}
        server = servers.get(part, self._keepers[self.far])
        assert server is not None
        for pid in server.pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: server.status is not None)

    def figures(self, host: Host) -> dict[str, Any]:
        """What a host's keeper says of itself."""
        return figures(self._sockets[host])

    def ask(self, questions: Sequence[Question], limit: float = 60.0) -> list[Stream]:
        """Ask the router all of them at once. `limit`: seconds without a byte."""
        return [Stream(question, self.url, self._pool, limit) for question in questions]

    def right(self, stream: Stream) -> bool:
        """Whether what came is what one engine alone answers, or where it broke off, its beginning."""
        expected = self._answers[stream.question]
        return stream.text == expected if stream.whole else expected.startswith(stream.text)

    def loaded(self) -> int:
        return int(self.decode.metric("vllm:kvkeep_loaded_tokens_total"))

    def settle(self) -> None:
        """Wait until nobody holds or writes anything."""
        for host in self._keepers:
            until(lambda host=host: not (self.figures(host)["leases"] or self.figures(host)["reservations"]))

    def stop(self) -> None:
        for host in (self.near, self.far):
            with contextlib.suppress(Exception):
                host.restore()
        for server in [self._router, *self.engines, *self._keepers.values()]:
            if server is not None:
                server.stop()
        self._way.close()
        self._pool.shutdown()


@contextlib.contextmanager
def fleet_on(
    network: list[Host], model: Path, folder: Path, questions: Sequence[Question]
) -> Iterator[Fleet]:
    """A fleet that is up on two hosts, without a keeper yet, and knows the answers to these questions."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as place:
        fleet = Fleet(model, folder, Path(place), *network)
        try:
            fleet.start(questions)
            yield fleet
        finally:
            fleet.stop()


def until(holds: Callable[[], object], seconds: float = SETTLED) -> None:
    """Poll until it holds; what asks a part that is just starting may fail meanwhile."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)


def _attached(engine: VllmServer) -> bool:
    engine.complete([5, 6, 7], 1)  # it looks for a keeper in its steps
    return engine.metric("vllm:kvkeep_attached") == 1
