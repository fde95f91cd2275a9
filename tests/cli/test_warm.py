"""`kvkeep warm` against a small server that answers, refuses and breaks off. A real engine: tests/engines."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.cli.main import main


class Handler(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, dict, str | None]]

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body, self.headers.get("Authorization")))
        text = body.get("prompt") or body["messages"][0]["content"]
        if "too long" in text:
            self.answer(400, {"error": "maximum context length"})
        elif "nonsense" in text:
            self.answer(200, {"what": "is this"})
        else:
            self.answer(200, {"usage": {"prompt_tokens": len(text.split())}})

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def files(folder: Path, *texts: str) -> list[str]:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return [str(folder / f"{number}.txt") for number in range(len(texts))]


def test_each_file_is_prefilled_once(server: str, tmp_path: Path, capsys) -> None:
    names = files(tmp_path, "one two three", "four five")
    assert main(["warm", "--url", server, "--json", "--parallel", "2", "--before", "Say: ", *names]) == 0
    done = json.loads(capsys.readouterr().out)["files"]
    assert [(one["file"], one["tokens"], one["error"]) for one in done] == [
        (names[0], 4, None),
        (names[1], 3, None),
    ]
    assert sorted(body["prompt"] for _, body, _ in Handler.seen) == ["Say: four five", "Say: one two three"]
    assert {body["model"] for _, body, _ in Handler.seen} == {"the-model"}
    assert {body["max_tokens"] for _, body, _ in Handler.seen} == {1}


def test_chat_and_key(server: str, tmp_path: Path) -> None:
    names = files(tmp_path, "a document")
    assert main(["warm", "--url", server, "--chat", "--key", "secret", "--model", "m", *names]) == 0
    ((path, body, key),) = Handler.seen
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "a document"}]
    assert key == "Bearer secret"


def test_what_fails_is_said_and_the_rest_goes_on(server: str, tmp_path: Path, capsys) -> None:
    names = files(tmp_path, "this is too long", "nonsense", "fine")
    assert main(["warm", "--url", server, *names]) == 1
    said = capsys.readouterr().err.replace("\n", "")
    assert "maximum context length" in said
    assert "2.txt: 1 tokens" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "127.0.0.1:1", "{file}"], "not a server's URL"),
        (["--url", "http://127.0.0.1:9", "{file}"], "no engine answers"),
        (["--parallel", "0", "{file}"], "must be 1 or more"),
        (["missing.txt"], "cannot read missing.txt"),
        (["{binary}"], "as UTF-8 text"),
    ],
)
def test_bad_input_is_a_clear_error(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    names = {"file": files(tmp_path, "text")[0], "binary": str(tmp_path / "binary")}
    assert main(["warm", *(argument.format(**names) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
