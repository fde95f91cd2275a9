"""One `get` from a peer: what is asked for, what became of it, and reads by NIXL that overlap."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from typing import NamedTuple

from kvkeep.errors import ProtocolError, TierUnavailable
from kvkeep.tiers import peer_wire as wire
from kvkeep.tiers.base import Buffer, Check, Got, Key
from kvkeep.tiers.peer_nixl import Agent
from kvkeep.tiers.peer_wire import Channel, State

__all__ = ["BUSY", "Batch", "Reads"]

BUSY = -1
"""Instead of a result: to be asked for again."""
_READS = 2  # under way at a time: a transfer's end leaves the wire idle otherwise
_SAID = {State.MISSING: Got.MISS, State.OTHER_LENGTH: Got.DAMAGED}


class Batch(NamedTuple):
    """Values of one `get`; places count in its keys."""

    keys: Sequence[Key]
    buffers: Sequence[Buffer]
    results: list[Got | int]
    check: Check
    nixl: bool

    def request(self, part: list[int]) -> wire.Take | wire.Lend:
        """What asks for the values of these places."""
        names = b"".join(self.keys[place] for place in part)
        lengths = [len(self.buffers[place]) for place in part]
        return wire.Lend(names, lengths) if self.nixl else wire.Take(names, lengths)

    def given(self, part: list[int], states: bytes) -> list[int]:
        """Of these places, those whose values come; notes what became of the others."""
        if len(states) != len(part):
            raise ProtocolError(f"{len(states)} answers to {len(part)} questions")
        for place, state in zip(part, states, strict=True):
            self.results[place] = _SAID.get(state, BUSY)
        return [place for place, state in zip(part, states, strict=True) if state == State.GIVEN]

    def came(self, places: Sequence[int]) -> None:
        """These values are in their buffers: are they what they should be?"""
        for place in places:
            whole = self.check(self.keys[place], self.buffers[place])
            self.results[place] = Got.HIT if whole else Got.DAMAGED


class _Read(NamedTuple):
    handle: int
    loan: int
    places: list[int]


class Reads:
    """Reads of one batch from the memory of the agent `name`, which `channel` leads to. `checks` runs the
    checks of what has come. One thread's; raises what a Channel does, and TierUnavailable."""

    def __init__(self, agent: Agent, name: str, channel: Channel, batch: Batch, checks: Executor) -> None:
        self._agent, self._name, self._channel, self._batch = agent, name, channel, batch
        self._executor = checks
        self._out: deque[_Read] = deque()
        self._checks: list[Future[None]] = []

    def begin(self, part: list[int]) -> None:
        """The peer's next answer is about these places: begin to read what it lends."""
        lent = self._channel.reply(wire.Lent)
        places = self._batch.given(part, lent.states)
        if len(places) != len(lent.addresses):
            raise ProtocolError(f"{len(lent.addresses)} addresses of {len(places)} values")
        if places:
            buffers = [self._batch.buffers[place] for place in places]
            handle = self._agent.begin(self._name, buffers, lent.addresses)
            self._out.append(_Read(handle, lent.loan, places))
        self.end(_READS - 1)

    def end(self, left: int) -> None:
        """Wait until no more than `left` reads are under way; what has come is given back, and checked."""
        while len(self._out) > left:
            read = self._out.popleft()
            self._agent.end(read.handle)
            self._channel.send(wire.Back(read.loan))
            try:
                self._checks.append(self._executor.submit(self._batch.came, read.places))
            except RuntimeError:  # the tier was closed meanwhile
                self._batch.came(read.places)

    def close(self) -> None:
        """Nothing is under way any more, however it went."""
        for read in self._out:
            with contextlib.suppress(TierUnavailable):
                self._agent.end(read.handle)
        self._out.clear()
        wait(self._checks)
