"""Threads that carry chunks between the arena and the tiers, and the loop's side of them.

The event loop owns all state (`Fetches`, `FlushQueue`); a thread is handed a batch, calls one verb of
one tier on memory of the arena, and posts the result back. Slots of a batch stay leased or reserved
until its verb has returned, however long that takes, so a hung store pins what it was given and no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvkeep.errors import RequestRefused, TierUnavailable
from kvkeep.keeper.fetch import Batch, Fetch, Fetches, Need, Stage
from kvkeep.keeper.flush import MOVERS, Flush, FlushQueue, Move
from kvkeep.keeper.index import Records
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.pins import held_chunks
from kvkeep.keeper.probes import Lane, Probes
from kvkeep.terms import Found
from kvkeep.tiers.base import Got, Put
from kvkeep.tiers.open import Opened, WriteWhen

__all__ = ["Asked", "Movers"]

log = logging.getLogger("kvkeep.keeper")

_FLUSH_BYTES = 32 << 20
_MOST_FETCHES = 256
_LATENCY_GUESS = 0.001


class Asked(NamedTuple):
    """A lookup that did not find all."""

    session: str
    space: Namespace
    keys: bytes
    first: int
    recompute: float = 0.0
    """Seconds that the engine takes to compute one chunk (0: unknown, less: do not load)."""
    patience: float = 0.0
    """Seconds that the request may wait to hear what the tiers have."""
    tenant: bytes = b""


class Movers:
    """Moves chunks for one keeper. All methods are the event loop's; `post` runs a call on it."""

    def __init__(
        self,
        keeper: Keeper,
        tiers: Sequence[Opened],
        memory: memoryview,
        post: Callable[[Callable[[], None]], object],
    ) -> None:
        self._keeper = keeper
        self.tiers = list(tiers)
        self._memory = memory
        self._post = post
        self.fetches = Fetches(keeper)
        """What is on its way up, by ticket."""
        self._probes = Probes(self.tiers, post)
        self._readers = [
            Lane(f"read{number}", opened.tier.capabilities.concurrency) for number, opened in enumerate(tiers)
        ]
        self._writers = [Lane(f"write{number}", 1) for number in range(len(tiers))]
        self._queues = [
            FlushQueue(
                keeper,
                number,
                through=opened.write is WriteWhen.THROUGH,
                second_touch=opened.write is WriteWhen.SECOND_TOUCH,
            )
            for number, opened in enumerate(tiers)
        ]
        self._writing = [0] * len(tiers)
        self._reading = [0] * len(tiers)
        self._probing = [False] * len(tiers)
        keeper.queues += self._queues
        for tier, opened in enumerate(tiers):
            opened.tier.attach(self._memory)
            # The first verb makes connections and loads code: not while a request waits for it.
            self._writers[tier].submit(opened.guard.probe)

    # Up

    def fetch(self, asked: Asked, found: Found) -> int:
        """Look below for chunks that a lookup did not find; a ticket if that is worth waiting for, or 0.

        Where asking usually takes longer than the request has patience, what is found is fetched all the
        same, for the next one.
        """
        usable = [opened for tier, opened in enumerate(self.tiers) if self._probes.answers(tier)]
        if asked.recompute < 0 or not usable or len(self.fetches) >= _MOST_FETCHES:
            return 0
        session, space, keys, first, *_, tenant = asked
        fetch = self.fetches.begin(session, space, keys, first, found.epoch, tenant)
        fetch.attended = sum(opened.tier.latency or 0.0 for opened in usable) < asked.patience
        self._ask(fetch, found.chunks, asked.recompute)
        return fetch.ticket if fetch.attended and fetch.stage is not Stage.DONE else 0

    def prefetch(self, space: Namespace, keys: bytes, tenant: bytes) -> Fetch:
        """Read what tiers have of a chain and memory lacks; nobody waits for it. Raises RequestRefused."""
        if len(self.fetches) >= _MOST_FETCHES:
            raise RequestRefused(f"{_MOST_FETCHES} fetches are under way: try again later")
        fetch = self.fetches.begin(MOVERS, space, keys, 0, self._keeper.now(), tenant)
        fetch.attended = False
        self._ask(fetch, held_chunks(self._keeper, space, keys), 0.0)
        return fetch

    def _ask(self, fetch: Fetch, held: int, recompute: float) -> None:
        keys = fetch.question()
        if not keys:
            self._plan(fetch, held, recompute)
            return
        self._probes.find(keys, lambda tiers: self._answered(fetch, keys, tiers, held, recompute))

    def _answered(
        self, fetch: Fetch, keys: list[bytes], tiers: list[int], held: int, recompute: float
    ) -> None:
        if self._keeper.journal is not None:
            self._keeper.journal.probed(fetch.space, keys, tiers)
        fetch.answer(tiers)
        self._ask(fetch, held, recompute)

    def _plan(self, fetch: Fetch, held: int, recompute: float) -> None:
        batches = self.fetches.plan(
            fetch, held, lambda needs, chunks: not recompute or self._seconds(needs) < chunks * recompute
        )
        for batch in batches:
            self._read(batch)
        self.fetches.started(fetch)

    def _seconds(self, needs: list[Need]) -> float:
        """How long reading takes, behind what is being read; tiers work side by side."""
        longest = 0.0
        for tier, nbytes in needs:
            meter = self.tiers[tier].tier
            rate = meter.seconds_per_byte or 0.0  # not known yet: worth finding out
            latency = _LATENCY_GUESS if meter.latency is None else meter.latency
            longest = max(longest, latency + rate * (nbytes + self._reading[tier]))
        return longest

    def _read(self, batch: Batch) -> None:
        opened = self.tiers[batch.tier]
        nbytes = sum(move.length for move in batch.moves)
        self._reading[batch.tier] += nbytes

        def job() -> None:
            try:
                results = opened.tier.get([move.key for move in batch.moves], self._views(batch.moves))
                good = np.array([result is Got.HIT for result in results], np.bool_)
            except TierUnavailable:
                good = np.zeros(len(batch.moves), np.bool_)
            self._post(lambda: landed(good))

        def landed(good: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
            self._reading[batch.tier] -= nbytes
            self.fetches.landed(batch, good)
            self.kick()

        self._readers[batch.tier].submit(job)

    # Down

    def kick(self) -> None:
        """Begin to write what waits, where a tier is idle."""
        for tier, opened in enumerate(self.tiers):
            if not self._writing[tier] and (opened.guard.writable or opened.guard.put_due):
                flush = self._queues[tier].next(_FLUSH_BYTES)
                if flush is not None:
                    self._writing[tier] = len(flush.moves)
                    self._write(tier, flush)

    def write(self, tier: int, records: Records) -> None:
        """Write readable chunks to a tier, behind what waits for it. Raises RequestRefused."""
        guard = self.tiers[tier].guard
        if not guard.writable:
            raise RequestRefused(f"{self.tiers[tier].url} takes no values: {guard.last_error}")
        self._queues[tier].add(records)
        self.kick()

    def written(self, tier: int, records: Records) -> bool:
        """Whether all that will be written of them has been."""
        chunks, bit = self._keeper.chunks, np.uint16(1 << tier)
        left = records[(chunks.stored[records] & bit) == 0]
        waits = bool(self._writing[tier]) or bool((chunks.queued[left] & bit).any())
        return not (len(left) and waits)

    def tick(self) -> None:
        """Now and then: see whether tiers that were switched off are well again, go on without those that do
        not answer, and write what waits."""
        self._probes.tick()
        for tier, opened in enumerate(self.tiers):
            if opened.guard.probe_due and not self._probing[tier]:
                self._probing[tier] = True
                self._writers[tier].submit(lambda tier=tier: self._probe(tier))  # type: ignore[misc]
        self.kick()

    @property
    def unwritten(self) -> int:
        """Chunks that are queued for, or on their way to, a tier that can be written to."""
        return sum(
            len(waiting) + writing
            for waiting, writing, opened in zip(self._queues, self._writing, self.tiers, strict=True)
            if opened.guard.writable
        )

    def _write(self, tier: int, flush: Flush) -> None:
        opened = self.tiers[tier]

        def job() -> None:
            stored, again = np.zeros(len(flush.moves), np.bool_), False
            try:
                stored = self._put(opened, flush.moves)
            except TierUnavailable:
                again = True
            gone = opened.tier.gone()
            self._post(lambda: done(stored, again, gone))

        def done(stored: np.ndarray[Any, np.dtype[np.bool_]], again: bool, gone: list[bytes]) -> None:
            self._writing[tier] = 0
            if gone:
                self._queues[tier].gone(gone)
            self._queues[tier].done(flush, stored, again)
            if not again:
                self.kick()

        self._writers[tier].submit(job)

    def _put(self, opened: Opened, moves: list[Move]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the moves are held by the tier now; those that another host has written are left out."""
        keys = [move.key for move in moves]
        shared = opened.tier.capabilities.shared
        held = np.array(opened.tier.contains(keys) if shared else [False] * len(keys), np.bool_)
        new = [move for move, here in zip(moves, held.tolist(), strict=True) if not here]
        results = opened.tier.put([move.key for move in new], self._views(new)) if new else []
        held[~held] = [result is Put.STORED for result in results]
        return held

    def _probe(self, tier: int) -> None:
        self.tiers[tier].guard.probe()
        self._probing[tier] = False

    def _views(self, moves: list[Move]) -> list[memoryview]:
        return [self._memory[move.offset : move.offset + move.length] for move in moves]

    # Figures and the end

    def figures(self) -> list[dict[str, object]]:
        """Per tier, what `kvkeep status` shows; without asking the medium, which may hang."""
        return [
            {
                "url": opened.url,
                "available": opened.guard.available,
                "writable": opened.guard.writable,
                "last_error": opened.guard.last_error,
                "write": opened.write.value,
                "live": opened.tier.capabilities.live,
                "waiting_chunks": len(waiting) + writing,
                "reading_bytes": reading,
                "lost_chunks": waiting.lost,
                "latency_s": opened.tier.latency,
                "read_GBps": _per_second(opened.tier.seconds_per_byte),
                **opened.tier.figures(),
            }
            for opened, waiting, writing, reading in zip(
                self.tiers, self._queues, self._writing, self._reading, strict=True
            )
        ]

    def close(self) -> None:
        """End the threads, and let go of the tiers; those in a hung verb are left to the process's end."""
        self._probes.close()
        for lane in (*self._readers, *self._writers):
            lane.close()
        deadline = time.monotonic() + 5.0
        for opened in self.tiers:
            closing = threading.Thread(target=opened.tier.close, daemon=True)
            closing.start()
            closing.join(max(0.1, deadline - time.monotonic()))


def _per_second(seconds_per_byte: float | None) -> float | None:
    return None if not seconds_per_byte else round(1e-9 / seconds_per_byte, 3)
