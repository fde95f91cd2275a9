"""production-stack's router finds our index behind LMCache's names: by its own sequence of calls, and itself.

The router itself runs where KVKEEP_STACK_TESTS=1 and KVKEEP_STACK_SOURCE names `src` of its public repository
(an environment of its own is made, or KVKEEP_STACK_PYTHON names the Python of one that has what it needs).
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq

from benchmarks.publisher import publisher
from kvroute.events import Stored, pack
from kvroute.production_stack import (
    Controller,
    LookupMsg,
    LookupRetMsg,
    Options,
    QueryInstMsg,
    QueryInstRetMsg,
)

ROOT = Path(__file__).parents[2]
BLOCK = 16
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
REQUIRES = ROOT / "tests" / "kvroute" / "stack_requires.txt"


@dataclass
class Engine:
    """As the router's discovery lists it, with what it publishes."""

    host: str
    pub: zmq.Socket[bytes] | None = None
    model_names: list[str] = field(default_factory=lambda: ["llama"])
    sleep: bool = False
    sequence: int = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:8000"

    def holds(self, tokens: Sequence[int], medium: str = "GPU") -> None:
        """Announce the whole blocks of a prompt."""
        whole = len(tokens) - len(tokens) % BLOCK
        names = [hash((medium, tuple(tokens[: at + BLOCK]))) & (2**63 - 1) for at in range(0, whole, BLOCK)]
        event = Stored(names, None, list(tokens[:whole]), BLOCK, medium=medium)
        assert self.pub is not None
        self.pub.send_multipart(pack("", self.sequence, 0.0, [event]))
        self.sequence += 1


class Router:
    """Calls the controller as vllm_router/routers/routing_logic.py does (a6c01db): starts it on the loop of a
    thread, asks from its own, takes the first name, and learns names by asking for each engine's address."""

    threshold = 2000

    def __init__(self, engines: list[Engine], options: Options) -> None:
        urls = {"pull": "0.0.0.0:9000", "reply": None}
        self.engines = engines
        self.controller = Controller(
            lambda: self.engines, options, urls, health_check_interval=5, lmcache_worker_timeout=30
        )
        self._known: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._following = asyncio.run_coroutine_threadsafe(self.controller.start_all(), self._loop)

    def layout(self, tokens: list[int]) -> dict[str, tuple[str, int]]:
        answer = asyncio.run(
            self.controller.handle_orchestration_message(LookupMsg(tokens=tokens, event_id="e"))
        )
        assert isinstance(answer, LookupRetMsg)
        return answer.layout_info

    def route(self, tokens: list[int]) -> str | None:
        """Where a prompt goes; None: by session or load."""
        layout = self.layout(tokens)
        if not layout or next(iter(layout.values()))[1] < max(len(tokens) - self.threshold, 0):
            return None
        name = next(iter(layout))
        if name not in self._known:
            for engine in self.engines:
                query = QueryInstMsg(ip=engine.host, event_id="q")
                told = asyncio.run(self.controller.handle_orchestration_message(query))
                assert isinstance(told, QueryInstRetMsg)
                self._known[told.instance_id] = engine.url
        return self._known[name]

    def close(self) -> None:
        if self._loop.is_closed():
            return

        async def others() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

        self._following.cancel()
        asyncio.run_coroutine_threadsafe(others(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def fleet() -> Iterator[list[Engine]]:
    """Engines on hosts of their own, all publishing at one port."""
    context = zmq.Context()
    engines = [Engine(host, context.socket(zmq.PUB)) for host in HOSTS]
    port = engines[0].pub.bind_to_random_port(f"tcp://{HOSTS[0]}")  # type: ignore[union-attr]
    for engine in engines[1:]:
        engine.pub.bind(f"tcp://{engine.host}:{port}")  # type: ignore[union-attr]
    yield engines
    context.destroy(linger=0)


@pytest.fixture
def start(fleet: list[Engine]) -> Iterator[Callable[..., Router]]:
    """Start a router that follows the fleet; every engine's subscription is there when it returns."""
    routers: list[Router] = []

    def begin(engines: list[Engine] | None = None, **options: Any) -> Router:
        port = fleet[0].pub.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]  # type: ignore[union-attr]
        given = Options(**{"events_port": int(port), **options})
        routers.append(Router(fleet if engines is None else engines, given))
        return routers[-1]

    yield begin
    for router in routers:
        router.close()


def prompt(seed: int, length: int = 320) -> list[int]:
    return random.Random(seed).choices(range(32_000), k=length)


def until_held(
    router: Router, engine: Engine, tokens: list[int], wait: Callable[..., None], **more: Any
) -> None:
    """Announce until it has arrived: a subscription may not be there yet."""

    def arrived() -> bool:
        engine.holds(tokens, **more)
        return engine.host in router.layout(tokens)

    wait(arrived)


def test_a_prompt_goes_where_its_prefix_is_held(fleet, start, wait_until) -> None:
    router, documents = start(), [prompt(seed) for seed in range(3)]
    assert [router.route(document) for document in documents] == [None] * 3
    for engine, document in zip(fleet, documents, strict=True):
        until_held(router, engine, document, wait_until)
    for engine, document in zip(fleet, documents, strict=True):
        assert router.route([*document, *prompt(9, 50)]) == engine.url
    assert router.route(prompt(10)) is None
    assert router.layout(documents[0]) == {"127.0.0.1": ("gpu", 320)}


def test_the_longest_comes_first_and_the_slower_medium_counts_less(fleet, start, wait_until) -> None:
    router, document = start(), prompt(1)
    until_held(router, fleet[0], document[:176], wait_until)
    until_held(router, fleet[1], document, wait_until)
    until_held(router, fleet[2], document, wait_until, medium="STORAGE")
    assert list(router.layout(document).items()) == [
        ("127.0.0.2", ("gpu", 320)), ("127.0.0.1", ("gpu", 176)), ("127.0.0.3", ("storage", 320)),
    ]  # fmt: skip


def test_of_equals_each_is_first_in_turn(fleet, start, wait_until) -> None:
    router, document = start(), prompt(2)
    for engine in fleet:
        until_held(router, engine, document, wait_until)
    assert {router.route(document) for _ in range(6)} == {engine.url for engine in fleet}


def test_a_short_common_beginning_does_not_bind_a_prompt(fleet, start, wait_until) -> None:
    router, system = start(), prompt(3, 64)
    until_held(router, fleet[0], system, wait_until)
    assert router.route([*system, *prompt(4, 60)]) == fleet[0].url
    assert router.route([*system, *prompt(4, 80)]) is None


def test_engines_come_and_go(fleet, start, wait_until) -> None:
    router, document = start([fleet[0]]), prompt(5)
    until_held(router, fleet[0], document, wait_until)
    router.engines = [fleet[1]]
    assert router.layout(document) == {}, "at once, before its subscription has ended"
    until_held(router, fleet[1], document, wait_until)
    router.engines = [fleet[0], fleet[1]]
    assert list(router.layout(document)) == ["127.0.0.2"], "what it held is forgotten"
    fleet[1].sleep = True
    assert router.layout(document) == {}


def test_an_engine_that_is_down_is_not_named(fleet, start, wait_until) -> None:
    router, document = start(), prompt(11)
    for engine in fleet[:2]:
        until_held(router, engine, document, wait_until)
    address = fleet[0].pub.getsockopt_string(zmq.LAST_ENDPOINT)
    fleet[0].pub.close(0)
    wait_until(lambda: list(router.layout(document)) == ["127.0.0.2"])
    assert {router.route(document) for _ in range(4)} == {fleet[1].url}
    fleet[0].pub = zmq.Context.instance().socket(zmq.PUB)
    fleet[0].pub.bind(address)
    fleet[0].sequence = 0
    until_held(router, fleet[0], document, wait_until)
    fleet[0].pub.close(0)


def test_what_was_told_before_we_came_is_replayed(start, wait_until) -> None:
    with publisher() as told:
        engine, document = Engine("127.0.0.1"), prompt(6)
        told.publish(Stored([1], None, document[:BLOCK], BLOCK))
        events, replay = (int(address.rpartition(":")[2]) for address in (told.events, told.replay))
        router = start([engine], events_port=events, replay_port=replay)

        def arrived() -> bool:
            told.publish(Stored([2], None, prompt(7, BLOCK), BLOCK))
            told.serve()
            return "127.0.0.1" in router.layout(document[:BLOCK])

        wait_until(arrived)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fleet: fleet[1].model_names.append("lora"), "serve different models"),
        (lambda fleet: setattr(fleet[1], "host", "127.0.0.1"), "2 engines at 127.0.0.1"),
    ],
)
def test_where_the_router_could_be_misled_nobody_is_named(
    fleet, start, wait_until, caplog, change, said
) -> None:
    router, document = start([fleet[0]]), prompt(7)
    until_held(router, fleet[0], document, wait_until)
    change(fleet)
    router.engines = fleet[:2]
    assert [router.layout(document) for _ in range(3)] == [{}] * 3
    assert len([record for record in caplog.records if said in record.message]) == 1


def test_what_cannot_be_answered_names_nobody(fleet, start, wait_until) -> None:
    router, document = start(), prompt(8)
    until_held(router, fleet[0], document, wait_until)
    for tokens in ([], [-1] * 32, [2**40] * 32, ["word"] * 32):
        assert router.layout(tokens) == {}
    assert list(router.layout(document)) == ["127.0.0.1"]
    router.close()
    assert router.layout(document) == {}
    idle = Controller(lambda: fleet, Options(), {})
    message = LookupMsg(tokens=document, event_id="e")
    assert asyncio.run(idle.handle_orchestration_message(message)) == LookupRetMsg({}, "e")


def test_the_names_that_the_router_imports() -> None:
    code = """
from kvroute.production_stack import Options, install
install(list, Options())
import asyncio, importlib.util
from lmcache.v1.cache_controller import controller_manager
from lmcache.v1.cache_controller.message import LookupMsg, QueryInstMsg
assert importlib.util.find_spec("lmcache") is not None
urls = {"pull": "0.0.0.0:9000", "reply": None, "heartbeat": "0.0.0.0:9002"}
times = {"health_check_interval": 5, "lmcache_worker_timeout": 30}
manager = controller_manager.LMCacheControllerManager(urls, **times)
ask = manager.handle_orchestration_message
print(asyncio.run(ask(LookupMsg(tokens=[1], event_id="a"))).layout_info)
print(asyncio.run(ask(QueryInstMsg(ip="10.0.0.7", event_id="b"))).instance_id)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "{}\n10.0.0.7\n"), done.stderr


def test_without_the_router_it_says_so() -> None:
    command = [sys.executable, "-m", "kvroute.production_stack", "--kvkeep-events-port", "1", "--port", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no vllm_router here" in done.stderr
    assert "Traceback" not in done.stderr


# The router itself


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def stack_python(tmp_path: Path) -> str:
    """A Python that has what the router needs, and the router's source on its path."""
    source = os.environ.get("KVKEEP_STACK_SOURCE")
    if os.environ.get("KVKEEP_STACK_TESTS") != "1" or source is None:
        pytest.skip("needs KVKEEP_STACK_TESTS=1 and KVKEEP_STACK_SOURCE: it installs a hundred packages")
    given = os.environ.get("KVKEEP_STACK_PYTHON")
    if given is None:
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
        given = str(tmp_path / "venv" / "bin" / "python")
        install = [given, "-m", "pip", "install", "--quiet", "-r", str(REQUIRES), f"{ROOT}[route]"]
        subprocess.run(install, check=True, timeout=900)
    return given


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_router(stack_python: str, tmp_path: Path, wait_until) -> None:
    events, served, port = free_port(), free_port(), free_port()
    path = os.pathsep.join((os.environ["KVKEEP_STACK_SOURCE"], str(ROOT)))
    environ = {**os.environ, "PYTHONPATH": path}
    engine = str(Path(__file__).with_name("stack_engine.py"))
    urls = ",".join(f"http://{host}:{served}" for host in HOSTS)
    lines = [
        *([engine, host, str(served), str(events)] for host in HOSTS),
        ["-m", "kvroute.production_stack", "--kvkeep-events-port", str(events), "--host", "127.0.0.1",
         "--port", str(port), "--service-discovery", "static", "--static-backends", urls,
         "--static-models", "llama,llama,llama", "--routing-logic", "kvaware", "--session-key", "x-user"],
    ]  # fmt: skip
    processes = []
    try:
        for number, line in enumerate(lines):
            with (tmp_path / f"{number}.log").open("w") as log:
                processes.append(subprocess.Popen([stack_python, *line], env=environ, stdout=log, stderr=log))
        wait_until(lambda: answers(port), 60.0)
        follow(port, wait_until)
    except BaseException:
        print((tmp_path / "3.log").read_text()[-4000:])
        raise
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def answers(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    return False


def complete(port: int, text: str) -> tuple[str, int]:
    """Who answered, and how many of the prompt's words it held."""
    body = json.dumps({"model": "llama", "prompt": text, "max_tokens": 1}).encode()
    url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
        host, held = json.load(answer)["choices"][0]["text"].split()
    return host, int(held)


def follow(port: int, wait_until: Callable[..., None]) -> None:
    """Each document's questions go to the engine that has served it."""
    documents = [" ".join(f"w{document}-{word}" for word in range(480)) for document in range(6)]
    homes = dict[int, str]()
    for number, document in enumerate(documents):
        homes[number], _ = complete(port, document)
    assert len(set(homes.values())) > 1, "nothing was held, so the load decided"
    time.sleep(0.5)  # for events that are under way; what comes late is only a worse answer
    wait_until(lambda: complete(port, f"{documents[0]} ready?")[0] == homes[0])
    for question in range(30):
        number = question % len(documents)
        host, held = complete(port, f"{documents[number]} question {question}")
        assert (host, held) == (homes[number], 480)
