"""How many requests run at a time, and how many wait for their turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from kvroute.request import BadRequest

__all__ = ["Gate"]


class Gate:
    """First come, first served. `async with` takes a turn; raises BadRequest where the queue is full, or the
    turn does not come in `wait` seconds."""

    def __init__(self, most: int, queue: int, wait: float) -> None:
        self.running = 0
        self._most, self._queue, self._wait = most, queue, wait
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._empty = asyncio.Event()

    async def emptied(self, seconds: float) -> bool:
        """Wait until nothing runs; whether it came to that in time."""
        self._empty.clear()
        if self.running:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)
        return not self.running

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def __aenter__(self) -> None:
        if self.running < self._most and not self._waiting:
            self.running += 1
            return
        if len(self._waiting) >= self._queue:
            raise BadRequest("too many requests are waiting: try again later", 503, "overloaded")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait_for(turn, self._wait)  # who leaves hands us the turn with it
        except asyncio.TimeoutError as error:
            raise BadRequest(
                f"no turn within {self._wait:g} s: try again later", 503, "overloaded"
            ) from error
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
        if not self.running:
            self._empty.set()
