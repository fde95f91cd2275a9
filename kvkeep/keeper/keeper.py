"""The keeper's state machine: what is held, who reads, who writes, what goes.

No I/O, no clock, no locks: one event loop owns it and calls it with batches. Every operation
leaves the books balanced (`check_integrity`) or raises before it changed anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvkeep.errors import ConfigError, RequestRefused
from kvkeep.identity import group_keys
from kvkeep.keeper.arena import Arena, SlotClass
from kvkeep.keeper.books import check_books
from kvkeep.keeper.chains import check_distinct, one_kind, runs
from kvkeep.keeper.chunks import Chunks, ChunkState
from kvkeep.keeper.index import Keys, Records
from kvkeep.keeper.leases import Claim, ClaimKind, Claims
from kvkeep.keeper.namespaces import Answer, Counters, Namespace
from kvkeep.keeper.policy import POLICIES, Policy, make_policy
from kvkeep.keeper.tenants import Tenants, first_to_go
from kvkeep.keeper.usable import usable_chunks
from kvkeep.terms import REFUSED, Found, GroupSpec, Reserved

if TYPE_CHECKING:
    from kvkeep.keeper.flush import FlushQueue
    from kvkeep.keeper.journal import Journal

__all__ = ["Keeper"]


class Keeper:
    """Owns the books of one arena of `nbytes`; `policy` names the eviction policy.

    `trailer`: bytes at the end of every slot that are not the engines' (the seal of values below).
    `quotas`: see `Tenants`.
    """

    def __init__(self, nbytes: int, policy: str, trailer: int = 0, quotas: Sequence[str] = ()) -> None:
        self.arena = Arena(nbytes)
        self.trailer = trailer
        self.chunks = Chunks()
        self.claims = Claims()
        self.tenants = Tenants(quotas)
        self.namespaces: list[Namespace] = []
        self.counters = Counters()
        self.queues: list[FlushQueue] = []
        """One per tier; told of what is committed and what is used."""
        self.journal: Journal | None = None
        """Told of what comes and goes, where an engine publishes that."""
        self._by_fingerprint: dict[bytes, Namespace] = {}
        if policy not in POLICIES:
            raise ConfigError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
        self._policy_name = policy
        self.kinds: list[SlotClass] = []
        self.policies: list[Policy] = []
        """One for each of `kinds`."""
        self._clock = 0

    # Sessions

    def attach(self, session: str) -> None:
        """A connection of `session` has opened."""
        self.claims.attach(session)

    def detach(self, session: str) -> None:
        """A connection of `session` has closed; with the last one its claims end."""
        for claim in self.claims.detach(session):
            self._end(claim, completed=False)

    def knows(self, fingerprint: bytes) -> bool:
        """Whether a namespace has been opened here."""
        return fingerprint in self._by_fingerprint

    def open_namespace(
        self,
        fingerprint: bytes,
        label: str,
        groups: Sequence[GroupSpec],
        parts: int,
        readers: int,
        chunk_tokens: int = 0,
    ) -> Namespace:
        """Open a namespace, or find it again. Raises RequestRefused if it differs from before,
        ConfigError if its chunks do not fit the arena."""
        known = self._by_fingerprint.get(fingerprint)
        if known is not None:
            if (known.groups, known.parts, known.readers) != (tuple(groups), parts, readers):
                raise RequestRefused("this namespace is open with another geometry")
            return known
        for group in groups:
            self.arena.size_class(group.slot_bytes + self.trailer)
        number = len(self.namespaces)
        space = Namespace(number, fingerprint, label, tuple(groups), parts, readers, chunk_tokens)
        self.namespaces.append(space)
        self._by_fingerprint[fingerprint] = space
        return space

    # Reading

    def lookup(self, session: str, space: Namespace, keys: bytes, first: int = 0, epoch: int = 0) -> Found:
        """Lease the longest usable run of chunks first, first+1, … of a chain.

        `keys`: 16 bytes per chunk of the prompt, from its beginning. The `first` chunks are in the
        engine already: they are marked as used, since a chain is worth only what is held from its
        start. Once per request, since ARC and S3-FIFO take a second touch for reuse: `epoch` is that of
        its lookup before, and what was brought or used since then is not marked again.
        """
        epoch = epoch or self.now()
        named = [group_keys(keys, space.fingerprint, group) for group in range(len(space.groups))]
        chains = [self.chunks.table.find(names) for names in named]
        for counters in (self.counters, space.counters):
            counters.lookups += 1
        if all((chain < 0).all() for chain in chains):
            return Found(0, 0, epoch, [])
        records = [chain[first:] for chain in chains]
        held = [self.chunks.committed(found) for found in records]
        windows = [group.window_chunks for group in space.groups]
        usable = usable_chunks(held, windows)
        positions = [np.flatnonzero(chain[: first + usable] >= 0) for chain in chains]
        used = [chain[places] for chain, places in zip(chains, positions, strict=True)]
        check_distinct(np.concatenate(used))
        for chain, places in zip(used, positions, strict=True):
            new = self.chunks.epoch[chain] < epoch
            self._touch(chain[new], places[new], epoch)
        if not usable:
            return Found(0, 0, epoch, [])
        starts = [0 if window is None else max(0, usable - window) for window in windows]
        leased = [found[start:usable] for found, start in zip(records, starts, strict=True)]
        together = np.concatenate(leased)
        offsets = [
            np.concatenate([np.full(start, -1, np.int64), self.chunks.offset[needed]])
            for needed, start in zip(leased, starts, strict=True)
        ]
        return Found(self.hold(session, together, space.readers), usable, epoch, offsets)

    def answered(self, space: Namespace, tenant: bytes, answer: Answer) -> None:
        """A request that looked up waits for no tier, or no more. Whatever counts requests counts here."""
        for counters in (self.counters, space.counters):
            counters.add(answer)
        self.tenants.asked(tenant, answer.asked, answer.found)

    def hold(self, session: str, records: Records, ranks: int = 1) -> int:
        """Lease readable chunks until so many ranks have released them; the lease's number.

        Raises RequestRefused on a repeat."""
        check_distinct(records)
        self.chunks.lease(records)
        return self.claims.open(ClaimKind.LEASE, session, records, ranks)

    def now(self) -> int:
        """The epoch of what begins now without a lookup."""
        self._clock += 1
        return self._clock

    def release(self, session: str, lease: int, rank: int | None) -> None:
        """A rank has read what it was leased; rank None gives the whole lease back unread."""
        claim = self.claims.report(ClaimKind.LEASE, session, lease, rank)
        if claim is not None:
            self._end(claim, completed=True)

    # Writing

    def reserve(
        self,
        session: str,
        space: Namespace,
        keys: bytes,
        wanted: Sequence[Sequence[bool]],
        first: int,
        epoch: int,
        tenant: bytes = b"",
    ) -> Reserved:
        """Reserve slots for those of the wanted chunks that are not held.

        `keys`: 16 bytes per chunk, of positions first, first+1, … of one chain; `wanted[g][i]`:
        group g has chunk i to give; `epoch`: from the request's lookup (0: now). Chunks for which nothing
        older than the request can be evicted (of its tenant, above the quota) are refused, never waited for.
        """
        check_distinct(np.frombuffer(keys, "<u8")[::2])  # half a key tells chunks apart as surely
        epoch = min(epoch, self._clock) or self.now()
        offsets, written, owner = list[Records](), [np.zeros(0, np.int64)], self.tenants.number(tenant)
        try:
            for group, flags in enumerate(wanted):
                placed = np.full(len(keys) // 16, -1, np.int64)
                named = group_keys(keys, space.fingerprint, group)
                found = self.chunks.table.find(named)
                # What somebody else wrote is used too: no parent may be older than what is placed behind it.
                known = np.flatnonzero(found >= 0)
                self._touch(found[known], first + known, epoch)
                new = np.flatnonzero((found < 0) & np.asarray(flags, np.bool_))
                if len(new):
                    records = self.place(space, group, named[new], first + new, epoch, owner)
                    placed[new] = np.where(records >= 0, self.chunks.offset[records], REFUSED)
                    written.append(records[records >= 0])
                offsets.append(placed)
        except BaseException:
            self._drop(np.concatenate(written), evicted=False)  # no claim would ever end them
            raise
        together, kind = np.concatenate(written), ClaimKind.RESERVATION
        number = self.claims.open(kind, session, together, space.parts) if len(together) else 0
        return Reserved(number, offsets, epoch)

    def commit(self, session: str, reservation: int, part: int) -> None:
        """A rank has written its part; with the last part the chunks become readable."""
        claim = self.claims.report(ClaimKind.RESERVATION, session, reservation, part)
        if claim is not None:
            self._end(claim, completed=True)

    def abort(self, session: str, reservation: int) -> None:
        """Give a reservation back unwritten. Only once no rank writes to it any more."""
        claim = self.claims.report(ClaimKind.RESERVATION, session, reservation, None)
        if claim is not None:
            self._end(claim, completed=False)

    def place(
        self, space: Namespace, group: int, keys: Keys, positions: Records, epoch: int, tenant: int
    ) -> Records:
        """RESERVED records with a slot each for keys that are absent and distinct; -1 for those that were
        refused. `positions`: of each in its chain, ascending; `tenant`: its number. The caller opens a claim
        on them."""
        number = self._kind(space.groups[group].slot_bytes + self.trailer)
        kind, policy = self.kinds[number], self.policies[number]
        records = self.chunks.add(keys, space.number, number, epoch, positions, tenant)
        self.tenants.took(tenant, len(records), kind.slot_bytes)
        names = (keys[:, 0] >> np.uint64(4)).tolist()
        for run in runs(positions):
            policy.insert(records[run], names[run], epoch, int(positions[run.start]))
        refused = self._keep_quota(tenant, records)
        fitting = records[~np.isin(records, refused)] if len(refused) else records
        refused = np.concatenate((refused, self._make_room(number, fitting)))
        placed = records
        if len(refused):
            self._count("refused_chunks", refused)
            policy.remove(refused, evicted=False)
            self.chunks.forget(refused)
            self._recycle(refused)
            placed = np.where(np.isin(records, refused), -1, records)
        self.chunks.offset[placed[placed >= 0]] = self.arena.allocate(kind, int((placed >= 0).sum()))
        return placed

    def settle(self, claim: int, session: str, good: npt.NDArray[np.bool_]) -> None:
        """End a reservation of which only the `good` records were filled; the others are dropped."""
        ended = self.claims.report(ClaimKind.RESERVATION, session, claim, None)
        assert ended is not None
        self._commit(ended.records[good], "fetched_chunks")
        self._drop(ended.records[~good], evicted=False)

    def slot_bytes(self, records: Records) -> Records:
        """Length of each record's slot, in bytes."""
        sizes = np.array([kind.slot_bytes for kind in self.kinds] or [0], np.int64)
        return np.asarray(sizes[self.chunks.kind[records]])

    # Housekeeping

    def clear(self, space: Namespace | None, tenant: bytes = b"") -> int:
        """Forget all that is held (of one namespace, of one tenant); leased chunks go with their last lease.

        Returns how many chunks were forgotten. Reservations stay: what is being written is new.
        """
        records = self.chunks.in_state(ChunkState.COMMITTED)
        if space is not None:
            records = records[self.chunks.namespace[records] == space.number]
        if tenant:
            number = self.tenants.find(tenant)
            records = records[self.chunks.tenant[records] == number] if number is not None else records[:0]
        self.forget(records)
        return len(records)

    def forget(self, records: Records) -> None:
        """Forget readable chunks; leased ones go with their last lease."""
        self._drop(records, evicted=False)

    def usage(self) -> tuple[Records, Records]:
        """Per namespace: readable chunks, all groups together, and bytes of slots that are taken."""
        return self.chunks.usage(len(self.namespaces), [kind.slot_bytes for kind in self.kinds])

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, bytes, leases, tenants and policies agree. Slow: for tests."""
        check_books(self)

    # Below: how room is made

    def _kind(self, slot_bytes: int) -> int:
        kind = self.arena.size_class(slot_bytes)
        if kind not in self.kinds:
            self.kinds.append(kind)
            self.policies.append(make_policy(self._policy_name, self.arena.nbytes // kind.slot_bytes))
        return self.kinds.index(kind)

    def _touch(self, records: Records, positions: Records, epoch: int) -> None:
        """Note one request's use of chunks of one group, at `positions` of its chain."""
        if not len(records):
            return
        policy = self.policies[one_kind(self.chunks.kind[records])]
        self.chunks.epoch[records] = np.maximum(self.chunks.epoch[records], epoch)
        for run in runs(positions):
            policy.touch(records[run], epoch, int(positions[run.start]))
        for queue in self.queues:
            queue.used(records)

    def _keep_quota(self, tenant: int, newcomers: Records) -> Records:
        """Evict the oldest of a tenant's own until it is within its quota; returns those of the newcomers
        that would be the first to go themselves."""
        excess, spare = self.tenants.excess(tenant)
        if excess <= 0:
            return newcomers[:0]
        chunks = self.chunks
        own = np.concatenate((np.flatnonzero((chunks.tenant == tenant) & chunks.evictable), newcomers))
        ages = (chunks.epoch[own] << 31) - chunks.position[own]
        going = own[first_to_go(ages, self.slot_bytes(own), len(newcomers), excess, spare)]
        refused = np.isin(going, newcomers)
        self._drop(going[~refused], evicted=True)
        return going[refused]

    def _make_room(self, number: int, newcomers: Records) -> Records:
        """Evict until the newcomers fit; returns those that would be the first to go themselves."""
        kind, policy = self.kinds[number], self.policies[number]
        while (short := len(newcomers) - self.arena.available(kind)) > 0:
            evictable = self.chunks.evictable
            evictable[newcomers] = True
            victims = policy.victims(short, evictable)
            evictable[newcomers] = False
            if self._take_slab(number, oldest_own=int(self.chunks.epoch[victims].min())):
                continue
            own = np.isin(victims, newcomers)
            coldest = self.chunks.coldest[number]
            self._drop(victims[~own], evicted=True)
            self.chunks.coldest[number] = coldest  # each slot that came free has a newcomer in a moment
            return victims[own]
        return newcomers[:0]

    def _take_slab(self, number: int, oldest_own: int) -> bool:
        """Move one slab from another class, if all in it is older than what this class would lose."""
        coldest = [
            (*self.chunks.coldest_slab(other, np.array(sorted(kind.slabs)), self.arena.slab_bytes), other)
            for other, kind in enumerate(self.kinds)
            if other != number and kind.slabs and self.chunks.coldest[other] < oldest_own
        ]
        newest, slab, other = min(coldest, default=(oldest_own, 0, 0), key=lambda one: one[0])
        if newest >= oldest_own:
            return False
        records = np.flatnonzero((self.chunks.kind == other) & (self.chunks.state != ChunkState.FREE))
        self._drop(records[self.chunks.offset[records] // self.arena.slab_bytes == slab], evicted=True)
        self.arena.move_slab(slab, self.kinds[other], self.kinds[number])
        return True

    def _end(self, claim: Claim, completed: bool) -> None:
        if claim.kind is ClaimKind.LEASE:
            self._free(self.chunks.unlease(claim.records))
        elif completed:
            self._commit(claim.records, "stored_chunks")
        else:
            self._count("aborted_chunks", claim.records)
            self._drop(claim.records, evicted=False)

    def _commit(self, records: Records, counted_as: str) -> None:
        self.chunks.commit(records)
        self._count(counted_as, records)
        self.counters.stored_bytes += int(self.slot_bytes(records).sum())
        for queue in self.queues:
            queue.committed(records)
        if self.journal is not None:
            self.journal.note(records)

    def _count(self, name: str, records: Records) -> None:
        setattr(self.counters, name, getattr(self.counters, name) + len(records))
        numbers, counts = np.unique(self.chunks.namespace[records], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            counters = self.namespaces[number].counters
            setattr(counters, name, getattr(counters, name) + count)
        self.tenants.count(name, self.chunks.tenant[records])

    def _drop(self, records: Records, evicted: bool) -> None:
        """Forget chunks; free the slots of those that nobody reads."""
        for number in np.unique(self.chunks.kind[records]).tolist():
            self.policies[number].remove(records[self.chunks.kind[records] == number], evicted=evicted)
        self.chunks.forget(records)
        if self.journal is not None:
            self.journal.note(records)
        if evicted:
            self._count("evicted_chunks", records)
        self._free(records[self.chunks.leases[records] == 0])

    def _free(self, records: Records) -> None:
        for number in np.unique(self.chunks.kind[records]).tolist():
            mine = records[self.chunks.kind[records] == number]
            self.arena.release(self.kinds[number], self.chunks.offset[mine])
            self.chunks.coldest[number] = -1
        self._recycle(records)

    def _recycle(self, records: Records) -> None:
        if self.tenants.known:
            self.tenants.freed(self.chunks.tenant[records], self.slot_bytes(records))
        self.chunks.free(records)
