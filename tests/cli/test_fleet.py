"""`kvkeep health`, `lookup`, `pin` and `unpin`, on keepers and a tokeniser that are there or not."""

import contextlib
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvkeep.cli import main
from kvkeep.identity import ChainHasher, encode_extra, tenant_of
from kvkeep.wire.messages import Reservation
from tests.observe.traffic import CHUNK, CHUNK_TOKENS, Engine
from tests.pem import Pem

PROMPT = list(range(1000, 1000 + 5 * CHUNK_TOKENS + 17))


class Kept:
    """A keeper with its HTTP side, that holds prompts."""

    def __init__(self, keeper: Any, number: int = 7) -> None:
        self.keeper = keeper
        found = re.search(r"https?://(127\.0\.0\.1:\d+)", keeper.log.read_text())
        assert found
        self.address, self.token = found[1], f"{keeper.socket}.token"
        self.engine = Engine(keeper.connect("engine"), number=number)
        self.fingerprint = bytes([number]) * 32

    def save(self, prompt: list[int], salt: str | None = None) -> None:
        hasher, count = ChainHasher(self.fingerprint, CHUNK_TOKENS), len(prompt) // CHUNK_TOKENS
        extra = None if salt is None else encode_extra((("cache_salt", salt),))
        hasher.extend(prompt, None if extra is None else [extra, *[None] * (count - 1)])
        link, keys = self.engine.connection, hasher.keys(0, count)
        item = Reservation(keys, [b"\1" * count], 0, 0, tenant_of(salt))
        (done,) = link.reserve(self.engine.space, [item])
        link.commit(done.reservation, 0)
        link.status()


@pytest.fixture(scope="module")
def kept(module_keeper_process) -> Kept:
    one = Kept(module_keeper_process("--http", "127.0.0.1:0"))
    one.save(PROMPT[: 3 * CHUNK_TOKENS])
    one.save([7] * 2 * CHUNK_TOKENS, salt="tenant")
    return one


@pytest.fixture
def ids(tmp_path: Path) -> str:
    path = tmp_path / "ids"
    path.write_text(json.dumps(PROMPT))
    return str(path)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def test_lookup_says_how_much_is_held(kept: Kept, ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--http", kept.address, "--token", kept.token]
    assert main(["lookup", *where, "--tokens", ids]) == 0
    assert lines(capsys) == [f"{kept.address}  {3 * CHUNK_TOKENS} of {len(PROMPT)} tokens"]
    for name in ("0", "07070707", "SmolLM2-135M"):
        assert main(["lookup", *where, "--tokens", ids, "--namespace", name, "--json"]) == 0
        (said,) = json.loads(lines(capsys)[0])["keepers"]
        assert said["said"]["held_tokens"] == 3 * CHUNK_TOKENS


def test_a_salted_prompt_is_found_with_its_salt(
    kept: Kept, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for salt in ([], ["--salt", "other"], ["--salt", "tenant"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(" ".join(["7"] * 300)))
        where = ["--http", kept.address, "--token", kept.token]
        assert main(["lookup", *where, "--tokens", "-", *salt]) == 0
        found += lines(capsys)
    assert [line.split()[1] for line in found] == ["0", "0", str(2 * CHUNK_TOKENS)]


def test_pin_and_unpin(kept: Kept, ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--http", kept.address, "--token", kept.token]
    assert main(["pin", *where, "--tokens", ids]) == 0
    assert main(["pin", *where, "--namespace", "0"]) == 0
    assert main(["unpin", *where, "--tokens", ids]) == 0
    assert main(["unpin", *where, "--all"]) == 0
    assert [line.partition("  ")[2] for line in lines(capsys)] == [
        "3 chunks pinned", "2 chunks pinned", "3 chunks unpinned", "2 chunks unpinned",
    ]  # fmt: skip


def test_many_keepers_of_which_one_is_gone(
    kept: Kept, ids: str, keeper_process, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("of-all-keepers-0123456789\n")
    more = [Kept(keeper_process("--http", f"127.0.0.1:0?token_file={token}")) for _ in range(2)]
    more[1].save(PROMPT)
    gone = "127.0.0.1:1"
    where = [word for one in (*(k.address for k in more), gone) for word in ("--http", one)]
    assert main(["health", *where]) == 1
    said = lines(capsys)
    assert said[:2] == [f"{one.address}  ready" for one in more]
    assert said[2].startswith(f"{gone}  failed: no keeper answers")
    assert main(["lookup", *where, "--token", str(token), "--tokens", ids]) == 1
    said = lines(capsys)
    assert [line.split()[1] for line in said] == ["0", str(5 * CHUNK_TOKENS), "failed:"]
    assert main(["health", "--http", f"http://{more[0].address}/", "--http", kept.address, "--json"]) == 0
    assert all(one["said"]["ready"] for one in json.loads(lines(capsys)[0])["keepers"])


def test_without_the_token(kept: Kept, ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup", "--http", kept.address, "--tokens", ids]) == 1
    assert lines(capsys) == [f"{kept.address}  failed: it wants its token: give the file as --token"]


def test_keepers_that_speak_tls(
    keeper_process, pem: Pem, ids: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Kept(keeper_process("--http", f"127.0.0.1:0?{pem.options}"))
    one.save(PROMPT)
    there = ["--http", one.address]
    assert main(["health", *there, "--tls", pem.ca]) == 0
    assert main(["lookup", *there, "--tls", *pem.client, "--tokens", ids]) == 0
    assert main(["lookup", *there, "--tls", pem.ca, "--token", one.token, "--tokens", ids]) == 0
    held = f"{one.address}  {5 * CHUNK_TOKENS} of {len(PROMPT)} tokens"
    assert lines(capsys) == [f"{one.address}  ready", held, held]
    for options, said in (
        (["--http", f"https://{one.address}"], "give the file of its CA as --tls"),
        ([*there, "--tls", pem.other_ca], "give the file of its CA as --tls"),
        (there, "no keeper answers"),
    ):
        assert main(["health", *options]) == 1
        assert said in lines(capsys)[0]


def test_move_down_and_up_again(keeper_process, ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"fs://{keeper_process.directory()}?capacity=64MiB&write=never"
    one = Kept(keeper_process("--http", "127.0.0.1:0", "--tier", place))
    one.save(PROMPT)
    where = ["--http", one.address, "--token", one.token, "--tokens", ids]
    assert main(["move", *where, "--to", "fs"]) == 0
    assert main(["lookup", *where]) == 0
    assert main(["move", *where, "--to", "fs:", "--drop"]) == 0
    assert main(["lookup", *where]) == 0
    assert main(["move", *where]) == 0
    assert main(["lookup", *where]) == 0
    assert [line.partition("  ")[2] for line in lines(capsys)] == [
        "5 of 5 chunks are in fs",
        f"{5 * CHUNK_TOKENS} of {len(PROMPT)} tokens",
        "5 of 5 chunks are in fs:, 5 dropped from memory",
        f"0 of {len(PROMPT)} tokens",
        "5 of 5 chunks are in memory",
        f"{5 * CHUNK_TOKENS} of {len(PROMPT)} tokens",
    ]
    assert main(["move", *where, "--to", "redis"]) == 1
    assert "0 tiers are 'redis': this keeper has fs://" in lines(capsys)[0]


def test_without_tiers_there_is_nowhere_to_move(
    kept: Kept, ids: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["move", "--http", kept.address, "--token", kept.token, "--tokens", ids]) == 1
    assert "has no tiers" in lines(capsys)[0]


def test_clear_by_tenant_on_many(keeper_process, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("of-all-keepers-0123456789\n")
    both = [Kept(keeper_process("--http", f"127.0.0.1:0?token_file={token}")) for _ in range(2)]
    for one in both:
        one.save([7] * 2 * CHUNK_TOKENS, salt="acme")
        one.save(PROMPT)
    where = [word for one in both for word in ("--http", one.address)]
    assert main(["clear", *where, "--token", str(token), "--tenant", "acme"]) == 0
    assert lines(capsys) == [f"{one.address}  2 chunks forgotten" for one in both]
    assert main(["clear", *where, "--token", str(token), "--namespace", "0"]) == 0
    assert lines(capsys) == [f"{one.address}  5 chunks forgotten" for one in both]


def test_the_token_of_the_keeper_here(
    kept: Kept, ids: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVKEEP_SOCKET", kept.keeper.socket)
    assert main(["lookup", "--http", kept.address, "--tokens", ids]) == 0
    assert lines(capsys)


def test_pins_have_a_bound(keeper_process, capsys: pytest.CaptureFixture[str]) -> None:
    one = Kept(keeper_process("--http", "127.0.0.1:0", memory="4MiB"))
    assert CHUNK * 40 > 2 << 20
    one.save(list(range(40 * CHUNK_TOKENS)))
    assert main(["pin", "--http", one.address, "--token", one.token, "--all"]) == 1
    assert "failed: pins would take" in lines(capsys)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--namespace", "9", "--tokens", "IDS"], "0 namespaces are '9'"),
        (["--namespace", "0707", "--tokens", "IDS"], "0 namespaces are '0707'"),
        (["--tokens", "FEW"], "has no whole chunk of 128"),
    ],
)
def test_what_a_keeper_cannot_answer(
    options: list[str], said: str, kept: Kept, ids: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few").write_text("1 2 3")
    given = [{"IDS": ids, "FEW": str(tmp_path / "few")}.get(word, word) for word in options]
    assert main(["lookup", "--http", kept.address, "--token", kept.token, *given]) == 1
    assert said in lines(capsys)[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["lookup"], "which prompt?"),
        (["pin"], "what? give"),
        (["move"], "which prompt?"),
        (["move", "--tokens", "WORDS", "--drop"], "--drop forgets what a tier has"),
        (["lookup", "--tokens", "/nowhere"], "cannot read /nowhere"),
        (["lookup", "--tokens", "WORDS"], "more in it than token ids"),
        (["lookup", "--tokens", "HUGE"], "not token ids"),
        (["lookup", "--tokens", "HUGE", "--text", "WORDS"], "not both"),
        (["lookup", "--text", "WORDS", "--engine", "http://127.0.0.1:1"], "does not tokenise"),
        (["lookup", "--text", "WORDS", "--engine", "localhost"], "not a server's URL"),
        (["health", "--token", "/nowhere"], "cannot read the token"),
        (["health", "--tls", "/nowhere"], "cannot read the CA file /nowhere"),
        (["health", "--tls", *"abcd"], "--tls takes CA [CERT KEY]"),
    ],
)
def test_what_is_wrong_on_the_command_line(
    line: list[str], said: str, kept: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words").write_text("one two")
    (tmp_path / "huge").write_text(" ".join([str(2**40)] * 200))
    names = {"WORDS": str(tmp_path / "words"), "HUGE": str(tmp_path / "huge")}
    where = [] if "--token" in line else ["--token", kept.token]
    code = main([names.get(word, word) for word in line] + ["--http", kept.address, *where])
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert (code, "Traceback" in printed.err) == (1 if "HUGE" in line and "--text" not in line else 2, False)


class Tokeniser(BaseHTTPRequestHandler):
    """Answers as vLLM does: a text is its words' lengths, a chat has one token before."""

    def answer(self, said: dict[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, first = asked.get("prompt"), []
        if text is None:
            text, first = asked["messages"][0]["content"], [1]
        self.answer({"tokens": [*first, *(len(word) for word in text.split())]})

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def tokeniser() -> Iterator[str]:
    with serving(Tokeniser) as url:
        yield url


STRANGERS: dict[str, tuple[int, bytes]] = {
    "/nothing": (200, b"{}"),
    "/list": (200, b"[]"),
    "/words": (200, b'{"keeper": "none", "held_chunks": "many", "tiers": 7, "pinned": 1, "chunks": 2}'),
    "/odd": (200, b'{"keeper": {"namespaces": [{"namespace": 0, "fingerprint": "x", "chunk_tokens": -1}]}}'),
    "/deep": (200, b"[" * 100_000),
    "/no": (200, b"<html>"),
    "/endless": (200, b" " * (65 << 20)),
    "/refused": (500, b"[" * 5000),
    "/broken": (500, b"{"),  # which says that it is longer
    "/away": (307, b""),
}


class Stranger(BaseHTTPRequestHandler):
    """A server of JSON that is no keeper's; `/away` sends everybody on to the address in its class."""

    elsewhere = ""

    def do_GET(self) -> None:
        status, body = STRANGERS["/" + self.path.split("/")[1]]
        self.send_response(status)
        self.send_header("Location", self.elsewhere + self.path)
        self.send_header("Content-Length", str(len(body) + 99 * (body == b"{")))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # it had enough
            self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    with serving(Stranger) as url:
        yield url


@pytest.mark.parametrize("path", STRANGERS)
@pytest.mark.parametrize("command", ["lookup", "health", "pin", "unpin"])
def test_a_stranger_among_keepers(
    command: str, path: str, kept: Kept, stranger: str, ids: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What says something else than a keeper is reported as that, and the others answer."""
    where = ["--http", stranger + path, "--http", kept.address, "--token", kept.token]
    words = [] if command == "health" else ["--tokens", ids]
    assert main([command, *where, *words]) == 1
    first, second = lines(capsys)
    assert "failed: " in first
    assert second.startswith(kept.address)
    assert "failed" not in second


def test_a_token_goes_where_it_was_sent_only(
    kept: Kept, stranger: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To no proxy that the environment names, and to nobody whom the address names in its stead."""
    came = list[str]()

    class Elsewhere(Stranger):
        def do_GET(self) -> None:
            came.append(self.path)
            super().do_GET()

        do_POST = do_GET

    with serving(Elsewhere) as url:
        monkeypatch.setattr(Stranger, "elsewhere", url)
        monkeypatch.setenv("http_proxy", url)
        assert main(["health", "--http", f"{stranger}/away", "--token", kept.token]) == 1
        assert main(["health", "--http", kept.address, "--token", kept.token]) == 0
    assert "failed: not ready: status 307" in lines(capsys)[0]
    assert came == []


def test_a_text_is_tokenised_by_the_engine(
    tokeniser: str, kept: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("seven12 " * CHUNK_TOKENS)
    kept.save([7] * CHUNK_TOKENS)
    kept.save([1, *[7] * (CHUNK_TOKENS - 1)])
    where = ["--http", kept.address, "--token", kept.token, "--engine", tokeniser, "--text", str(text)]
    for chat, count in (([], CHUNK_TOKENS), (["--chat"], CHUNK_TOKENS + 1)):
        assert main(["lookup", *where, *chat]) == 0
        assert lines(capsys) == [f"{kept.address}  {CHUNK_TOKENS} of {count} tokens"]
