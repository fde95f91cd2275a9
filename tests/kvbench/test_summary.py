"""The figures of a run, by hand."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from kvbench.load.record import INTERRUPTED, Record, csv_rows
from kvbench.load.summary import kept_schedule, parse_slo, spread, summarize

RECORDS = [
    Record(0, 0, 0, "7", 0.0, 0.0, 0.5, [1.5, 1.75, 2.5], 100, 40, 3, 3, ""),  # half a second late
    Record(1, 1, 0, "", 1.0, 1.0, 1.0, [1.25], 50, None, 1, 3, ""),  # short
    Record(2, 0, 1, "", 1.0, 3.0, 3.0, [4.0, 5.0], 10, 0, 4, 4, ""),  # waited; two tokens an event
    Record(3, 2, 0, "", 2.0, 2.0, 2.0, [], 0, None, 0, 3, "500: out\nof memory"),
    Record(4, 3, 0, "", 6.0, 6.0, 6.0, [6.5], 0, None, 0, 3, INTERRUPTED),
]


def test_every_figure() -> None:
    found = summarize(RECORDS, 0.5, parse_slo("ttft=1s,itl=800ms"), "interrupted")
    assert found["ttft_s"] == {"mean": 0.75, "p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0}
    assert found["itl_s"]["mean"] == pytest.approx((0.25 + 0.75 + 1.0) / 3, abs=1e-6)
    assert found["itl_s"]["p50"] == 0.75
    assert found["tpot_s"]["mean"] == pytest.approx((0.5 + 1 / 3) / 2, abs=1e-6)
    assert found["latency_s"] == {"mean": 1.416667, "p50": 2.0, "p90": 2.0, "p95": 2.0, "p99": 2.0}
    assert found["lateness_s"]["mean"] == 0.1
    assert (found["delayed"], found["delay_s"]["mean"]) == (1, 0.4)
    assert (found["requests"], found["errors"], found["unfinished"], found["short_answers"]) == (5, 1, 1, 1)
    assert found["failures"] == {"500: out\nof memory": 1, INTERRUPTED: 1}
    assert (found["prompt_tokens"], found["cached_tokens"], found["output_tokens"]) == (160, 40, 8)
    assert (found["seconds"], found["prompt_tokens_per_s"], found["output_tokens_per_s"]) == (5.0, 32.0, 1.6)
    assert found["goodput"] == {
        "slo": {"ttft_s": 1.0, "itl_s": 0.8},
        "requests": 2,
        "requests_per_s": 0.4,
    }
    assert (found["rate"], found["sent_rate"]) == (0.5, 0.666667)
    assert not found["kept_schedule"]
    assert (found["partial"], found["stopped"]) == (True, "interrupted")


def test_a_run_without_answers_has_no_figures() -> None:
    found = summarize(RECORDS[3:4], 1.0, parse_slo("ttft=1s"), "")
    assert found["ttft_s"] == dict.fromkeys(("mean", "p50", "p90", "p95", "p99"))
    assert found["requests_per_s"] is found["output_tokens_per_s"] is found["cached_tokens"] is None
    assert found["goodput"]["requests"] == 0
    assert summarize([], 1.0, None, "interrupted")["requests"] == 0


def test_percentiles_are_interpolated() -> None:
    assert spread(range(101)) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert spread([1.0, 2.0])["p90"] == 1.9


def test_lateness_is_judged_by_the_interval() -> None:
    def late(seconds: float) -> list[Record]:
        return [RECORDS[1]._replace(ready_s=0.0, sent_s=seconds)] * 100

    assert kept_schedule(late(0.019), 1000.0)
    assert not kept_schedule(late(0.021), 1000.0)
    assert kept_schedule(late(0.09), 0.5)  # of 2 s between requests
    assert not kept_schedule(late(0.11), 0.1)  # however long it is
    assert kept_schedule([], 1.0)


def test_csv(tmp_path: Path) -> None:
    with csv_rows(tmp_path / "requests.csv") as write:
        for record in RECORDS:
            write(record)
    with (tmp_path / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows] == ["", "", "", "500: out of memory", INTERRUPTED]
    first = rows[0]
    assert (first["document"], first["sent_s"], first["first_token_s"]) == ("7", "0.500000", "1.500000")
    assert (first["end_s"], first["ttft_s"], first["tpot_s"]) == ("2.500000", "1.000000", "0.500000")
    assert (first["lateness_s"], first["itl_s"]) == ("0.500000", "0.250000 0.750000")
    assert (first["prompt_tokens"], first["cached_tokens"], first["output_tokens"]) == ("100", "40", "3")
    assert rows[1]["cached_tokens"] == rows[1]["tpot_s"] == ""
    assert rows[2]["delay_s"] == "2.000000"
    assert rows[3]["ttft_s"] == rows[3]["first_token_s"] == rows[4]["ttft_s"] == ""


@pytest.mark.parametrize("text", ["ttft", "ttft=2", "ttft=-2s", "speed=2s", "", "ttft=1s;itl=2s"])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=TIME"):
        parse_slo(text)
