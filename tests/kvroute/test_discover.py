"""Engines come and go: at a DNS name, and behind a service of a Kubernetes API that misbehaves."""

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from kvkeep.errors import ConfigError
from kvroute import discover
from kvroute.backends import Engine
from kvroute.options import Options, parse_place
from kvroute.subscribe import Source
from tests.kvroute.scene import played


class Reports:
    """What discovery has reported, and waits for more."""

    def __init__(self) -> None:
        self.all: list[list[Engine]] = []

    def __call__(self, engines: list[Engine]) -> None:
        self.all.append(engines)

    def names(self) -> list[str]:
        return [engine.name for engine in self.all[-1]] if self.all else []

    async def until(self, *names: str) -> None:
        await _until(lambda: self.all and self.names() == list(names), self.names)


async def _until(holds: Callable[[], object], what: Callable[[], object]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(what())


class Api:
    """A Kubernetes API with EndpointSlices of one service; each watch is sent what `change` says."""

    def __init__(self) -> None:
        self.slices: dict[str, dict] = {}
        self.version, self.lists, self.expired, self.down, self.closing = 1, 0, 0, False, False
        self.watches: list[asyncio.Queue[dict | None]] = []
        self.headers: list[str | None] = []
        self.queries: list[dict] = []

    def slice(self, name: str, *addresses: str, port: int = 8000, **conditions: bool | None) -> dict:
        return {
            "metadata": {"name": name, "resourceVersion": str(self.version)},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [one], "conditions": conditions} for one in addresses] or None,
            "ports": [{"name": "http", "port": port}, {"name": "metrics", "port": 9}],
        }

    def change(self, kind: str, one: dict) -> None:
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        name = one["metadata"]["name"]
        self.slices.pop(name, None) if kind == "DELETED" else self.slices.update({name: one})
        for queue in self.watches:
            queue.put_nowait({"type": kind, "object": one})

    def break_watches(self, last: dict | None = None) -> None:
        for queue in self.watches:
            if last:
                queue.put_nowait(last)
            queue.put_nowait(None)
        self.watches.clear()

    async def get(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers.get("Authorization"))
        self.queries.append(dict(request.query))
        if self.down or request.match_info["namespace"] != "models":
            raise web.HTTPForbidden
        if request.query.get("watch") != "true":
            self.lists += 1
            return web.json_response(
                {"metadata": {"resourceVersion": str(self.version)}, "items": list(self.slices.values())}
            )
        if self.expired:
            self.expired -= 1
            return web.Response(status=410)
        response = web.StreamResponse()
        await response.prepare(request)
        if self.closing:
            return response
        queue: asyncio.Queue[dict | None] = asyncio.Queue()
        self.watches.append(queue)
        while (event := await queue.get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response


async def watched(
    api: Api, account: Path, play: Callable[[Reports], Any], text: str = "k8s://vllm:http"
) -> None:
    app = web.Application()
    app.router.add_get("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", api.get)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    cluster = discover.Cluster(f"http://127.0.0.1:{runner.addresses[0][1]}", account)
    place = parse_place(text, "any", "tcp://{host}:5557", "tcp://{host}:5558")
    reports = Reports()
    task = asyncio.create_task(discover.watch_service(place, reports, cluster))
    try:
        await play(reports)
    finally:
        task.cancel()
        await runner.cleanup()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("models")
    return tmp_path


def test_endpoints_of_a_service(account: Path) -> None:
    api = Api()
    api.change("ADDED", api.slice("one", "10.0.0.2", "10.0.0.1"))

    async def play(reports: Reports) -> None:
        await reports.until("10.0.0.1:8000", "10.0.0.2:8000")
        assert reports.all[-1][0] == Engine(
            "10.0.0.1:8000",
            "http://10.0.0.1:8000",
            "any",
            Source("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558"),
        )
        await _until(lambda: api.watches, lambda: "no watch")
        assert api.queries[0] == {"labelSelector": "kubernetes.io/service-name=vllm"}
        assert api.queries[1]["resourceVersion"] == "2"
        api.change("ADDED", api.slice("two", "10.0.0.3", port=9000))
        await reports.until("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:9000")
        api.change("MODIFIED", api.slice("one", "10.0.0.1", ready=None))
        await reports.until("10.0.0.1:8000", "10.0.0.3:9000")
        api.change("MODIFIED", api.slice("one", "10.0.0.1", ready=False))
        await reports.until("10.0.0.3:9000")
        api.change("DELETED", api.slices["two"])
        await reports.until()
        api.change("MODIFIED", api.slice("one"))
        api.change("MODIFIED", api.slice("one", "10.0.0.9"))
        await reports.until("10.0.0.9:8000")
        assert api.lists == 1

    played(lambda: watched(api, account, play))


def test_a_service_with_addresses_of_both_kinds_has_each_engine_once(account: Path) -> None:
    api = Api()
    api.change("ADDED", api.slice("six", "fd00::1", "fd00::2") | {"addressType": "IPv6"})
    api.change("ADDED", api.slice("four", "10.0.0.1", "10.0.0.2"))

    async def play(reports: Reports) -> None:
        await reports.until("10.0.0.1:8000", "10.0.0.2:8000")
        await _until(lambda: api.watches, lambda: "no watch")
        api.change("DELETED", api.slices["four"])
        await reports.until("[fd00::1]:8000", "[fd00::2]:8000")

    played(lambda: watched(api, account, play))


def test_engines_of_one_node_share_its_keeper(account: Path) -> None:
    api = Api()
    one = api.slice("one", "10.0.0.1", "10.0.0.2", "10.0.0.3")
    for endpoint, node in zip(one["endpoints"], ("n1", "n2", None), strict=True):
        endpoint.update({"nodeName": node} if node else {})
    api.change("ADDED", one)

    async def play(reports: Reports) -> None:
        await _until(lambda: reports.all, lambda: "no report")
        assert [engine.source.node for engine in reports.all[-1] if engine.source] == ["n1", "n2", None]

    played(lambda: watched(api, account, play, "k8s://vllm:http,node={node}"))


def test_a_watch_that_ends_at_once_is_not_begun_anew_at_once(
    account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.Event().wait()

    api = Api()
    api.change("ADDED", api.slice("one", "10.0.0.1"))
    api.closing = True
    monkeypatch.setattr(discover, "asyncio", SimpleNamespace(sleep=pause, TimeoutError=asyncio.TimeoutError))

    async def play(reports: Reports) -> None:
        await reports.until("10.0.0.1:8000")
        await _until(lambda: pauses or len(api.queries) > 5, lambda: "no watch")
        assert (len(api.queries), pauses) == (2, [discover._RETRY_AFTER])

    played(lambda: watched(api, account, play))


@pytest.mark.parametrize(
    "last",
    [None, {"type": "ERROR", "object": {"code": 410}}, {"type": "ADDED", "object": 7}, {"unheard": "of"}],
)
def test_a_watch_that_breaks(account: Path, last: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "_RETRY_AFTER", 0.01)
    api = Api()
    api.change("ADDED", api.slice("one", "10.0.0.1"))

    async def play(reports: Reports) -> None:
        await reports.until("10.0.0.1:8000")
        await _until(lambda: api.watches, lambda: "no watch")
        api.expired = 1
        (account / "token").write_text("second")  # it is replaced while it is used
        api.break_watches(last)
        await _until(lambda: api.watches, lambda: "no watch")
        api.change("ADDED", api.slice("two", "10.0.0.2"))
        await reports.until("10.0.0.1:8000", "10.0.0.2:8000")
        assert (api.headers[0], api.headers[-1]) == ("Bearer first", "Bearer second")

    played(lambda: watched(api, account, play))


def test_an_api_that_is_away_changes_nothing(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "_RETRY_AFTER", 0.01)
    api = Api()
    api.change("ADDED", api.slice("one", "10.0.0.1"))

    async def play(reports: Reports) -> None:
        await reports.until("10.0.0.1:8000")
        await _until(lambda: api.watches, lambda: "no watch")
        api.down = True
        asked = len(api.queries)
        api.break_watches()
        await _until(lambda: len(api.queries) > asked + 5, lambda: "does not ask")
        assert reports.names() == ["10.0.0.1:8000"]
        api.down = False
        api.change("ADDED", api.slice("two", "10.0.0.2"))
        await reports.until("10.0.0.1:8000", "10.0.0.2:8000")

    played(lambda: watched(api, account, play))


def test_a_name_that_resolves_to_many(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [["10.0.0.2", "10.0.0.1", "10.0.0.2"], OSError("no such name"), ["::1"]]

    async def resolve(host: str, port: int, **more: object) -> list:
        assert (host, port) == ("engines.example", 8000)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in answer]

    async def play() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        place, reports = parse_place("dns://engines.example:8000"), Reports()
        task = asyncio.create_task(discover.watch_dns(place, reports, every=0.01))
        await reports.until("[::1]:8000")
        task.cancel()
        assert [[one.name for one in report] for report in reports.all] == [
            ["10.0.0.1:8000", "10.0.0.2:8000"],
            ["[::1]:8000"],
        ]
        assert reports.all[-1][0].url == "http://[::1]:8000"

    played(play)


def test_a_name_with_addresses_of_both_kinds_has_each_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    six, four = socket.AF_INET6, socket.AF_INET

    async def resolve(host: str, port: int, **more: object) -> list:
        found = [(six, "fd00::2"), (six, "fd00::1"), (four, "10.0.0.1"), (four, "10.0.0.2")]
        return [(kind, socket.SOCK_STREAM, 6, "", (one, port)) for kind, one in found]

    async def play() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        reports = Reports()
        task = asyncio.create_task(discover.watch_dns(parse_place("dns://engines.example:8000"), reports))
        await reports.until("10.0.0.1:8000", "10.0.0.2:8000")
        task.cancel()

    played(play)


def test_a_real_name() -> None:
    async def play() -> None:
        reports = Reports()
        place = parse_place("dns://localhost:8000")
        task = asyncio.create_task(discover.discover(place, reports, None))
        await _until(lambda: "127.0.0.1:8000" in reports.names(), reports.names)
        task.cancel()

    played(play)


def test_outside_of_a_cluster() -> None:
    with pytest.raises(ConfigError, match="--kubernetes-api"):
        discover.Cluster.of_this_pod()


@pytest.mark.parametrize(
    ("text", "kind", "host", "port"),
    [
        ("http://h:8000", "url", "h", "8000"),
        ("http://h", "url", "h", "80"),
        ("https://[::1]:1/", "url", "::1", "1"),
        ("dns://name:80", "dns", "name", "80"),
        ("k8s://service.space:http", "k8s", "service.space", "http"),
        ("k8s://service:8000", "k8s", "service", "8000"),
    ],
)
def test_places(text: str, kind: str, host: str, port: str) -> None:
    place = parse_place(text)
    assert (place.kind, place.host, place.port, place.secure) == (kind, host, port, text.startswith("https"))


def test_a_place_with_events_of_its_own() -> None:
    given = ("tcp://{host}:1", "tcp://{host}:2")
    own = parse_place("http://h:80,events=tcp://h:5557,replay=tcp://h:5558", "any", *given)
    assert own.source("h") == Source("tcp://h:5557", "tcp://h:5558")
    assert parse_place("http://[::1]:80", "any", *given).source("::1") == Source(
        "tcp://[::1]:1", "tcp://[::1]:2"
    )
    assert parse_place("http://h:80").source("h") is None
    shared = parse_place("http://h:80,ranks=4,node=n-{host}", "any", *given)
    assert shared.source("h") == Source("tcp://h:1", "tcp://h:2", ranks=4, node="n-h")
    for wrong in ("event=tcp://h:5557", "ranks=0", "ranks=-1", "ranks=x", "ranks=1000"):
        with pytest.raises(ConfigError, match="events=ADDRESS"):
            parse_place(f"http://h:80,{wrong}")
    with pytest.raises(ConfigError, match="needs the engines' events"):
        parse_place("http://h:80,node=n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:8000",
        "http://",
        "http://h:99999",
        "ftp://h:1",
        "dns://name",
        "k8s://s",
        "http://h/v1",
        "http://u@h:1",
    ],
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(ConfigError, match="no place of engines"):
        parse_place(text)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"listen": "0.0.0.0:80"}, "--api-keys"),
        ({"listen": "here"}, "no address"),
        ({"listen": "localhost:1"}, "no address"),
        ({"policy": "best"}, "--policy"),
        ({"timeout": 0}, "--timeout"),
        ({"retries": -1}, "--retries"),
        ({"max_requests": 0}, "--max-requests"),
        ({"drain": float("nan")}, "--drain"),
        ({"prefill_wait": 0}, "--prefill-wait"),
        ({"max_bodies": 1000}, "--max-bodies"),
        ({"backends": ()}, "--backend"),
        ({"tls": ("cert",)}, "CERT KEY"),
        ({"listen": "0.0.0.0:80", "tls": ("cert", "key")}, "CLIENT_CA"),
        ({"events_listen": "tcp://*:5557"}, "--events-open"),
        ({"events_listen": "tcp://10.0.0.1:5557"}, "--events-open"),
        ({"events_listen": "tcp://[::]:5557"}, "--events-open"),
        ({"events_listen": "tcp://eth0:5557"}, "--events-open"),
        ({"backend_tls": ("ca", "cert")}, r"CA \[CERT KEY\]"),
        ({"backends": (parse_place("http://a:1", "prefill"),)}, "both"),
        ({"backends": (parse_place("http://a:1", "prefill"), parse_place("http://a:2"))}, "both"),
    ],
)
def test_wrong_options(more: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options(**{"backends": (parse_place("http://a:1"),), **more})


def test_what_other_hosts_may_reach_where_it_is_said_so() -> None:
    place = (parse_place("http://a:1"),)
    assert Options(place, listen="0.0.0.0:80", no_keys=True).loopback is False
    for address in ("tcp://127.0.0.1:5557", "tcp://[::1]:5557", "tcp://lo:*", "ipc:///run/events"):
        assert Options(place, events_listen=address).events_listen == address
    assert Options(place, events_listen="tcp://*:5557", events_open=True).events_open


def test_wrong_keys(tmp_path: Path) -> None:
    place, file = (parse_place("http://a:1"),), tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot read --api-keys"):
        Options(place, api_keys=str(file)).client_keys()
    for text in ("", "short", f"{'k' * 20} salt and more"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="16 characters"):
            Options(place, api_keys=str(file)).client_keys()
