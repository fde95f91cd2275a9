"""The open loop, on a clock that is exact: who is sent when, who waits for whom, and what is kept."""

from __future__ import annotations

import ast
import asyncio
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from kvbench.load.client import Answer
from kvbench.load.record import INTERRUPTED, Record
from kvbench.load.schedule import Run, due_times, openings
from kvbench.workloads import Message, Prose, Request
from tests.kvbench.virtual import run_virtually

SYSTEM = (Message("system", ("You help.",)),)


class Instant:
    """A server whose first token takes `first` seconds, the second as long again."""

    def __init__(self, first: float = 0.25, fails_from: float = 1e9, is_alive: bool = True) -> None:
        self.first, self.fails_from, self.is_alive = first, fails_from, is_alive
        self.sent: list[tuple[float, list[tuple[str, str]]]] = []

    def body(self, messages: list[tuple[str, str]], answer_tokens: int) -> bytes:
        return repr(messages).encode()

    async def send(self, body: bytes, on_token: Callable[[float], None] | None = None) -> Answer:
        loop = asyncio.get_running_loop()
        sent = loop.time()
        self.sent.append((sent, ast.literal_eval(body.decode())))
        number = len(self.sent)
        if sent >= self.fails_from:
            return Answer(sent, [], "", 0, None, 0, "connection lost", unreachable=True)
        times = []
        for _ in range(2):
            await asyncio.sleep(self.first)
            times.append(loop.time())
        return Answer(sent, times, f" answer {number}", 10, 4, 2, "")

    async def alive(self) -> bool:
        await asyncio.sleep(0.01)
        return self.is_alive


def request(user: int, number: int = 0, **changes: object) -> Request:
    return Request(user, number, "", SYSTEM, (f"{user} asks {number}",), 2)._replace(**changes)


def play(server: Instant, requests: list[Request], times: list[float], then=None) -> tuple[list[Record], Run]:
    async def main() -> tuple[list[Record], Run]:
        run = Run(server, requests, times, Prose("test"))
        if then:
            asyncio.get_running_loop().call_later(*then, run)
        return await run(), run

    return run_virtually(main())


def test_an_open_loop_waits_for_no_answer() -> None:
    server = Instant(first=100.0)
    records, run = play(server, [request(user) for user in range(4)], [0.0, 0.5, 0.5, 2.0])
    assert [at for at, _ in server.sent] == [0.0, 0.5, 0.5, 2.0]
    assert [one.sent_s for one in records] == [0.0, 0.5, 0.5, 2.0]
    assert [one.ttft_s for one in records] == [100.0] * 4
    assert [one.latency_s for one in records] == [200.0] * 4
    assert not any(one.lateness_s or one.delay_s or one.error for one in records)
    assert (run.sent, run.running, run.stopped) == (4, 0, "")


def test_rounds_of_one_user_never_overlap_and_hold_the_servers_answers() -> None:
    server = Instant(first=1.0)
    requests = [request(0), request(1), request(0, 1), request(1, 1), request(0, 2)]
    records, _ = play(server, requests, [0.0, 0.5, 1.0, 3.0, 4.5])
    assert [one.sent_s for one in records] == [0.0, 0.5, 2.0, 3.0, 4.5]
    assert [one.delay_s for one in records] == [0.0, 0.0, 1.0, 0.0, 0.0]  # waited for its own answer
    assert [one.lateness_s for one in records] == [0.0] * 5
    last = server.sent[-1][1]
    assert last == [
        ("system", "You help."),
        *[("user", "0 asks 0"), ("assistant", " answer 1")],
        *[("user", "0 asks 1"), ("assistant", " answer 3")],
        ("user", "0 asks 2"),
    ]


def test_a_failed_round_is_not_in_the_next_ones_history() -> None:
    server = Instant(first=1.0, fails_from=2.0)
    records, run = play(server, [request(0), request(0, 1), request(0, 2)], [0.0, 2.0, 3.0])
    assert [one.error for one in records] == ["", "connection lost", "connection lost"]
    assert ("user", "0 asks 1") not in server.sent[2][1]
    assert ("user", "0 asks 0") in server.sent[2][1]
    assert run.stopped == ""  # it answers still


def test_a_dead_server_ends_the_run() -> None:
    server = Instant(first=1.0, fails_from=5.0, is_alive=False)
    records, run = play(server, [request(user) for user in range(20)], [float(n) for n in range(20)])
    assert run.stopped == "the server no longer answers"
    # Those of 0 to 3 s were answered; that of 4 s was being answered; that of 5 s found nobody.
    assert [one.error for one in records] == ["", "", "", "", INTERRUPTED, "connection lost"]


def test_a_stop_keeps_what_there_is() -> None:
    requests = [request(0), request(1), request(1, 1), request(2)]
    records, run = play(
        Instant(first=1.0), requests, [0.0, 1.5, 2.0, 9.0], then=(2.5, lambda run: run.stop("interrupted"))
    )
    # User 1's second round waits, user 2 is not due: neither was sent.
    assert [(one.user, one.round, one.error) for one in records] == [(0, 0, ""), (1, 0, INTERRUPTED)]
    assert run.stopped == "interrupted"


def test_late_is_what_the_generator_is_late_by() -> None:
    class Busy(Instant):
        def body(self, messages: list[tuple[str, str]], answer_tokens: int) -> bytes:
            asyncio.get_running_loop()._jump.now += 0.4  # 0.4 s of work for each request
            return super().body(messages, answer_tokens)

    records, _ = play(Busy(), [request(user) for user in range(4)], [0.0, 1.0, 1.1, 1.2])
    assert [round(one.lateness_s, 6) for one in records] == [0.4, 0.1, 0.4, 0.7]
    assert [one.delay_s for one in records] == [0.0] * 4


def test_arrivals() -> None:
    requests = [request(user) for user in range(1001)]
    fixed = due_times(requests, 4.0, "fixed", random.Random(1))
    assert fixed[:3] == [0.0, 0.25, 0.5]
    poisson = due_times(requests, 4.0, "poisson", random.Random(1))
    assert poisson[0] == 0.0
    assert poisson[-1] == pytest.approx(250.0)  # the asked rate, whatever was drawn
    gaps = [later - earlier for earlier, later in pairwise(poisson)]
    # Exponential: as wide as its mean, and 1/e of it beyond.
    assert sum((gap - 0.25) ** 2 for gap in gaps) / 1000 == pytest.approx(0.0625, rel=0.15)
    assert sum(gap > 0.25 for gap in gaps) / 1000 == pytest.approx(0.368, abs=0.04)
    assert poisson == due_times(requests, 4.0, "poisson", random.Random(1))
    assert poisson != due_times(requests, 4.0, "poisson", random.Random(2))


def test_a_trace_has_times_of_its_own() -> None:
    requests = [request(user, at=at) for user, at in enumerate([0.0, 1.0, 4.0])]
    assert due_times(requests, 0.0, "poisson", random.Random(1)) == [0.0, 1.0, 4.0]
    assert due_times(requests, 0.25, "poisson", random.Random(1)) == [0.0, 2.0, 8.0]


def test_a_trace_whose_times_are_all_the_same_has_the_asked_rate() -> None:
    requests = [request(user, at=0.0) for user in range(3)]
    assert due_times(requests, 0.0, "fixed", random.Random(1)) == [0.0, 0.0, 0.0]
    assert due_times(requests, 0.25, "fixed", random.Random(1)) == [0.0, 4.0, 8.0]
    assert due_times(requests, 0.25, "poisson", random.Random(1))[-1] == 8.0
    assert due_times(requests[:1], 0.25, "poisson", random.Random(1)) == [0.0]
    assert due_times([], 0.25, "poisson", random.Random(1)) == []


def test_a_warm_up_pass_has_each_opening_once() -> None:
    other = (Message("system", ("Another.",)),)
    requests = [request(0), request(1), request(2, opening=other), request(3, opening=())]
    assert openings(requests) == [SYSTEM, other]
