"""The lookup bench at a tiny size, with a real keeper: what it prints, and that it checks the answers."""

import json
import os
from pathlib import Path

import pytest

from kvbench import lookup as bench
from kvbench.servers import own_keeper
from kvkeep.cli import main
from kvkeep.errors import KeeperUnavailable

TINY = ["bench", "lookup", "--tokens", "64,200", "--held", "40,100", "--repeat", "2"]


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    before = children()
    assert main([*TINY, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    cases = printed["cases"]
    assert [(case["tokens"], case["held_chunks"], case["hit"]) for case in cases] == [
        (tokens, held, hit) for held in (40, 100) for tokens in (64, 200) for hit in (True, False)
    ]
    assert all(0 < case["hash_ms"] < case["median_ms"] <= case["p99_ms"] for case in cases)
    assert printed["index_bytes_per_chunk"] > 0
    assert children() == before, "the keeper has ended with the bench"


def test_the_table_has_half_hits_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in ("hit", "half", "miss", "bytes of index per chunk"))


def test_an_answer_that_is_not_the_expected_one_ends_the_bench() -> None:
    with own_keeper(4 << 20) as connection:
        probe = bench.Probe(connection, 16, [64])
        probe.fill(10)
        tokens = probe.prompt(64, 0)
        assert all(taken > 0 for taken in probe.round(tokens, 4))
        with pytest.raises(KeeperUnavailable, match="found 4 chunks"):
            probe.round(tokens, 3)


@pytest.mark.parametrize(
    ("options", "told"), [(["--held", "3"], "at least"), (["--repeat", "0"], "1 or more")]
)
def test_options_out_of_range(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *options]) == 2
    assert told in capsys.readouterr().err


def test_lists_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("many", "0"):
        with pytest.raises(SystemExit):
            main(["bench", "lookup", "--held", text])
    assert "number" in capsys.readouterr().err
