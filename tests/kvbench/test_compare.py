"""`kvkeep bench compare` with real processes: small servers, and a load that writes known figures."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.cli import main
from tests.kvbench.compare_parts import Bench

pytestmark = pytest.mark.filterwarnings("error")
WHOLE = {"whole": 0, "partial": 1, "broken off": 130}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_rounds_are_interleaved_and_ratios_are_taken_round_by_round(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(bench.setup("a", 1.0, "A"), bench.setup("b", 0.25, "B"), bench.setup("c", 1.0, "C"), rounds=2)
    assert main(bench.arguments) == WHOLE["whole"]
    order = [mark.split()[0] for mark in bench.marks()]
    assert order == ["A", "B", "C", "C", "B", "A"]
    assert [mark.split()[2] for mark in bench.marks()] == list("000111")  # a round has one seed
    table = bench.table()
    assert table["TTFT, p50", "a"]["values"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert table["TTFT, p50", "b"]["values"] == {"median": 0.375, "low": 0.25, "high": 0.5}
    # Exact, though times differ from round to round.
    assert table["TTFT, p50", "b"]["ratio"] == {"median": 0.25, "low": 0.25, "high": 0.25}
    assert table["output tokens/s", "b"]["ratio"]["median"] == 4.0
    assert table["latency, p50", "b"]["ratio"]["high"] == pytest.approx(2.25 / 3)
    readings = {name: table[name, "b"]["reading"] for name in ("TTFT, p50", "ITL, mean", "output tokens/s")}
    assert readings == {
        "TTFT, p50": "each_better",  # two rounds are no verdict
        "ITL, mean": "same",
        "output tokens/s": "each_better",
    }
    assert table["TTFT, p50", "c"]["reading"] == "same"
    printed = capsys.readouterr().out
    assert "TTFT, p50, b against a: at 1/s 4 (4…4) times lower in each round." in printed
    assert "ITL, mean, b against a: at 1/s no difference shown (1 (1…1) of it)." in printed


def test_orders_are_balanced_and_six_rounds_are_a_verdict(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "ABC"
    bench.write(*(bench.setup(name.lower(), 1 + (name == "C"), name) for name in names), rounds=6)
    assert main(bench.arguments) == WHOLE["whole"]
    marks = "".join(mark.split()[0] for mark in bench.marks())
    rounds = [marks[at : at + 3] for at in range(0, 18, 3)]
    assert rounds == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC"]
    assert bench.table()["TTFT, p50", "c"]["reading"] == "worse"
    assert "TTFT, p50, c against a: at 1/s 2 (2…2) times higher.\n" in capsys.readouterr().out


def test_the_knee_is_the_highest_rate_that_is_kept_up_with(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each answers at most 1 / TTFT requests per second.
    bench.write(bench.setup("a", 0.25), bench.setup("b", 2.0), rates=[1, 4, 5])
    assert main(bench.arguments) == WHOLE["whole"]
    printed = capsys.readouterr().out
    assert "a answered of what was offered: 1 at 1/s, 1 at 4/s, 0.8 at 5/s; its knee is 4/s." in printed
    assert (
        "b answered of what was offered: 0.5 at 1/s, 0.125 at 4/s, 0.1 at 5/s; it keeps up with none"
        in printed
    )
    assert json.loads((bench.output / "compare.json").read_text())["knees"] == {"a": 4.0, "b": None}


def test_a_rate_has_its_own_table(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(bench.setup("a"), bench.setup("b", 0.5), rates=[1, 0.5])
    assert main(bench.arguments) == WHOLE["whole"]
    printed = capsys.readouterr().out
    assert "1 requests/s" in printed
    assert "0.5 requests/s" in printed
    rows = json.loads((bench.output / "compare.json").read_text())["table"]
    told = {
        (row["rate"], row["setup"]): row["values"]["median"] for row in rows if row["figure"] == "TTFT, p50"
    }
    assert told == {(1.0, "a"): 1.0, (1.0, "b"): 0.5, (0.5, "a"): 0.5, (0.5, "b"): 0.25}
    readings = {row["reading"] for row in rows if row["setup"] == "b" and row["values"]}
    assert readings == {"once"}  # one round claims nothing
    assert bench.report().count("requests per second</caption>") == 2


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("broken", "ended at start with status 1.*no such model: <none>"),
        ("dies", "ended with status 7 under load.*out of memory, really"),
        ("fails", "the load ended with status 1.*the load gave up"),
    ],
)
def test_a_set_up_that_fails_is_reported_and_the_others_go_on(
    bench: Bench, how: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(bench.setup("good"), bench.setup("bad", how=how), bench.setup("fine"), rounds=2)
    assert main(bench.arguments) == WHOLE["partial"]
    told = capsys.readouterr().err
    assert re.search(why, told, re.DOTALL)
    assert "partial: 4 of 6 runs; --resume goes on" in told
    # What does not start is not tried again; what dies under load is.
    assert told.count("bad\n") == (1 if how == "broken" else 2)
    assert bench.table()["TTFT, p50", "fine"]["rounds"] == 2
    assert bench.table()["TTFT, p50", "bad"]["values"] is None
    text = " ".join("".join(parsed(bench.report()).itertext()).split())
    assert re.search(why, text)
    assert "Partial: this report rests on 4 of 6 runs" in text


def test_resume_keeps_whole_runs_and_more_rounds_may_follow(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    setups = [bench.setup("a", how="A"), bench.setup("b", how="B")]
    bench.write(*setups, rounds=1)
    assert main(bench.arguments) == WHOLE["whole"]
    (bench.output / "runs" / "round1-rate1-2-b" / "run.json").unlink()  # as if it had been broken off
    assert main(bench.arguments) == 2
    assert "go on with --resume, or name another directory" in capsys.readouterr().err
    bench.write(*setups, rounds=2)
    assert main([*bench.arguments, "--resume"]) == WHOLE["whole"]
    assert bench.marks() == ["A 1 0", "B 1 0", "B 1 0", "B 1 1", "A 1 1"]
    assert bench.table()["TTFT, p50", "b"]["rounds"] == 2
    bench.write(*setups, rounds=2, kv_cache_gib=2)
    assert main([*bench.arguments, "--resume"]) == 2
    assert "another `kv_cache_gib`" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_broken_off_it_stops_its_servers_and_leaves_a_marked_report(
    bench: Bench, number: signal.Signals, wait_until: Callable[..., None]
) -> None:
    bench.write(bench.setup("a"), bench.setup("b", how="waits"), bench.setup("c"))
    process = subprocess.Popen(
        [sys.executable, "-m", "kvkeep.cli", *bench.arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        wait_until(lambda: len(bench.marks()) == 2)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == WHOLE["broken off"]
    assert "1 of 3 runs, broken off" in told.decode()
    assert "1 of 3 runs, broken off" in bench.report()
    assert "TTFT, p50" in bench.report()
    here = str(bench.folder / "server.py").encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if here in read(path)]
    assert not left


def test_failed_requests_are_pointed_out(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(bench.setup("a"), bench.setup("b", how="overloaded"))
    assert main(bench.arguments) == WHOLE["whole"]
    printed = capsys.readouterr().out
    for said in (
        "b at 1/s, round 1: 3 of 10 requests failed; its figures are of the others.",
        "b at 1/s, round 1: the load was not sent in time; its figures are left out.",
    ):
        assert said in printed
        assert said in bench.report()
    assert printed.count("failed") == 1
    assert bench.table()["TTFT, p50", "b"]["values"] is None
    assert "schedule not kept" in bench.report()


def test_without_its_extra_it_says_what_to_install(bench: Bench) -> None:
    code = f"import sys; sys.modules['yaml'] = None; from kvkeep.cli import main; main({bench.arguments})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "kvkeep: compare needs the module yaml: pip install 'kvkeep[bench]'\n"


def test_a_set_up_that_this_machine_lacks_is_skipped(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.folder / "config.json").touch()
    bench.write(bench.setup("a"), "lmcache", model=str(bench.folder), lmcache="nowhere")
    assert main(bench.arguments) == WHOLE["whole"]
    said = "lmcache is skipped: no LMCache in nowhere: make it with benchmarks/lmcache/setup.sh"
    assert all(said in text for text in (*capsys.readouterr(), bench.report()))


def test_commands_before_and_after(bench: Bench) -> None:
    touch = f"{sys.executable} -c \"open('{bench.folder}/%s', 'a').write('{{port}} ')\""
    hooks = {"before": [touch % "before"], "after": [touch % "after"], "env": {"SECRET": "hunter2", "N": 3}}
    last = hooks["after"]
    bench.write(
        bench.setup("a"),
        bench.setup("b", **hooks),
        bench.setup("c", before=["false"], after=last),
        bench.setup("d", after=["false", *last]),
    )
    assert main(bench.arguments) == WHOLE["partial"]
    before = (bench.folder / "before").read_text().split()
    after = (bench.folder / "after").read_text().split()
    assert after[:1] == before  # the same port
    assert len(after) == 3  # after what had failed, too
    assert "before: false ended with status 1" in bench.report()
    assert "after: false ended with status 1" in bench.report()
    assert bench.table()["TTFT, p50", "d"]["values"] is None
    assert "hunter2" not in bench.report()
    assert "environment: <code>N, SECRET</code>" in bench.report()


def test_the_report_is_well_formed_and_needs_nothing_else(bench: Bench) -> None:
    name = "<b>&\"Zoë\" 'x' $a$ _{port}"
    bench.write(bench.setup("plain", 0.123), bench.setup(name, 0.0456), rounds=2, workload="<i>w</i>")
    assert main(bench.arguments) == WHOLE["whole"]
    page = bench.report()
    root = parsed(page)
    for element in root.iter():
        assert element.tag not in ("script", "link", "iframe", "b", "i")
        for attribute in ("src", "href", "srcset", "action"):
            target = element.get(attribute, "data:image/png;base64,")
            assert target.startswith("data:image/png;base64,")
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page
    text = "".join(root.itertext())
    assert name in text
    assert "<i>w</i>" in text
    table = bench.table()
    for (figure, _), row in table.items():
        assert row["values"] is not None or figure.startswith("TPOT")  # which this load does not tell
    assert table["cached of prompt tokens", "plain"]["values"]["median"] == 0.25
    assert table["good requests/s", "plain"]["values"]["median"] == 0.5
    for figure in (
        "184 (123…246) ms",
        "68.4 (45.6…91.2) ms",
        "250 (250…250) ms",
        "0.371 (0.371…0.371)",
    ):
        assert figure in text, figure
    for fact in ("KV pool of 1 GiB", "seed 0", "2 rounds", "GiB; Linux", "python 3."):
        assert fact in text, fact
    assert (bench.output / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_in_a_browser(bench: Bench) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no headless browser here: apt-get install chromium")
    bench.write(bench.setup("a"), bench.setup("b", 0.25), rounds=2)
    assert main(bench.arguments) == WHOLE["whole"]
    picture = bench.folder / "screen.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=800,900"]
    command += [f"--user-data-dir={bench.folder}/profile", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--screenshot={picture}", "--dump-dom", str(bench.output / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 (4…4) times lower in each round" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parsed(page: str) -> ET.Element:
    """As XML: every element closed, every & and < escaped; and as HTML, whose parser must agree."""

    class Texts(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    root = ET.fromstring(page.removeprefix("<!DOCTYPE html>"))
    texts = Texts()
    texts.feed(page)
    assert "".join("".join(texts.texts).split()) == "".join("".join(root.itertext()).split())
    return root
