"""How many requests run at a time, how much memory their bodies take, and how many wait for their turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvroute.request import BadRequest

__all__ = ["Gate", "Turn"]


@dataclass(eq=False)
class Turn:
    """A request's leave to run, with room for so many bytes."""

    size: int


class Gate:
    """First come, first served: at most `most` requests, whose bodies have at most `room` bytes together."""

    def __init__(self, most: int, queue: int, wait: float, room: int) -> None:
        self.running = 0
        self.bytes = 0
        self._most, self._queue, self._wait, self._room = most, queue, wait, room
        self._waiting: deque[tuple[Turn, asyncio.Future[None]]] = deque()
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

    @contextlib.asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[Turn]:
        """A turn, with room for a body of so many bytes. Raises BadRequest where none comes in time."""
        turn = Turn(size)
        if not self._waiting and self._fits(turn):
            self._take(turn)
        else:
            await self._await(turn)
        try:
            yield turn
        finally:
            self._leave(turn)

    def resize(self, turn: Turn, size: int) -> None:
        """Its body has turned out to be shorter."""
        self.bytes += size - turn.size
        turn.size = size
        self._admit()

    async def _await(self, turn: Turn) -> None:
        if len(self._waiting) >= self._queue:
            raise BadRequest("too many requests are waiting: try again later", 503, "overloaded")
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, came))
        try:
            await asyncio.wait_for(came, self._wait)
        except (asyncio.TimeoutError, asyncio.CancelledError) as error:
            if came.done() and not came.cancelled():  # it came in the same moment
                self._leave(turn)
            if isinstance(error, asyncio.CancelledError):
                raise
            late = f"no turn within {self._wait:g} s: try again later"
            raise BadRequest(late, 503, "overloaded") from error
        finally:
            if (turn, came) in self._waiting:
                self._waiting.remove((turn, came))
                self._admit()  # there may be room for who is behind it

    def _fits(self, turn: Turn) -> bool:
        return self.running < self._most and self.bytes + turn.size <= self._room

    def _take(self, turn: Turn) -> None:
        self.running += 1
        self.bytes += turn.size

    def _leave(self, turn: Turn) -> None:
        self.running -= 1
        self.bytes -= turn.size
        self._admit()
        if not self.running:
            self._empty.set()

    def _admit(self) -> None:
        """Give those their turn who can have it."""
        while self._waiting and self._fits(self._waiting[0][0]):
            turn, came = self._waiting.popleft()
            if not came.done():
                self._take(turn)
                came.set_result(None)
