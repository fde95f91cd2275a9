"""Threads that carry chunks between the arena and the tiers, and the loop's side of them.

The event loop owns all state (`Fetches`, `FlushQueue`); a thread is handed a batch, calls one verb of
one tier on memory of the arena, and posts the result back. Slots of a batch stay leased or reserved
until its verb has returned, however long that takes, so a hung store pins what it was given and no more.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.errors import RequestRefused, TierUnavailable
from kvkeep.keeper.fetch import Batch, Fetch, Fetches, Stage
from kvkeep.keeper.flush import MOVERS, Flush, FlushQueue, Move
from kvkeep.keeper.index import Records
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.probes import Lane, Probes
from kvkeep.terms import Found
from kvkeep.tiers.base import KEY_BYTES, Got, Put
from kvkeep.tiers.open import Opened, WriteWhen

__all__ = ["Asked", "Movers"]

log = logging.getLogger("kvkeep.keeper")

_FLUSH_BYTES = 32 << 20
_MOST_FETCHES = 256
_Which = npt.NDArray[np.bool_]


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
        self.reading = True
        """Whether more may be read; at the keeper's end slots are no longer given out."""
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
        self._checking = [False] * len(tiers)
        self._failures = [0] * len(tiers)  # those that a check has followed
        self._resting = set[int]()  # what did not take all does not take it a moment later
        keeper.queues += self._queues
        for opened in tiers:
            opened.tier.attach(self._memory)

    def start(self) -> None:
        """Ask each tier something, now that calls can be posted: the first verb makes connections and loads
        code, and says how long an answer takes; not while a request waits for it."""
        for tier in range(len(self.tiers)):
            self._probes.find([random.randbytes(KEY_BYTES)], lambda tiers: None, [tier])

    # Up

    def fetch(self, asked: Asked, found: Found) -> int:
        """Look below for chunks that a lookup did not find; a ticket if that is worth waiting for, or 0.

        The request waits for tiers that usually answer within its patience. What others have is fetched all
        the same, for the next one.
        """
        near, far = self._probes.within(asked.patience)
        if asked.recompute < 0 or not (near or far) or len(self.fetches) >= _MOST_FETCHES:
            return 0
        fetch = self._search(asked, found.epoch, near, far)
        if fetch.stage is Stage.DONE:
            self.fetches.forget(asked.session, fetch.ticket)  # its request will not ask again
        return fetch.ticket if fetch.attended else 0

    def prefetch(self, space: Namespace, keys: bytes, tenant: bytes) -> Fetch:
        """Read what tiers have of a chain and memory lacks; nobody waits for it. Raises RequestRefused."""
        if len(self.fetches) >= _MOST_FETCHES or not self.reading:
            why = f"{_MOST_FETCHES} fetches are under way" if self.reading else "this keeper is ending"
            raise RequestRefused(f"{why}: try again later")
        asked = Asked(MOVERS, space, keys, 0, tenant=tenant)
        return self._search(asked, self._keeper.now(), *self._probes.within(asked.patience))

    def _search(self, asked: Asked, epoch: int, near: list[int], far: list[int]) -> Fetch:
        fetch = self.fetches.begin(asked.session, asked.space, asked.keys, asked.first, epoch, asked.tenant)
        fetch.attended = bool(near)
        fetch.tiers, fetch.later = (near, far) if near else (far, [])
        self._ask(asked, fetch)
        return fetch

    def _ask(self, asked: Asked, fetch: Fetch) -> None:
        keys = fetch.question()
        if keys:
            self._probes.find(keys, lambda tiers: self._answered(asked, fetch, keys, tiers), fetch.tiers)
            return
        for batch in self.fetches.plan(fetch, lambda *gain: self._worth(asked, fetch, *gain)):
            self._read(batch)
        self.fetches.started(fetch)
        if fetch.later and fetch.usable() < len(fetch.chains[0]):
            self._search(asked, fetch.epoch, [], fetch.later)

    def _answered(self, asked: Asked, fetch: Fetch, keys: list[bytes], tiers: list[int]) -> None:
        if self._keeper.journal is not None:
            told = [at for at, tier in enumerate(tiers) if tier >= 0 or not fetch.later]
            self._keeper.journal.probed(fetch.space, [keys[at] for at in told], [tiers[at] for at in told])
        fetch.answer(tiers)
        self._ask(asked, fetch)

    def _worth(self, asked: Asked, fetch: Fetch, needs: dict[int, int], chunks: int) -> bool:
        """Whether reading takes less time than computing, behind what is being read; tiers work side by side.

        Where it does not by measurements that are old, what is there is read once more, for the next request.
        """
        if not self.reading:
            return False
        limit, slow = chunks * asked.recompute, list[int]()
        for tier, nbytes in needs.items():
            if self.tiers[tier].tier.read_seconds(nbytes + self._reading[tier]) >= limit:
                slow.append(tier)
        if not slow or not limit:
            return True
        if any(self._reading[tier] or not self.tiers[tier].tier.stale for tier in slow):
            return False
        if fetch.attended:
            self._search(asked, fetch.epoch, [], fetch.tiers)
        return not fetch.attended

    def _read(self, batch: Batch) -> None:
        opened, settle = self.tiers[batch.tier], self._keeper.settle
        self._reading[batch.tier] += batch.nbytes

        def job() -> None:
            try:
                results = opened.tier.get([move.key for move in batch.moves], self._views(batch.moves))
                good, over = np.array([result is Got.HIT for result in results], np.bool_), None
            except TierUnavailable as error:
                good, over = np.zeros(len(batch.moves), np.bool_), error.over
            self._post(lambda: landed(good, over))

        def landed(good: _Which, over: Future[None] | None) -> None:
            self._reading[batch.tier] -= batch.nbytes
            self.fetches.landed(batch, good, over is None)
            if over is not None:  # until then its slots are nobody's
                over.add_done_callback(lambda _: self._post(partial(settle, batch.claim, MOVERS, good)))
            self.kick()

        self._readers[batch.tier].submit(job)

    # Down

    def kick(self) -> None:
        """Begin to write what waits, where a tier is idle."""
        for tier, opened in enumerate(self.tiers):
            if not (self._writing[tier] or tier in self._resting) and (
                opened.guard.writable or opened.guard.put_due
            ):
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
        """Now and then: see whether tiers that failed are well again, go on without those that do not answer,
        and write what waits."""
        self._probes.tick()
        for tier, opened in enumerate(self.tiers):
            guard, newest = opened.guard, self._queues[tier].newest
            failed = guard.available and guard.failures != self._failures[tier]
            if (guard.probe_due or failed) and not self._checking[tier]:
                self._checking[tier] = True
                self._writers[tier].submit(partial(self._check, tier, newest))
        self._resting.clear()
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
            try:
                stored, again = self._put(opened, flush.moves)
            except TierUnavailable:
                stored, again = np.zeros(len(flush.moves), np.bool_), np.ones(len(flush.moves), np.bool_)
            gone = opened.tier.gone()
            self._post(lambda: done(stored, again, gone))

        def done(stored: _Which, again: _Which, gone: list[bytes]) -> None:
            self._writing[tier] = 0
            if gone:
                self._queues[tier].gone(gone)
            self._queues[tier].done(flush, stored, again)
            if again.any():
                self._resting.add(tier)
            self.kick()

        self._writers[tier].submit(job)

    def _put(self, opened: Opened, moves: list[Move]) -> tuple[_Which, _Which]:
        """Which of the moves the tier holds now, and which are to be tried again; what another host has put
        there is left out."""
        keys = [move.key for move in moves]
        shared = opened.tier.capabilities.shared
        held = np.array(opened.tier.contains(keys) if shared else [False] * len(keys), np.bool_)
        new = [move for move, here in zip(moves, held.tolist(), strict=True) if not here]
        results = opened.tier.put([move.key for move in new], self._views(new)) if new else []
        again = ~held
        again[~held] = [result is Put.LATER for result in results]
        held[~held] = [result is Put.STORED for result in results]
        return held, again

    def _check(self, tier: int, newest: list[bytes]) -> None:
        """After a failure: whether the tier answers, and still has what it took last."""
        guard = self.tiers[tier].guard
        failures, held = guard.failures, guard.probe(newest)
        if held:
            self._failures[tier] = failures
        if held and newest and not any(held):
            self._post(partial(self._write_anew, tier))
        self._checking[tier] = False

    def _write_anew(self, tier: int, first: int = 0) -> None:
        if after := self._queues[tier].forgotten(first):
            self._post(partial(self._write_anew, tier, after))

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
