"""The command itself, in front of engines in processes of their own; some are killed."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvroute import backends
from kvroute.options import Options, parse_place
from kvroute.server import Router
from kvroute.snapshot import read

ROOT = Path(__file__).parents[2]


class Processes:
    """Engines and routers that a test started; all of them end with it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._all = folder, list[subprocess.Popen[str]]()

    def _start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, text=True, **more)
        self._all.append(process)
        return process

    def engine(self, *options: str) -> tuple[subprocess.Popen[str], str]:
        """One engine and its URL."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = self._start("benchmarks.stand_in", *options, **pipes)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())[0]["url"]

    def router(self, *options: str) -> tuple[subprocess.Popen[str], str]:
        """A router, once it serves, and its URL."""
        self.log = self._folder / "log"
        with self.log.open("w") as file:
            words = ("kvkeep.cli", "route", "--listen", "127.0.0.1:0", "--check-interval", "0.1", *options)
            process = self._start(*words, stderr=file)
        deadline = time.monotonic() + 20
        while not (found := re.search(r"routing at (http://\S+)", self.log.read_text())):
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return process, found[1]

    def close(self) -> None:
        for process in self._all:
            if process.poll() is None:
                process.kill()
            process.wait(20)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    some = Processes(tmp_path)
    yield some
    some.close()


BODY = {"model": "stand-in", "prompt": "a b c", "max_tokens": 20, "stream": True}


async def stream(client: aiohttp.ClientSession, url: str, started: Callable[[], None]) -> bytes:
    """All bytes of a streamed answer, with how it ended."""
    received = b""
    try:
        async with client.post(f"{url}/v1/completions", json=BODY) as answer:
            assert answer.status == 200
            async for chunk in answer.content.iter_any():
                received += chunk
                started()
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError):
        return received + b"(cut)"
    return received


def test_an_engine_that_is_killed_takes_only_its_own_streams_with_it(processes: Processes) -> None:
    engines = [processes.engine("--itl", "0.02") for _ in range(2)]
    words = [word for _, url in engines for word in ("--backend", url)]
    _, url = processes.router("--policy", "round-robin", *words)

    async def play() -> None:
        async with aiohttp.ClientSession() as client:
            begun = asyncio.Semaphore(0)
            streams = [asyncio.create_task(stream(client, url, begun.release)) for _ in range(6)]
            for _ in range(6):
                await begun.acquire()
            os.kill(engines[0][0].pid, signal.SIGKILL)
            killed = time.monotonic()
            ends = [await one for one in streams]
            broken = [end for end in ends if end.endswith(b"(cut)")]
            assert len(broken) == 3
            assert all(b"broke off" in end and b"[DONE]" not in end for end in broken)
            assert all(
                end.endswith(b"data: [DONE]\n\n") and end.count(b" w") == 20
                for end in ends
                if end not in broken
            )
            assert time.monotonic() - killed < 10
            # From now on nobody notices.
            for _ in range(4):
                assert (await stream(client, url, lambda: None)).endswith(b"data: [DONE]\n\n")

    asyncio.run(play())
    assert "is down" in processes.log.read_text()


def test_a_router_that_is_killed_ends_what_it_had_and_another_takes_its_place(processes: Processes) -> None:
    _, engine = processes.engine("--itl", "0.2")
    router, url = processes.router("--backend", engine)

    async def killed() -> None:
        async with aiohttp.ClientSession() as client:
            begun = asyncio.Semaphore(0)
            streams = [asyncio.create_task(stream(client, url, begun.release)) for _ in range(3)]
            for _ in range(3):
                await begun.acquire()
            router.kill()
            ends = await asyncio.wait_for(asyncio.gather(*streams), 20)
            assert all(end.endswith(b"(cut)") and b"[DONE]" not in end for end in ends)
            for _ in range(500):
                async with client.get(f"{engine}/stats") as answer:
                    if (await answer.json())["aborted"] == 3:
                        return
                await asyncio.sleep(0.02)
            raise AssertionError("the engine goes on for nobody")

    async def served(url: str) -> None:
        async with aiohttp.ClientSession() as client:
            assert (await stream(client, url, lambda: None)).endswith(b"data: [DONE]\n\n")

    asyncio.run(killed())
    _, again = processes.router("--backend", engine, "--listen", url.removeprefix("http://"))
    assert again == url
    asyncio.run(served(again))


def test_an_engine_that_falls_silent_is_given_up(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host hangs, or its link is cut: nothing is refused, nothing comes."""
    monkeypatch.setattr(backends, "_CHECK_WAIT", 0.2)
    monkeypatch.setattr(backends, "_SILENCE", 0.5)
    engines = [processes.engine("--itl", "0.05", "--prefill-rate", rate) for rate in ("3", "1e9")]

    async def play() -> None:
        places = tuple(parse_place(url) for _, url in engines)
        options = Options(places, listen="127.0.0.1:0", policy="round-robin", check_interval=0.1)
        router = Router(options)
        await router.start()
        url = f"http://127.0.0.1:{router.port}"
        try:
            async with aiohttp.ClientSession() as client:
                begun = [asyncio.Event() for _ in range(3)]
                first = asyncio.create_task(stream(client, url, begun[0].set))
                await begun[0].wait()  # after a second, since a, b and c are prefilled
                second = asyncio.create_task(stream(client, url, begun[1].set))
                await begun[1].wait()
                third = asyncio.create_task(stream(client, url, begun[2].set))  # a second, in which it waits
                await asyncio.sleep(0.1)
                os.kill(engines[0][0].pid, signal.SIGSTOP)
                stopped = time.monotonic()
                end = await first
                assert end.endswith(b"(cut)")
                assert b"broke off" in end
                assert (await second).endswith(b"data: [DONE]\n\n")
                assert (await third).endswith(b"data: [DONE]\n\n")  # from the other engine
                assert time.monotonic() - stopped < 10
                assert (router.figures.cut, router.figures.retries) == (1, 1)
        finally:
            os.kill(engines[0][0].pid, signal.SIGCONT)
            await router.close()

    asyncio.run(play())


def test_an_engine_that_was_started_again_is_used_again(
    processes: Processes, wait_until: Callable[[Callable[[], object]], None]
) -> None:
    first, url_of_engine = processes.engine()
    _, url = processes.router("--backend", url_of_engine, "--log-interval", "0.1")

    async def status(client: aiohttp.ClientSession) -> int:
        async with client.post(f"{url}/v1/completions", json=BODY) as answer:
            await answer.read()
            return answer.status

    async def play() -> None:
        async with aiohttp.ClientSession() as client:
            assert await status(client) == 200
            first.kill()
            first.wait(20)
            assert await status(client) in (502, 503)
            processes.engine("--port", url_of_engine.rpartition(":")[2])
            for _ in range(500):
                if await status(client) == 200:
                    return
                await asyncio.sleep(0.02)
            raise AssertionError(processes.log.read_text())

    asyncio.run(play())
    wait_until(lambda: re.search(r"requests/s, \d+ running, 1 of 1 engines up", processes.log.read_text()))


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones(
    processes: Processes, tmp_path: Path
) -> None:
    _, engine = processes.engine("--itl", "0.05")
    router, url = processes.router("--backend", engine, "--index", str(tmp_path / "index"))

    async def play() -> None:
        async with aiohttp.ClientSession() as client:
            begun = asyncio.Event()
            running = asyncio.create_task(stream(client, url, begun.set))
            await begun.wait()
            router.send_signal(signal.SIGTERM)
            for _ in range(500):
                async with client.get(f"{url}/health") as answer:
                    if answer.status == 503:
                        break
            else:
                raise AssertionError("still healthy")
            async with client.post(f"{url}/v1/completions", json=BODY) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
            assert (await running).endswith(b"data: [DONE]\n\n")

    asyncio.run(play())
    assert router.wait(20) == 0
    read((tmp_path / "index").read_bytes())


@pytest.mark.parametrize(("options", "signals"), [(["--drain", "0.2"], 1), ([], 2)])
def test_the_end_is_not_put_off_for_ever(
    processes: Processes, options: list[str], signals: int, tmp_path: Path
) -> None:
    _, engine = processes.engine("--itl", "60")
    router, url = processes.router("--backend", engine, "--index", str(tmp_path / "index"), *options)

    async def play() -> None:
        async with aiohttp.ClientSession() as client:
            begun = asyncio.Event()
            running = asyncio.create_task(stream(client, url, begun.set))
            await begun.wait()
            for _ in range(signals):
                router.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
            assert (await running).endswith(b"(cut)")

    asyncio.run(play())
    assert router.wait(20) == 0
    read((tmp_path / "index").read_bytes())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no engine to route to"),
        (["--backend", "nonsense"], "no place of engines"),
        (["--backend", "http://127.0.0.1:1", "--listen", "0.0.0.0:0"], "--api-keys"),
        (["--backend", "http://127.0.0.1:1", "--api-keys", "/nowhere"], "cannot read"),
        (["--backend", "http://127.0.0.1:1", "--listen", "127.0.0.1:TAKEN"], "cannot listen on"),
        (["--backend", "k8s://vllm:http"], "--kubernetes-api"),
        (["--backend", "http://127.0.0.1:1", "--events-listen", "nowhere"], "cannot listen for events"),
        (["--backend", "http://127.0.0.1:1", "--events-listen", "tcp://*:0"], "--events-open"),
    ],
)
def test_what_cannot_start_says_why(options: list[str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [word.replace("TAKEN", str(taken.getsockname()[1])) for word in options]
        words = [sys.executable, "-m", "kvkeep.cli", "route", *options]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["zmq", "aiohttp"])
def test_what_is_not_installed_is_named(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from kvkeep.cli.main import main; main(['route'])"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert f"route needs the module {missing}: pip install 'kvkeep[route]'" in done.stderr
