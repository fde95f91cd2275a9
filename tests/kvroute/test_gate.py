"""Turns: who gets one, and that none is lost."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvroute.gate import Gate
from kvroute.request import BadRequest


def played(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(play(), 10))


async def held(gate: Gate, size: int, until: asyncio.Event) -> None:
    async with gate.turn(size):
        await until.wait()


async def begun(*work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(one) for one in work]
    await asyncio.sleep(0)
    return tasks


def test_a_turn_that_comes_in_the_moment_in_which_the_wait_is_over_is_not_lost() -> None:
    async def play() -> None:
        loop, gate, end = asyncio.get_running_loop(), Gate(1, 1, 0.05, 100), asyncio.Event()
        [first] = await begun(held(gate, 1, end))
        [second] = await begun(held(gate, 1, end))
        late = loop.time() + 0.1
        loop.call_soon(end.set)
        # The loop is held up until both have happened: the first has left, and the second has waited enough.
        loop.call_soon(lambda: time.sleep(max(0.0, late - loop.time())))
        await asyncio.gather(first, second, return_exceptions=True)
        assert (gate.running, gate.bytes, gate.waiting) == (0, 0, 0)
        async with gate.turn(1):
            assert gate.running == 1

    played(play)


def test_one_that_needs_more_room_than_there_is_lets_others_pass_once_it_has_given_up() -> None:
    async def play() -> None:
        gate, end = Gate(9, 9, 30.0, 100), asyncio.Event()
        first, large, small = await begun(held(gate, 60, end), held(gate, 50, end), held(gate, 40, end))
        assert (gate.running, gate.waiting) == (1, 2)  # first come, first served
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        assert (gate.running, gate.bytes, gate.waiting) == (2, 100, 0)
        end.set()
        await asyncio.gather(first, small)
        assert (gate.running, gate.bytes) == (0, 0)

    played(play)


def test_a_body_that_is_shorter_makes_room() -> None:
    async def play() -> None:
        gate, end = Gate(9, 9, 30.0, 100), asyncio.Event()
        async with gate.turn(100) as turn:
            [waiting] = await begun(held(gate, 70, end))
            assert gate.waiting == 1
            gate.resize(turn, 30)
            await asyncio.sleep(0)
            assert (gate.running, gate.bytes, gate.waiting) == (2, 100, 0)
        end.set()
        await waiting
        assert gate.bytes == 0

    played(play)


def test_a_full_queue() -> None:
    async def play() -> None:
        gate, end = Gate(1, 1, 30.0, 100), asyncio.Event()
        tasks = await begun(held(gate, 1, end), held(gate, 1, end))
        with pytest.raises(BadRequest, match="too many"):
            await held(gate, 1, end)
        end.set()
        await asyncio.gather(*tasks)
        assert gate.running == 0

    played(play)
