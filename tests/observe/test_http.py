"""The HTTP side: what is ready, who may do what, what is bounded, and that actions act."""

import contextlib
import json
import logging
import os
import re
import select
import socket
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from kvkeep.config import KeeperConfig
from kvkeep.errors import ConfigError
from kvkeep.observe import logs
from kvkeep.observe.http import Web
from kvkeep.tls import client_context
from kvkeep.wire.server import KeeperServer
from tests.observe.traffic import CHUNK_TOKENS, keys_of, traffic
from tests.pem import Pem


def raw(url: str, request: bytes) -> bytes:
    """What comes back for these bytes, until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as link:
        link.sendall(request)
        answer = b""
        while piece := link.recv(65536):
            answer += piece
    return answer


def test_health_and_readiness(watched) -> None:
    one = watched(tier=True)
    assert one.client.get("/healthz").text == "ok\n"
    ready = one.client.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert list(ready.json()["tiers"].values()) == ["on"]


def test_where_tokens_came_from(busy) -> None:
    state = busy.state()
    newest = state["requests"][0]
    (tier,) = [tier["name"] for tier in state["tiers"]]
    assert newest["chunk_tokens"] == CHUNK_TOKENS
    assert newest["local"] == 2
    assert newest["chunks"] == 15
    assert newest["local"] + newest["memory"] + newest["tiers"][tier] == 14  # one chunk longer than before
    assert not any(request["state"] for request in state["requests"])
    assert sum(state["arena"].values()) == state["keeper"]["memory_bytes"]
    assert state["arena"]["held"] == state["keeper"]["used_bytes"]
    assert state["tiers"][0]["found"] > 0


def test_the_heaviest_prefix_comes_first(watched) -> None:
    one = watched(memory="16MiB")
    for _ in range(3):
        one.engine.request(1, 20)
    for _ in range(10):
        one.engine.request(2, 5)
    prefixes = one.state()["prefixes"]
    assert [(p["chunks"], p["uses"]) for p in prefixes] == [(5, 9), (20, 2)]
    assert [p["weight"] for p in prefixes] == [9 * 5 * 65536, 2 * 20 * 65536]
    assert prefixes[0]["prefix"] == keys_of(2, 5)[-16:-10].hex()


def test_pin_unpin_clear(watched) -> None:
    one = watched()
    for _ in range(2):
        one.engine.request(1, 10)
    (prefix,) = one.state()["prefixes"]
    assert one.act("pin", prefix=prefix["prefix"]) == {"pinned_chunks": 10}
    traffic(one.engine, documents=12)
    state = one.state()
    assert state["keeper"]["counters"]["evicted_chunks"] > 0
    assert one.engine.request(1, 10) == 10
    assert state["arena"]["pinned"] == 10 * 65536
    (mine,) = [p for p in state["prefixes"] if p["prefix"] == prefix["prefix"]]
    assert mine["pinned"]
    assert one.act("unpin") == {"unpinned_chunks": 10}
    assert one.act("clear", namespace=0)["forgotten_chunks"] > 10
    assert one.state()["keeper"]["chunks"] == 0


def test_a_prompt_by_its_keys(watched) -> None:
    one = watched()
    one.engine.request(1, 10)
    one.engine.request(2, 10)
    keys = (keys_of(1, 6) + keys_of(3, 2)).hex()
    before = one.state()["keeper"]["counters"]
    assert one.act("lookup", namespace=0, keys=keys) == {"asked_chunks": 8, "held_chunks": 6}
    assert one.act("lookup", namespace=0, keys=keys_of(9, 1).hex()) == {"asked_chunks": 1, "held_chunks": 0}
    assert one.state()["keeper"]["counters"] == before, "looked at, not used"
    assert one.act("pin", namespace=0, keys=keys) == {"pinned_chunks": 6}
    assert one.act("unpin", namespace=0, keys=keys_of(1, 4).hex()) == {"unpinned_chunks": 4}
    assert one.state()["arena"]["pinned"] == 2 * 65536


def test_drain_ends_the_keeper_and_takes_its_token_along(watched) -> None:
    one = watched(tier=True)
    one.engine.request(1, 10)
    assert one.act("drain") == {"draining": True}
    assert one.keeper.process.wait(20) == 0
    assert not os.path.exists(f"{one.keeper.socket}.token")


def test_while_it_drains_it_is_not_ready(watched) -> None:
    slow = "import kvkeep.tiers.fs as fs, time; put = fs.FsTier.put\n"
    slow += "fs.FsTier.put = lambda *a: (time.sleep(60), put(*a))[1]"
    one = watched("--drain", "20", tier=True, patch=slow)
    one.engine.request(1, 10)
    one.act("drain")
    codes = {one.client.get("/readyz").status_code for _ in range(3)}
    assert codes <= {200, 503}
    assert one.client.get("/readyz").status_code == 503
    assert one.client.get("/healthz").status_code == 200
    assert "kvkeep_ready 0\n" in one.text()
    one.keeper.process.kill()


def test_actions_need_the_token(watched) -> None:
    one = watched()
    one.engine.request(1, 10)
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Cookie": "token=x"},
    ):
        for action in ("clear", "pin", "unpin", "lookup", "drain"):
            assert one.client.post(f"/api/{action}", json={}, headers=headers).status_code == 401
    place = Path(f"{one.keeper.socket}.token")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert str(place) in one.keeper.log.read_text()
    assert place.read_text().strip() not in one.keeper.log.read_text()
    assert one.state()["keeper"]["chunks"] == 10


def test_another_sites_name_is_refused(watched) -> None:
    """DNS rebinding: a page of evil.example whose name now leads here sends its own name along."""
    one = watched()
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        answer = raw(
            one.url, f"GET /api/state HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.split()[1] in (b"403", b"400"), host
    for host in ("localhost:1234", "127.0.0.1", "[::1]:9"):
        assert one.client.get("/healthz", headers={"Host": host}).status_code == 200
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = one.client.options("/api/clear", headers=preflight)
    assert answer.status_code == 401
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[]", 400),
        (b'{"namespace": "all"}', 400),
        (b'{"name": 1}', 400),
        (b"\xff", 400),
        (b'{"namespace": 77}', 409),
        (b'{"namespace": -1}', 409),
        (b'{"prefix": "beef"}', 409),
        (b'{"namespace": 0, "keys": "zz"}', 409),
        (b'{"namespace": 0, "keys": "beef"}', 409),
        (b'{"keys": "00112233445566778899aabbccddeeff"}', 409),
        (b"x" * ((1 << 20) + 1), 413),
    ],
)
def test_bad_actions_change_nothing(busy, body: bytes, status: int) -> None:
    before = busy.state()["keeper"]["chunks"]
    for action in ("clear", "pin", "unpin", "lookup"):
        answer = busy.client.post(f"/api/{action}", content=body, headers=busy.token())
        assert answer.status_code == status, answer.text
    assert busy.state()["keeper"]["chunks"] == before


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
        b"\x00\x01\x02 nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_bad_requests_are_turned_away(busy, request_: bytes) -> None:
    assert raw(busy.url, request_).split()[1] == b"400"
    assert busy.client.get("/healthz").status_code == 200


def test_too_many_connections_are_hung_up_on(watched) -> None:
    one = watched()
    host, port = one.url.removeprefix("http://").split(":")
    links = []
    try:
        for _ in range(66):
            links.append(socket.create_connection((host, int(port)), timeout=20))
            links[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if len(links) <= 64:
                assert links[-1].recv(65536)
        with contextlib.suppress(ConnectionResetError):
            assert links[-1].recv(1) == b""
        assert one.engine.request(3, 3) == 0  # engines do not notice
    finally:
        for link in links:
            link.close()


def test_what_has_no_place_here(busy) -> None:
    for path in ("/etc/passwd", "/../secret", "/api/clear"):
        assert busy.client.get(path).status_code in (404, 405)
    page = busy.client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://", "".join(busy.client.get(p).text for p in ("/", "/page.css")))


def serve(*options: str) -> str:
    command = [sys.executable, "-m", "kvkeep.cli", "serve", "--memory", "4MiB", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_an_address_that_others_reach_needs_a_token(tmp_path: Path) -> None:
    sock = str(tmp_path / "k.sock")
    said = serve("--socket", sock, "--http", "0.0.0.0:0")
    assert "needs a token" in said
    (tmp_path / "token").write_text("short")
    said = serve("--socket", sock, "--http", f"0.0.0.0:0?token_file={tmp_path}/token")
    assert "16 characters" in said
    assert "cannot read" in serve("--socket", sock, "--http", f"0.0.0.0:0?token_file={tmp_path}")
    for wrong in ("9400", "example.org:80", ":80", "127.0.0.1"):
        assert "--http takes" in serve("--socket", sock, "--http", wrong)


def test_there_reading_needs_it_too(keeper_process, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    keeper = keeper_process("--http", f"0.0.0.0:0?token_file={token}")
    port = re.search(r"http://0\.0\.0\.0:(\d+)", keeper.log.read_text())[1]  # type: ignore[index]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        for path in ("/metrics", "/api/state", "/nothing"):
            assert client.get(path).status_code == 401
        for path in ("/", "/page.js", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        allowed = {"Authorization": "Bearer 0123456789abcdef", "Host": "keeper.example"}
        assert client.get("/metrics", headers=allowed).status_code == 200
    assert not os.path.exists(f"{keeper.socket}.token")


def test_tls_and_certificates_of_clients(keeper_process, pem: Pem, tmp_path: Path) -> None:
    """Anyone may ask for health; for the rest a certificate does as well as a token, but not for what a web
    site could make a browser send that shows its certificate unasked."""
    keeper = keeper_process("--http", f"0.0.0.0:0?{pem.options}")
    port = re.search(r"https://0\.0\.0\.0:(\d+)", keeper.log.read_text())[1]  # type: ignore[index]
    assert "in the clear" not in keeper.log.read_text()
    token = Path(f"{keeper.socket}.token").read_text().strip()
    known, stranger = client_context(*pem.client), client_context(pem.ca)
    for trust, more, allowed in (
        (known, {}, True),
        (stranger, {}, False),
        (stranger, {"Authorization": f"Bearer {token}"}, True),
    ):
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, headers=more) as client:
            for path in ("/healthz", "/readyz", "/"):
                assert client.get(path).status_code == 200
            for path in ("/metrics", "/api/state"):
                assert client.get(path).status_code == (200 if allowed else 401)
            assert client.post("/api/clear", json={}).status_code == (200 if allowed else 401)
            assert client.post("/api/clear", content=b"{}").status_code == (200 if more else 401)
    other = client_context(pem.ca, pem.other_cert, pem.other_key)
    with httpx.Client(verify=other) as client, pytest.raises(httpx.TransportError):
        client.get(f"https://127.0.0.1:{port}/healthz")
    with httpx.Client() as client, pytest.raises(httpx.TransportError):
        client.get(f"http://127.0.0.1:{port}/healthz")


def greeting(keeper) -> int:
    return int(re.search(r"https://127\.0\.0\.1:(\d+)", keeper.log.read_text())[1])  # type: ignore[index]


def test_handshakes_count_as_connections(keeper_process, pem: Pem) -> None:
    long = "import kvkeep.observe.listen as listen; listen._HANDSHAKE_WAIT = 60.0"
    port = greeting(keeper_process("--http", f"127.0.0.1:0?cert={pem.cert}&key={pem.key}", patch=long))
    links = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(90)]
    try:
        deadline, ended = time.monotonic() + 20, list[socket.socket]()
        while len(ended) < 90 - 64 - 8:
            assert time.monotonic() < deadline
            ended, _, _ = select.select(links, [], [], 0.1)
        for link in ended:
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(1) == b""
        assert len(ended) <= 90 - 64
    finally:
        for link in links:
            link.close()
    deadline = time.monotonic() + 20

    def answers() -> bool:
        """Those of the links that it has not seen end yet still count."""
        assert time.monotonic() < deadline
        with contextlib.suppress(httpx.TransportError), httpx.Client(verify=client_context(pem.ca)) as client:
            return client.get(f"https://127.0.0.1:{port}/metrics").status_code == 200
        return False

    while not answers():
        time.sleep(0.05)


def test_a_handshake_that_never_ends_is_ended(keeper_process, pem: Pem) -> None:
    short = "import kvkeep.observe.listen as listen; listen._HANDSHAKE_WAIT = 0.3"
    port = greeting(keeper_process("--http", f"127.0.0.1:0?cert={pem.cert}&key={pem.key}", patch=short))
    for said in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            link.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                while link.recv(100):  # an alert may come first
                    pass


def test_a_request_that_comes_with_the_end_of_the_handshake(keeper_process, pem: Pem) -> None:
    """Both in one segment: asyncio hands the request over before it says that there is a connection."""
    port = greeting(keeper_process("--http", f"127.0.0.1:0?cert={pem.cert}&key={pem.key}"))
    for _ in range(20):
        coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context(pem.ca).wrap_bio(coming, going, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    link.sendall(going.read())
                    coming.write(link.recv(65536))
            tls.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            link.sendall(going.read())
            answer = b""
            while not answer.endswith(b"ok\n"):
                try:
                    answer += tls.read(65536)
                except ssl.SSLWantReadError:
                    coming.write(link.recv(65536))
            assert answer.startswith(b"HTTP/1.1 200")


def test_without_tls_the_log_says_that_the_token_is_open(keeper_process, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    keeper = keeper_process("--http", f"0.0.0.0:0?token_file={tmp_path}/token")
    assert "in the clear: give cert= and key=" in keeper.log.read_text()


def test_wrong_certificates_are_said(tmp_path: Path, pem: Pem) -> None:
    def said(address: str, options: str) -> str:
        return serve("--socket", str(tmp_path / "k.sock"), "--http", f"{address}:0?{options}")

    assert "give a key too" in said("127.0.0.1", f"cert={pem.cert}")
    assert "not the key of the certificate" in said("127.0.0.1", f"cert={pem.cert}&key={pem.client_key}")
    assert "cannot read the CA file" in said("127.0.0.1", f"cert={pem.cert}&key={pem.key}&ca={tmp_path}/none")
    assert "needs a token" in said("0.0.0.0", f"cert={pem.cert}&key={pem.key}")
    assert "did you mean 'token_file'?" in said("127.0.0.1", "tokenfile=x")


def test_a_port_in_use_is_said(watched, tmp_path: Path) -> None:
    one = watched()
    assert "cannot listen" in serve(
        "--socket", str(tmp_path / "k.sock"), "--http", one.url.removeprefix("http://")
    )


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvkeep.cli import main

    monkeypatch.setitem(sys.modules, "kvkeep.observe.http", None)
    arguments = ["serve", "--memory", "4MiB", "--socket", str(tmp_path / "k.sock"), "--http", "127.0.0.1:0"]
    assert main(arguments) == 2
    assert "pip install 'kvkeep[http]'" in capsys.readouterr().err


def test_json_logs(keeper_process) -> None:
    keeper = keeper_process("--log-format", "json")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(keeper.socket)
        stranger.sendall(b"\1\0\0\0x")
        while stranger.recv(4096):
            pass
    lines = [json.loads(line) for line in keeper.log.read_text().splitlines()]
    assert {line["logger"] for line in lines} == {"kvkeep.keeper"}
    assert lines[0]["message"].startswith("keeper ")
    assert lines[-1]["level"] == "warning"
    assert lines[-1]["event"] == "dropped a client: %(error)s"
    assert lines[-1]["message"] == f"dropped a client: {lines[-1]['error']}"
    assert (lines[0]["policy"], lines[0]["socket"]) == ("lru", keeper.socket)


def test_fields_of_a_log_line_cannot_take_the_place_of_ours() -> None:
    record = logging.LogRecord(
        "a", logging.INFO, "f", 1, "%(level)s of %(tier)s", ({"level": 7, "tier": Path("x")},), None
    )
    line = json.loads(logs._Json().format(record))
    assert (line["level"], line["message"], line["tier"]) == ("info", "7 of x", "x")


def test_a_refused_configuration_leaves_nothing(tmp_path: Path) -> None:
    server = KeeperServer(KeeperConfig(str(tmp_path / "k.sock"), memory=4 << 20))
    try:
        with pytest.raises(ConfigError):
            Web(server, KeeperConfig(str(tmp_path / "k.sock"), http="nowhere"))
        assert server.watch is None
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(server.arena_fd)
