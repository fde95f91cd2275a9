"""What a terminal shows while a run goes on; nothing elsewhere."""

from __future__ import annotations

import io
import random

from rich.console import Console

from kvbench.load.progress import Progress
from kvbench.load.record import Record
from kvbench.load.schedule import Run
from kvbench.workloads import WORKLOADS, Given, Prose, Scale


def shown(terminal: bool) -> str:
    prose = Prose("test")
    requests = WORKLOADS["unique"].build(Given(Scale(0.01), random.Random(0), prose))
    run = Run(None, requests, [0.0] * len(requests), prose)  # never started: nothing is asked of a server
    run.sent, run.ttfts = 3, [0.25, 0.5]
    run.records = [
        Record(0, 0, 0, "", 0.0, 0.0, 0.0, [0.25], 9, None, 1, 1, ""),
        Record(1, 1, 0, "", 0.0, 0.0, 0.0, [], 0, None, 0, 1, "timeout"),
    ]
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=terminal, width=160), "unique at 1/s", 20) as progress:
        progress.show(run)
    return screen.getvalue()


def test_a_terminal() -> None:
    text = shown(terminal=True)
    assert "unique at 1/s" in text
    assert "2/20" in text
    assert "1 running, 1 of the last 50 failed, recent TTFT 0.375 s" in text


def test_no_terminal() -> None:
    assert not shown(terminal=False).strip()
