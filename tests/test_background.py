"""Work that can wait steps aside where its core is wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvkeep import background
from kvkeep.background import GiveWay
from tests.conftest import ChildProcess


def in_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(background.time, "sleep", taken.append)
    return taken


_RIVAL = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("runs", flush=True)
while True:
    pass
"""


def test_it_sleeps_where_another_wants_the_core(
    pauses: list[float], child_process: Callable[..., ChildProcess]
) -> None:
    core = min(os.sched_getaffinity(0))
    assert child_process(_RIVAL, str(core)).line() == "runs"

    def work() -> None:
        os.sched_setaffinity(0, {core})
        give_way, until = GiveWay(), time.monotonic() + 30
        while not pauses and time.monotonic() < until:
            sum(range(10_000))
            give_way()

    in_thread(work)
    assert pauses


def test_how_long_it_sleeps_is_the_callers_choice(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        give_way = GiveWay(0.002)
        monkeypatch.setattr(give_way, "_read", lambda: give_way._waited + 10**9)
        give_way()

    in_thread(work)
    assert pauses == [0.002]


def test_it_goes_on_where_nothing_waits(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        give_way = GiveWay()
        monkeypatch.setattr(give_way, "_read", lambda: give_way._waited + 1000)
        for _ in range(100):
            give_way()

    in_thread(work)
    assert not pauses


def test_a_kernel_that_does_not_count(pauses: list[float]) -> None:
    def work() -> None:
        give_way = GiveWay()
        give_way._figures = give_way._figures.parent / "no such file"
        for _ in range(100):
            give_way()

    in_thread(work)
    assert not pauses


def test_it_waits_while_the_caller_says_busy(pauses: list[float]) -> None:
    answers = [True, True, True, False]

    def work() -> None:
        give_way = GiveWay(0.002, busy=lambda: answers.pop(0))
        give_way()

    in_thread(work)
    assert pauses == [0.002] * 3
    assert not answers
