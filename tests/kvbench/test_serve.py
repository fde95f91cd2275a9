"""`kvkeep bench serve` against a real server of its own process, sound and with faults."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.load.pictures import draw_cdf
from kvbench.workloads import WORKLOADS
from kvkeep.cli.main import main

FAKE = Path(__file__).with_name("fake_openai.py")
PAGE = Path(__file__).parents[2] / "docs" / "bench-serve.md"
QUICK = ("--arrivals", "fixed", "--rate", "500")


class Fake:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def asked(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/asked", timeout=20) as reply:
            return json.load(reply)

    def close(self) -> None:
        self.process.communicate(timeout=20)  # its stdin ends, and so does it


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


@pytest.fixture
def bench(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run it; returns exit status, summary (None if there is none) and what it said on stderr."""

    def run(workload: str, *options: str, url: str = fake.url) -> tuple[int, Any, str]:
        words = ["bench", "serve", workload, "--url", url, "--output", str(tmp_path / "out"), "--json"]
        status = main([*words, *options])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, " ".join(err.split())

    return run


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "requests.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run(fake: Fake, bench: Callable[..., Any], tmp_path: Path) -> None:
    status, found, said = bench("unique", *QUICK, "--scale", "0.05", "--requests", "12", "--slo", "ttft=60s")
    assert (status, "failed" in said) == (0, False)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    asked = [body for body in fake.asked() if body["max_tokens"] == 8]
    words = [len(body["prompt"].split()) for body in asked]
    counted = [found[name] for name in ("requests", "errors", "short_answers", "output_tokens")]
    assert counted == [12, 0, 0, 96]
    assert found["prompt_tokens"] == sum(words) + 7 * 12
    assert found["cached_tokens"] == sum(count // 2 for count in words)
    assert sum(words) / 12 == pytest.approx(100, rel=0.1)  # tokens, by the server's own count
    assert all(70 <= count <= 130 for count in words)
    assert found["lengths_by"] == "tokenize"
    assert (found["planned"], found["partial"], found["warm_up"]) == (12, False, 0)
    assert found["goodput"]["requests"] == 12
    table = sorted(rows(tmp_path / "out"), key=lambda row: int(row["request"]))
    assert [row["request"] for row in table] == [str(number) for number in range(12)]
    assert {row["output_tokens"] for row in table} == {"8"}
    assert {len(row["itl_s"].split()) for row in table} == {7}
    assert all(float(row["end_s"]) >= float(row["first_token_s"]) >= float(row["sent_s"]) for row in table)
    ttfts = [float(row["ttft_s"]) for row in table]
    assert found["ttft_s"]["mean"] == pytest.approx(sum(ttfts) / 12, abs=2e-6)
    assert (tmp_path / "out" / "cdf.png").read_bytes().startswith(b"\x89PNG")
    assert {(body["stream"], body["temperature"]) for body in asked} == {(True, 0)}
    assert not any("ignore_eos" in body for body in asked)
    page = PAGE.read_text()
    told = re.search(r"^\| in `summary.json`.*?\n\n", page, re.MULTILINE | re.DOTALL)
    cells = [line.split("|")[1] for line in told[0].splitlines()[2:] if line]
    assert re.findall(r"`(\w+)`", " ".join(cells)) == [*dict.fromkeys(found)]
    columns = re.search(r"^`requests.csv` has a row per request: (.*)$", page, re.MULTILINE)[1]
    assert re.findall(r"`(\w+_?\w*)`(?=[, (.])", re.sub(r"\([^)]*\)", "", columns)) == list(table[0])


def test_the_page_has_all_workloads() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (?:([\d.]+)/s|the trace's) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: float(rate or 0) for name, rate in rows} == {n: w.rate for n, w in WORKLOADS.items()}


def test_rounds_hold_the_servers_answers(fake: Fake, bench: Callable[..., Any]) -> None:
    options = ("--chat", "--scale", "0.02", "--warm-up", "pass", "--ignore-eos")
    status, found, _ = bench("multi_round", *QUICK, *options)
    assert (status, found["api"], found["warm_up"]) == (0, "chat", 1)
    asked = [body for body in fake.asked() if body["max_tokens"] == 8]
    assert {(body["ignore_eos"], body["min_tokens"]) for body in asked} == {(True, 8)}
    last = max(asked, key=lambda body: len(body["messages"]))["messages"]
    assert [message["role"] for message in last] == ["system", *["user", "assistant"] * 2, "user"]
    assert {m["content"] for m in last if m["role"] == "assistant"} == {" w0 w1 w2 w3 w4 w5 w6 w7"}
    for body in asked:  # the round before, to the letter, and its answer
        before = body["messages"][:-2]
        assert len(before) < 2 or before in [other["messages"] for other in asked]


def test_a_completion_begins_with_the_round_before(fake: Fake, bench: Callable[..., Any]) -> None:
    assert bench("multi_round", *QUICK, "--scale", "0.02")[0] == 0
    prompts = sorted((b["prompt"] for b in fake.asked() if b["max_tokens"] == 8), key=len)
    answer = " w0 w1 w2 w3 w4 w5 w6 w7"
    assert all(prompt.endswith("\n\nAssistant:") for prompt in prompts)
    later = [prompt for prompt in prompts if answer in prompt]
    assert len(later) == len(prompts) * 2 // 3
    for prompt in later:
        assert prompt.rpartition(answer)[0] in prompts


def test_several_rates_have_their_own_texts(fake: Fake, bench: Callable[..., Any], tmp_path: Path) -> None:
    status, found, _ = bench("unique", "--rate", "200,400", "--scale", "0.05", "--requests", "5")
    assert (status, [one["rate"] for one in found]) == (0, [200.0, 400.0])
    assert [len(rows(tmp_path / "out" / f"rate-{rate}")) for rate in (200, 400)] == [5, 5]
    assert (tmp_path / "out" / "rates.png").exists()
    prompts = [body["prompt"] for body in fake.asked() if body["max_tokens"] == 8]
    assert len(set(prompts)) == 10


def test_lengths_without_a_tokenizer(fake: Fake, bench: Callable[..., Any]) -> None:
    _, found, _ = bench("unique", *QUICK, "--scale", "0.05", "--requests", "3", "--model", "no-tokenize")
    assert found["lengths_by"] == "usage"
    assert found["prompt_tokens"] / 3 == pytest.approx(107, rel=0.2)


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        ("refuses", {"500: out of memory": 6}),
        ("errs", {"the server reports an error: {'message': 'engine died'}": 6}),
        ("hangs", {"timeout": 6}),
    ],
)
def test_what_fails_is_counted(
    fake: Fake, bench: Callable[..., Any], tmp_path: Path, fault: str, failures: dict[str, int]
) -> None:
    options = ("--model", fault, "--timeout", "2", "--requests", "6", "--scale", "0.05")
    status, found, said = bench("unique", *QUICK, *options)
    assert (status, found["errors"], found["partial"]) == (1, 6, False)
    assert found["failures"] == failures
    assert found["ttft_s"]["mean"] is None
    assert (tmp_path / "out" / "cdf.png").exists()
    assert f"6 requests failed: {next(iter(failures))}" in said
    assert {row["error"] for row in rows(tmp_path / "out")} == set(failures)


def test_a_broken_connection_is_an_error_of_its_request(fake: Fake, bench: Callable[..., Any]) -> None:
    options = ("--model", "breaks", "--requests", "6", "--scale", "0.05")
    status, found, _ = bench("unique", *QUICK, *options)
    assert (status, found["errors"], found["partial"]) == (1, 6, False)


def test_short_answers_are_counted(fake: Fake, bench: Callable[..., Any]) -> None:
    status, found, _ = bench("unique", *QUICK, "--model", "short", "--requests", "6", "--scale", "0.05")
    assert (status, found["short_answers"], found["output_tokens"]) == (0, 6, 30)


def test_a_server_that_dies_leaves_a_partial_result(
    fake: Fake, bench: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--rate", "20", "--arrivals", "fixed", "--model", "dies", "--scale", "1")
    status, found, said = bench("unique", *options)
    assert (status, found["partial"], found["stopped"]) == (1, True, "the server no longer answers")
    assert found["requests"] < found["planned"] == 200
    assert "partial: the server no longer answers" in said
    answered = [row for row in rows(tmp_path / "out") if not row["error"]]
    assert len(answered) <= 2  # as many as this fault lets through
    assert found["output_tokens"] == 64 * len(answered)


def test_a_run_that_is_killed_leaves_the_requests_that_had_ended(
    fake: Fake, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    words = [sys.executable, "-m", "kvkeep.cli", "bench", "serve", "unique", "--url", fake.url]
    words += ["--output", str(tmp_path), "--rate", "20", "--scale", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            wait_until(lambda: (tmp_path / "requests.csv").exists() and len(rows(tmp_path)) > 2, 60)
        finally:
            child.kill()
    assert {row["output_tokens"] for row in rows(tmp_path)} == {"8"}
    assert not (tmp_path / "summary.json").exists()


def test_a_key_that_is_not_on_the_command_line(
    fake: Fake, bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("hunter2\n")
    options = ("unique", *QUICK, "--requests", "1", "--scale", "0.05")
    assert bench(*options, "--key", f"@{tmp_path}/key")[0] == 0
    monkeypatch.setenv("KVKEEP_API_KEY", "hunter3")
    assert bench(*options)[0] == 0
    assert {body["authorization"] for body in fake.asked()} == {"Bearer hunter2", "Bearer hunter3"}
    with pytest.raises(SystemExit):
        bench(*options, "--key", "@nowhere")


def test_a_server_without_a_list_of_models(fake: Fake, bench: Callable[..., Any]) -> None:
    options = ("--model", "breaks", "--requests", "6", "--scale", "0.05", "--url", f"{fake.url}/listless")
    status, found, _ = bench("unique", *QUICK, *options)
    assert (status, found["errors"], found["model"]) == (1, 6, "breaks")
    assert not found["partial"]  # a 404 is an answer


def test_a_picture_of_nothing_draws_no_line(tmp_path: Path) -> None:
    figure = draw_cdf(tmp_path / "cdf.png", [], "nothing")
    assert [len(axis.lines) for axis in figure.axes] == [0, 0, 0]
    assert {text.get_text() for axis in figure.axes for text in axis.texts} == {"nothing was answered"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_partial_result(
    fake: Fake, tmp_path: Path, number: int, wait_until: Callable[..., None]
) -> None:
    words = [sys.executable, "-m", "kvkeep.cli", "bench", "serve", "unique", "--url", fake.url, "--json"]
    words += ["--model", "hangs", "--output", str(tmp_path), "--rate", "100", "--scale", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_until(lambda: len(fake.asked()) > 4, 60)  # two probes, then requests that hang
            os.kill(child.pid, number)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    found = json.loads(out)
    assert (child.returncode, found["stopped"]) == (130, "interrupted")
    assert found["unfinished"] == found["requests"] == len(rows(tmp_path)) > 0
    assert "partial: interrupted" in " ".join(err.split())


def test_a_rate_that_this_machine_cannot_generate(bench: Callable[..., Any]) -> None:
    status, found, said = bench("short_documents", "--rate", "100000", "--requests", "600")
    assert (status, found["kept_schedule"], found["errors"]) == (0, False, 0)
    assert found["sent_rate"] < 50_000
    assert "the schedule was not kept" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("unique", "--url", "127.0.0.1:1"), "is not a server's URL"),
        (("unique", "--url", "http://127.0.0.1:9"), "no OpenAI-compatible server answers"),
        (("unique", "--model", "no-usage"), "reports no usage"),
        (("unique", "--model", "no-stream"), "does not stream"),
        (("unique", "--data", "x.json"), "reads no file"),
        (("trace",), "needs --data"),
        (("trace", "--data", "missing.jsonl"), "cannot read the trace"),
        (("trace", "--data", str(FAKE)), "line 1: "),
        (("unique", "--output", "/dev/null/out"), "cannot write to"),
    ],
)
def test_bad_input(fake: Fake, words: tuple[str, ...], complaint: str, capsys) -> None:
    options = ["--url", fake.url, "--requests", "1", "--rate", "100"]
    assert main(["bench", "serve", words[0], *options, *words[1:]]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [("--rate", "0"), ("--rate", "1,x"), ("--scale", "2"), ("--requests", "0"), ("--warm-up", "-1")],
)
def test_options_out_of_range(option: tuple[str, str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "serve", "unique", *option])
    assert option[0] in capsys.readouterr().err
