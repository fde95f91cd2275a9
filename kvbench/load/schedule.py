"""When requests are due, and sending them then: an open loop, which waits for no answer.

The clock is the event loop's. Only the rounds of one user wait for each other: a question cannot be asked
before the answer that it follows.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from kvbench.load.client import Answer
from kvbench.load.record import INTERRUPTED, Record
from kvbench.workloads import Message, Prose, Request

__all__ = ["ARRIVALS", "Run", "Sender", "due_times"]

ARRIVALS = ("poisson", "fixed")


class Sender(Protocol):
    """What a run needs of a server."""

    def body(self, messages: list[tuple[str, str]], answer_tokens: int) -> bytes:
        """The request for a conversation."""
        ...

    async def send(self, body: bytes, on_token: Callable[[float], None] | None = None) -> Answer:
        """Send one and read the answer to its end."""
        ...

    async def alive(self) -> bool:
        """Whether the server still answers."""
        ...


def due_times(requests: Sequence[Request], rate: float, arrivals: str, draw: random.Random) -> list[float]:
    """Seconds from the start at which each request is due; the first at 0.

    Poisson arrivals are stretched to the asked rate, so that a run of few requests has it too. A trace has
    times of its own: `rate` 0 leaves them, another stretches them to that mean; where they are all the same
    there is nothing to stretch, and gaps are made.
    """
    times = [request.at or 0.0 for request in requests]
    if not rate:
        return times
    if not any(times):
        gaps = (draw.expovariate(1.0) if arrivals == "poisson" else 1.0 for _ in requests[1:])
        times = list(accumulate(gaps, initial=0.0))[: len(requests)]
    span = times[-1] if times else 0.0
    return [at * (len(times) - 1) / (rate * span) for at in times] if span else times


class Run:
    """One pass over a workload's requests."""

    def __init__(
        self,
        server: Sender,
        requests: Sequence[Request],
        times: Sequence[float],
        prose: Prose,
        on_change: Callable[[Run], None] = lambda run: None,
        on_record: Callable[[Record], object] = lambda record: None,
    ) -> None:
        self.records: list[Record] = []
        self.sent = 0
        self.stopped = ""
        """Why it ended early; empty if it did not."""
        self.ttfts: list[float] = []
        self._server, self._prose = server, prose
        self._on_change, self._on_record = on_change, on_record
        self._requests, self._times = requests, times
        self._rounds = Counter(request.user for request in requests)
        self._said: dict[int, list[tuple[str, str]]] = {}
        self._last: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._looking = False

    @property
    def running(self) -> int:
        """Requests sent that have not ended."""
        return self.sent - len(self.records)

    async def __call__(self) -> list[Record]:
        """Send all; returns a record for each that was sent, in the order of the schedule."""
        self._start = asyncio.get_running_loop().time()
        self._dispatcher = asyncio.create_task(self._dispatch())
        await asyncio.wait({self._dispatcher})
        if not self._dispatcher.cancelled():
            self._dispatcher.result()
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks)
            self._tasks -= done
            for task in done:
                if not task.cancelled():
                    task.result()
        return sorted(self.records)

    def stop(self, reason: str) -> None:
        """Send no more and cut off what runs."""
        self.stopped = self.stopped or reason
        for task in {self._dispatcher, *self._tasks} - {None, asyncio.current_task()}:
            assert task is not None
            task.cancel()

    async def _dispatch(self) -> None:
        now = asyncio.get_running_loop().time
        for number, (request, due) in enumerate(zip(self._requests, self._times, strict=True)):
            # Made ahead of its time where that can be, but not while the request before is being sent.
            await asyncio.sleep((self._start + due - now()) / 2)
            before = self._last.get(request.user)
            waits = before is not None and not before.done()
            body = None if waits else self._body(request)
            await asyncio.sleep(self._start + due - now())
            task = asyncio.create_task(self._one(number, request, due, body, before))
            self._tasks.add(task)
            if self._rounds[request.user] > 1:
                self._last[request.user] = task

    async def _one(
        self, number: int, request: Request, due: float, body: bytes | None, before: asyncio.Task[None] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        ready = due
        if before is not None and not before.done():
            await asyncio.wait({before})
            ready = max(due, loop.time() - self._start)
        body = body or self._body(request)
        self.sent += 1
        sent = loop.time()
        try:
            answer = await self._server.send(body, self._first_token)
        except asyncio.CancelledError:  # the task ends here anyway, with a record of how far it came
            answer = Answer(sent, [], "", 0, None, 0, INTERRUPTED)
        self._note(number, request, due, ready, answer)
        if answer.unreachable and not self._looking:
            self._looking = True
            if not await self._server.alive():
                self.stop("the server no longer answers")
            self._looking = False

    def _note(self, number: int, request: Request, due: float, ready: float, answer: Answer) -> None:
        if self._rounds[request.user] > 1 and not answer.error:
            said = self._said.setdefault(request.user, [])
            said += [("user", self._prose.text(request.says)), ("assistant", answer.text)]
        self.records.append(
            Record(
                number,
                *(request.user, request.round, request.document),
                *(due, ready, answer.sent - self._start),
                [at - self._start for at in answer.times],
                answer.prompt_tokens,
                answer.cached_tokens,
                *(answer.output_tokens, request.answer_tokens),
                answer.error,
            )
        )
        self._on_record(self.records[-1])
        self._on_change(self)

    def _body(self, request: Request) -> bytes:
        messages = [(role, self._prose.text(parts)) for role, parts in request.opening]
        messages += self._said.get(request.user, [])
        messages.append(("user", self._prose.text(request.says)))
        return self._server.body(messages, request.answer_tokens)

    def _first_token(self, ttft: float) -> None:
        self.ttfts.append(ttft)
        self._on_change(self)


def openings(requests: Sequence[Request]) -> list[tuple[Message, ...]]:
    """What a warm-up pass sends: each distinct opening once, in order of first use."""
    return list(dict.fromkeys(request.opening for request in requests if request.opening))
