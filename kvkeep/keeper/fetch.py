"""Chunks on their way up: what a prompt lacks in memory and a tier has. State only, no I/O.

A fetch begins with a lookup that did not find all. It asks which of the missing chunks the tiers
hold (`Fetch.question`, `Fetch.answer`: in growing steps from the chain's head, so that a miss costs
one small question), plans batches for those that make a longer usable run, and pins what lands until
its request has taken it. Chunks that another fetch is bringing already are waited for, not read twice.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvkeep.identity import group_keys
from kvkeep.keeper.flush import MOVERS, Move, moves_of
from kvkeep.keeper.index import Keys, Records
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.leases import ClaimKind
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.usable import usable_chunks
from kvkeep.terms import Found

__all__ = ["Batch", "Fetch", "Fetches", "Stage"]

_FIRST_QUESTION = 16  # a miss costs one of these
_BATCH_BYTES = 32 << 20
_MOST = 1 / 2  # of the arena may wait for tiers, where several fetches do: engines need the rest
_HELD, _UNKNOWN, _ABSENT = -1, -2, -3  # what is not the number of a tier


class Stage(enum.IntEnum):
    """How far a fetch is."""

    PROBING = 0
    LOADING = 1
    DONE = 2


@dataclass(eq=False)
class Batch:
    """Values to read from one tier; their records are RESERVED until it has landed."""

    tier: int
    records: Records
    claim: int
    moves: list[Move]
    waiters: list[Fetch] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that wait for it."""
        return sum(move.length for move in self.moves)


class Fetch:
    """One prompt's missing chunks, positions counted from the first one that its engine lacks."""

    def __init__(
        self,
        ticket: int,
        session: str,
        space: Namespace,
        chains: list[Keys],
        first: int,
        epoch: int,
        tenant: bytes,
    ) -> None:
        self.ticket = ticket
        self.session = session
        self.space = space
        self.chains = chains
        """Per group, the keys of chunks first, first+1, …"""
        self.first = first
        self.epoch = epoch
        self.tenant = tenant
        self.stage = Stage.PROBING
        self.attended = True
        """Whether a request will come for what lands."""
        self.leases: list[int] = []
        self.landed: defaultdict[int, list[Records]] = defaultdict(list)
        """By tier, arena offsets of what came from it for this request; leased until that takes it."""
        self.pending: set[Batch] = set()
        self.tiers: list[int] = []
        self.later: list[int] = []
        """Tiers to ask, and those to ask for the rest once its request waits no more."""
        self.held = 0
        """The usable run that memory has, or others are bringing, without it."""
        self._sources = [np.full(len(keys), _UNKNOWN, np.int64) for keys in chains]
        self._windows = [group.window_chunks for group in space.groups]
        self._asked: list[tuple[int, Records]] = []
        self._step = _FIRST_QUESTION

    def known(self, group: int, held: npt.NDArray[np.bool_]) -> None:
        """These chunks of a group are in memory, or on their way there."""
        self._sources[group][held] = _HELD

    def source(self, group: int) -> Records:
        """Per chunk, the tier that has it; negative where it is held, absent or was not asked about."""
        return self._sources[group]

    def question(self) -> list[bytes]:
        """Keys, as tiers name them, that it must be known about next; none when all is determined."""
        end = len(self.chains[0])
        for window, source in zip(self._windows, self._sources, strict=True):
            if window is None:
                absent = np.flatnonzero(source[:end] == _ABSENT)
                end = int(absent[0]) if len(absent) else end
        self._asked = [
            (group, np.flatnonzero(source[:end] == _UNKNOWN)[: self._step])
            for group, (window, source) in enumerate(zip(self._windows, self._sources, strict=True))
            if window is None
        ]
        if not any(len(places) for _, places in self._asked):
            self._asked = self._about_windows(end)
        self._step *= 4
        prefix = self.space.prefix
        return [prefix + key.tobytes() for group, places in self._asked for key in self.chains[group][places]]

    def _about_windows(self, end: int) -> list[tuple[int, Records]]:
        """The last window before `end`, which is most likely all it takes; then everything before it."""
        asked = []
        for start in (True, False):
            for group, (window, source) in enumerate(zip(self._windows, self._sources, strict=True)):
                if window is not None:
                    lowest = max(0, end - window) if start else 0
                    unknown = np.flatnonzero(source[lowest:end] == _UNKNOWN) + lowest
                    asked.append((group, unknown))
            if any(len(places) for _, places in asked) or self.usable() >= end:
                return asked
            asked = []
        return asked

    def answer(self, tiers: Sequence[int]) -> None:
        """Per key of the last question, the tier that has it, or -1."""
        at = 0
        for group, places in self._asked:
            found = np.array(tiers[at : at + len(places)], np.int64)
            self._sources[group][places] = np.where(found < 0, _ABSENT, found)
            at += len(places)
        self._asked = []

    def usable(self, end: int | None = None) -> int:
        """The longest run, of `end` chunks at most, that memory and tiers can give together, as far as is
        known."""
        return usable_chunks([source[:end] >= _HELD for source in self._sources], self._windows)

    def wanted(self, group: int, usable: int) -> Records:
        """Places of a group's chunks that a tier must give for a run of `usable`."""
        window = self._windows[group]
        start = 0 if window is None else max(0, usable - window)
        return np.flatnonzero(self._sources[group][start:usable] >= 0) + start

    def given(self, found: Found) -> Counter[int]:
        """By tier, chunks of what the request's last lookup found: each once, in however many groups."""
        source = np.full(found.chunks, -1)
        for tier, batches in self.landed.items():
            for row in found.offsets:
                source[np.isin(row, np.concatenate(batches))] = tier
        return Counter(source[source >= 0].tolist())


class Fetches:
    """All fetches of one keeper. The event loop's, like the keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._open: dict[int, Fetch] = {}
        self._arriving: dict[int, Batch] = {}
        self._arriving_bytes = 0
        self._next = 1
        keeper.attach(MOVERS)

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, session: str, space: Namespace, keys: bytes, first: int, epoch: int, tenant: bytes = b""
    ) -> Fetch:
        """Note what is missing of chunks first, first+1, … of a chain."""
        chains = [group_keys(keys, space.fingerprint, group)[first:] for group in range(len(space.groups))]
        fetch = Fetch(self._next, session, space, chains, first, epoch, tenant)
        self._next += 1
        self._open[fetch.ticket] = fetch
        for group, chain in enumerate(chains):
            here = self._keeper.chunks.readable(chain) >= 0
            if self._arriving:
                records = self._keeper.chunks.table.find(chain)
                here |= np.array([record in self._arriving for record in records.tolist()], np.bool_)
            fetch.known(group, here)
        fetch.held = fetch.usable()
        return fetch

    def plan(self, fetch: Fetch, worth: Callable[[dict[int, int], int], bool]) -> list[Batch]:
        """All is known: reserve room and make batches, from the chain's head on; none without a gain.

        `worth(needs, chunks)`: whether to read these bytes by tier rather than compute so many chunks."""
        usable, wanted, needs = self._fitting(fetch)
        more = usable - fetch.held
        if more <= 0 or not worth(needs, more):
            self._wait_for_arriving(fetch, usable)
            return []
        owner = self._keeper.tenants.number(fetch.tenant)
        rows: list[tuple[Records, Records, Records]] = []
        for group, lacking in enumerate(wanted):
            keys = fetch.chains[group][lacking]
            new = self._keeper.chunks.table.find(keys) < 0
            places, keys = lacking[new], keys[new]
            if len(places):
                positions = fetch.first + places
                records = self._keeper.place(fetch.space, group, keys, positions, fetch.epoch, owner)
                fits = records >= 0
                rows.append((places[fits], fetch.source(group)[places[fits]], records[fits]))
        self._wait_for_arriving(fetch, usable)
        return self._batches(fetch, rows)

    def _fitting(self, fetch: Fetch) -> tuple[int, list[Records], dict[int, int]]:
        """The longest run for which there is room: its length, per group the places that tiers must give,
        and what that is of each tier."""
        room = self._keeper.arena.nbytes
        if self._arriving:
            room = max(0, int(room * _MOST) - self._arriving_bytes)
        usable = fetch.usable()
        while True:
            wanted = [fetch.wanted(group, usable) for group in range(len(fetch.chains))]
            needs, more = self._needs(fetch, wanted), usable - fetch.held
            total = sum(needs.values())
            if total <= room or more <= 0:
                return usable, wanted, needs
            usable = fetch.usable(fetch.held + more * room // total)

    def _needs(self, fetch: Fetch, wanted: list[Records]) -> dict[int, int]:
        nbytes: dict[int, int] = {}
        for group, places in enumerate(wanted):
            tiers, counts = np.unique(fetch.source(group)[places], return_counts=True)
            for tier, count in zip(tiers.tolist(), counts.tolist(), strict=True):
                nbytes[tier] = nbytes.get(tier, 0) + count * fetch.space.groups[group].slot_bytes
        return nbytes

    def _wait_for_arriving(self, fetch: Fetch, usable: int) -> None:
        if not self._arriving:
            return
        for chain in fetch.chains:
            for record in self._keeper.chunks.table.find(chain[:usable]).tolist():
                batch = self._arriving.get(record)
                if batch is not None and batch not in fetch.pending:
                    batch.waiters.append(fetch)
                    fetch.pending.add(batch)

    def _batches(self, fetch: Fetch, rows: list[tuple[Records, Records, Records]]) -> list[Batch]:
        if not rows:
            return []
        places, tiers, records = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = np.argsort(places, kind="stable")
        out = []
        for tier in np.unique(tiers).tolist():
            mine = records[order][tiers[order] == tier]
            number = np.cumsum(self._keeper.slot_bytes(mine)) // _BATCH_BYTES
            for piece in np.split(mine, np.flatnonzero(np.diff(number)) + 1):
                claim = self._keeper.claims.open(ClaimKind.RESERVATION, MOVERS, piece, 1)
                batch = Batch(tier, piece, claim, moves_of(self._keeper, piece), [fetch])
                fetch.pending.add(batch)
                self._arriving.update(dict.fromkeys(piece.tolist(), batch))
                self._arriving_bytes += batch.nbytes
                out.append(batch)
        return out

    def started(self, fetch: Fetch) -> None:
        """Its batches are under way, or there are none."""
        fetch.stage = Stage.LOADING if fetch.pending else Stage.DONE
        self._close_unattended(fetch)

    def landed(self, batch: Batch, good: npt.NDArray[np.bool_], free: bool = True) -> None:
        """A batch has been read; `good`: what is now in memory, bit for bit. Without `free` its claim is not
        settled: something may still write to its slots."""
        keeper = self._keeper
        for record in batch.records.tolist():
            del self._arriving[record]
        self._arriving_bytes -= batch.nbytes
        kept = batch.records[good]
        keeper.chunks.stored[kept] |= np.uint16(1 << batch.tier)
        keeper.chunks.sealed[kept] = True
        if free:
            keeper.settle(batch.claim, MOVERS, good)
        for fetch in batch.waiters:
            fetch.pending.discard(batch)
            if fetch.attended and len(kept):
                fetch.landed[batch.tier].append(keeper.chunks.offset[kept])
                fetch.leases.append(keeper.hold(fetch.session, kept))
            if not fetch.pending:
                fetch.stage = Stage.DONE
            self._close_unattended(fetch)

    def stage(self, session: str, ticket: int) -> Stage:
        """How far a fetch is; DONE for one that is unknown."""
        fetch = self._open.get(ticket)
        return fetch.stage if fetch is not None and fetch.session == session else Stage.DONE

    def forget(self, session: str, ticket: int) -> Fetch | None:
        """Nobody waits for this fetch any more: what lands is as evictable as all else.

        Returns it; None where the session has no such ticket, or has none any more."""
        fetch = self._open.get(ticket)
        if fetch is None or fetch.session != session or not fetch.attended:
            return None
        for lease in fetch.leases:
            self._keeper.release(session, lease, None)
        fetch.leases.clear()
        self._leave(fetch)
        return fetch

    def session_ended(self, session: str) -> list[int]:
        """A session is gone, and its claims with it; the tickets that it had."""
        gone = [fetch for fetch in self._open.values() if fetch.session == session]
        for fetch in gone:
            fetch.leases.clear()
            self._leave(fetch)
        return [fetch.ticket for fetch in gone]

    def _leave(self, fetch: Fetch) -> None:
        fetch.attended = False
        self._close_unattended(fetch)

    def _close_unattended(self, fetch: Fetch) -> None:
        if not fetch.attended and fetch.stage is Stage.DONE:
            self._open.pop(fetch.ticket, None)
