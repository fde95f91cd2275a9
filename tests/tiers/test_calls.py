"""Calls that cannot be cancelled, the gate to the caller's buffers, and memory for late calls."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import pytest

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.calls import Calls, Gate
from kvkeep.tiers.landing import Landings, groups, offsets
from kvkeep.tiers.threads import Threads


def test_results_and_errors_come_back() -> None:
    calls = Calls("test", 2)
    assert calls.run(lambda: 7, 1) == 7
    with pytest.raises(TierUnavailable, match="test: lost"):
        calls.run(lambda: (_ for _ in ()).throw(OSError("lost")), 1)
    with pytest.raises(TierUnavailable, match="as it is"):
        calls.run(lambda: (_ for _ in ()).throw(TierUnavailable("as it is")), 1)
    assert calls.close(1)
    with pytest.raises(TierUnavailable, match="closed"):
        calls.begin(lambda: 7)


def test_an_error_that_nobody_thought_of_is_one_of_the_tier(monkeypatch) -> None:
    said: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(args.exc_type))
    calls = Calls("test", 1)
    with pytest.raises(TierUnavailable, match="unexpected"):
        calls.run(lambda: {}["nothing"], 5)
    assert calls.run(lambda: 7, 5) == 7
    assert calls.close(1)
    assert said == [KeyError]


def test_who_waits_gives_up_at_the_deadline_and_the_call_goes_on() -> None:
    calls, go_on = Calls("test", 2), threading.Event()
    late: list[int] = []
    future = calls.begin(lambda: go_on.wait(10) and 7)
    future.add_done_callback(lambda done: late.append(done.result()))
    began = time.monotonic()
    with pytest.raises(TierUnavailable, match=r"no answer within 0\.1 s"):
        calls.end(future, 0.1)
    assert time.monotonic() - began < 2
    assert calls.out == 1
    assert calls.run(lambda: 8, 1) == 8
    calls.begin(lambda: go_on.wait(10))
    with pytest.raises(TierUnavailable, match="2 calls have not come back"):
        calls.begin(lambda: 9)
    go_on.set()
    wait([future], 5)
    assert calls.close(5)
    assert late == [7]


def test_close_ends_waits_and_says_whether_somebody_is_inside() -> None:
    calls, go_on, ended = Calls("test", 1), threading.Event(), list[str]()
    future = calls.begin(lambda: go_on.wait(10))

    def waiting() -> None:
        try:
            calls.end(future)
        except TierUnavailable as error:
            ended.append(str(error))

    thread = threading.Thread(target=waiting)
    thread.start()
    assert not calls.close(0.05)
    thread.join(5)
    assert ended == ["test: the tier is closed"]
    go_on.set()
    assert calls.close(5)


def test_calls_that_queue_run_in_turn_and_can_be_cancelled_before() -> None:
    calls, go_on, ran = Calls("test", 2, queues=True), threading.Event(), list[int]()

    def work(number: int) -> None:
        go_on.wait(10)
        ran.append(number)

    futures = [calls.begin(lambda number=number: work(number)) for number in range(6)]
    while not (futures[0].running() and futures[1].running()):
        time.sleep(0.001)
    assert [future.cancel() for future in futures] == [False, False, True, True, True, True]
    go_on.set()
    assert calls.close(5)
    assert sorted(ran) == [0, 1]


def test_a_gate_that_is_shut_lets_nobody_in_and_waits_for_who_is_inside() -> None:
    gate, inside, leave, order = Gate(), threading.Event(), threading.Event(), list[str]()

    def pass_it() -> None:
        with gate.passing() as may:
            assert may
            inside.set()
            leave.wait(10)
            order.append("left")

    thread = threading.Thread(target=pass_it)
    thread.start()
    inside.wait(5)
    threading.Timer(0.05, leave.set).start()
    gate.shut()
    order.append("shut")
    thread.join()
    assert order == ["left", "shut"]
    with gate.passing() as may:
        assert not may


def test_landings_that_are_lost_are_replaced_until_too_many_are(caplog) -> None:
    registered: list[int] = []
    landings = Landings("test", 4096, 1, lambda landing: registered.append(landing.address))
    for _ in range(7):
        if landings.lose(landings.take(1)):
            landings.add()
    assert len(set(registered)) == 8
    assert not landings.lose(landings.take(1))
    assert landings.take_free() is None
    with pytest.raises(TierUnavailable, match="restart it"):
        landings.take(0.01)
    assert "keeps its memory" in caplog.text


def test_groups_fill_a_landing_and_longer_values_are_alone() -> None:
    buffers = [memoryview(bytearray(size)) for size in (3, 4, 4, 11, 1, 9, 10, 1)]
    found = list(groups(buffers, 10))
    assert [list(places) for places in found] == [[0, 1], [2], [3], [4, 5], [6], [7]]
    assert list(groups([], 10)) == []
    assert list(offsets([3, 4, 5])) == [0, 3, 7]


def test_a_batch_has_threads_though_two_others_hang() -> None:
    """Reads do not queue behind what is written in the background."""
    helpers, leave = Threads(2, "test"), threading.Event()
    inside, together = threading.Barrier(5, timeout=10), threading.Barrier(2, timeout=3)

    def hang(_: int) -> None:
        inside.wait()
        leave.wait(10)

    others = [threading.Thread(target=helpers.each, args=(range(2), hang)) for _ in range(2)]
    for other in others:
        other.start()
    inside.wait()
    try:
        helpers.each(range(2), lambda _: together.wait() and None)
    finally:
        leave.set()
        for other in others:
            other.join()
        helpers.close()
