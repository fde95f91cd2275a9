"""The keeper's books balance, and a hit is what was stored, after any sequence of operations."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.errors import ConfigError, RequestRefused
from kvkeep.identity import group_keys, tenant_of
from kvkeep.keeper.chunks import ChunkState
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Answer, Namespace
from kvkeep.keeper.pins import MOST_PINNED, chain_records, pin, pinned_bytes, space_records, unpin
from kvkeep.keeper.policy import POLICIES
from kvkeep.terms import REFUSED, GroupSpec, Reserved

PAGE = 4096
SLABS = 16
SLOTS = 6  # pages of a slab of the small arenas here: six, three or two slots of the classes below
SMALL = SLABS * SLOTS * PAGE

ONE_GROUP = [GroupSpec(2 * PAGE, None)]
TWO_GROUPS = [GroupSpec(PAGE - 7, None), GroupSpec(3 * PAGE, 2)]


TENANTS = (b"", tenant_of("one"), tenant_of("two"))
QUOTAS = (f"{TENANTS[1].hex()}={20 * PAGE}", f"default={40 * PAGE}")


def tenant(chain: int) -> bytes:
    """Whose a chain is: of chains that share chunks, one and the same tenant's."""
    return TENANTS[chain // 2]


def chain_key(chain: int, position: int) -> bytes:
    """Chains 2n and 2n+1 share their first three chunks, as prompts share a prefix."""
    name = f"{chain // 2 if position < 3 else f'own {chain}'}/{position}"
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def chain_keys(chain: int, length: int, first: int = 0) -> bytes:
    return b"".join(chain_key(chain, position) for position in range(first, first + length))


def opened(keeper: Keeper, name: str, groups: list[GroupSpec], parts: int = 1, readers: int = 1) -> Namespace:
    return keeper.open_namespace(hashlib.sha256(name.encode()).digest(), name, groups, parts, readers)


def save(keeper: Keeper, space: Namespace, keys: bytes, first: int = 0, session: str = "s") -> list[bool]:
    """What an engine does after a miss; returns which chunks of the first group were admitted."""
    epoch = keeper.lookup(session, space, b"").epoch
    wanted = [[True] * (len(keys) // 16)] * len(space.groups)
    done = keeper.reserve(session, space, keys, wanted, first, epoch)
    if done.reservation:
        for part in range(space.parts):
            keeper.commit(session, done.reservation, part)
    return [offset >= 0 for offset in done.offsets[0].tolist()]


def held_chunks(keeper: Keeper, space: Namespace) -> int:
    return int(keeper.usage()[0][space.number])


def used_bytes(keeper: Keeper) -> int:
    return int(keeper.usage()[1].sum())


def held(keeper: Keeper, space: Namespace, keys: bytes) -> int:
    """Leading chunks found, without keeping them leased."""
    found = keeper.lookup("s", space, keys)
    if found.lease:
        keeper.release("s", found.lease, None)
    return found.chunks


class Slot(NamedTuple):
    """A chunk of the model: the pages that it was given."""

    pages: frozenset[int]
    offset: int


class Claim(NamedTuple):
    """A lease or reservation of the model."""

    session: str
    waiting: set[int]
    pages: frozenset[int]
    chunks: list[tuple[int, int, bytes]]


class KeeperMachine(RuleBasedStateMachine):
    """Several engines, two namespaces and three slot sizes in an arena of sixteen small slabs.

    The model is the memory itself: what each page holds, who may read it and who may write it.
    """

    policy_name: ClassVar[str]
    sessions: ClassVar = ("s0", "s1", "s2")

    @initialize()
    def start(self) -> None:
        self.keeper = Keeper(SMALL, self.policy_name, quotas=QUOTAS)
        self.spaces = [
            opened(self.keeper, "one", ONE_GROUP, parts=2, readers=2),
            opened(self.keeper, "two", TWO_GROUPS),
        ]
        self.attached = dict.fromkeys(self.sessions, 0)
        self.attach("s0")
        self.memory: dict[int, tuple[int, int, bytes]] = {}  # page -> the chunk whose bytes it holds
        self.stored: dict[tuple[int, int, bytes], Slot] = {}  # committed, not cleared; may be evicted
        self.reading: dict[int, Claim] = {}
        self.writing: dict[int, Claim] = {}

    # Rules

    @rule(session=st.sampled_from(sessions))
    def attach(self, session: str) -> None:
        self.keeper.attach(session)
        self.attached[session] += 1

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        session = self.some_session(data)
        if session is None:
            return
        self.keeper.detach(session)
        self.attached[session] -= 1
        if not self.attached[session]:
            for claims in (self.reading, self.writing):
                for number in [number for number, claim in claims.items() if claim.session == session]:
                    del claims[number]

    @rule(
        data=st.data(),
        number=st.integers(0, 1),
        chain=st.integers(0, 5),
        length=st.integers(0, 14),
        first=st.just(0) | st.integers(0, 14),
    )
    def lookup(self, data: st.DataObject, number: int, chain: int, length: int, first: int) -> None:
        session = self.some_session(data)
        if session is not None:
            self.look(session, number, chain, length, first)

    def look(self, session: str, number: int, chain: int, length: int, first: int = 0) -> None:
        space = self.spaces[number]
        found = self.keeper.lookup(session, space, chain_keys(chain, length), first)
        possible = self.usable_by_model(space, chain, length, first)
        assert found.chunks <= possible
        if not self.keeper.counters.evicted_chunks:
            assert found.chunks == possible, "a chunk was lost without an eviction"
        assert bool(found.lease) == bool(found.chunks)
        pages: set[int] = set()
        for group, offsets in enumerate(found.offsets):
            assert len(offsets) == found.chunks
            window = space.groups[group].window_chunks
            start = 0 if window is None else max(0, found.chunks - window)
            assert (offsets[:start] == -1).all()
            for position in range(start, found.chunks):
                chunk = (number, group, chain_key(chain, first + position))
                slot = self.stored[chunk]
                assert slot.offset == offsets[position]
                assert {self.memory[page] for page in slot.pages} == {chunk}, "another chunk's bytes"
                pages |= slot.pages
        if found.lease:
            ranks = set(range(space.readers))
            self.reading[found.lease] = Claim(session, ranks, frozenset(pages), [])

    @rule(
        data=st.data(),
        number=st.integers(0, 1),
        chain=st.integers(0, 5),
        first=st.just(0) | st.integers(0, 8),
        length=st.integers(1, 14),
        age=st.integers(0, 6),
    )
    def reserve(
        self, data: st.DataObject, number: int, chain: int, first: int, length: int, age: int
    ) -> None:
        session = self.some_session(data)
        if session is None:
            return
        flags = st.lists(st.booleans() | st.just(True), min_size=length, max_size=length)
        wanted = [data.draw(flags) for _ in self.spaces[number].groups]
        self.begin(session, number, chain, first, wanted, age)

    def begin(
        self, session: str, number: int, chain: int, first: int, wanted: list[list[bool]], age: int
    ) -> int:
        space, length = self.spaces[number], len(wanted[0])
        refused = self.keeper.counters.refused_chunks
        epoch = max(0, self.keeper.lookup(session, space, b"").epoch - age)
        keys = chain_keys(chain, length, first)
        done = self.keeper.reserve(session, space, keys, wanted, first, epoch, tenant(chain))
        being_written = {chunk for claim in self.writing.values() for chunk in claim.chunks}
        pages: set[int] = set()
        chunks = []
        for group, offsets in enumerate(done.offsets):
            for index, offset in enumerate(offsets.tolist()):
                chunk = (number, group, chain_key(chain, first + index))
                if offset < 0:
                    full = self.keeper.counters.refused_chunks > refused
                    assert full or not wanted[group][index] or chunk in self.stored or chunk in being_written
                    continue
                assert wanted[group][index]
                assert chunk not in being_written, "two writers of one chunk"
                if chunk in self.stored:
                    assert self.keeper.counters.evicted_chunks > 0, "stored twice"
                    del self.stored[chunk]
                slot = pages_of(offset, space.groups[group].slot_bytes)
                assert not slot & pages
                pages |= slot
                chunks.append(chunk)
                self.take(slot, chunk)
                self.stored_later[chunk] = Slot(slot, offset)
        if not self.keeper.counters.evicted_chunks:
            assert not pages & {page for slot in self.stored.values() for page in slot.pages}
        assert bool(done.reservation) == bool(chunks)
        if done.reservation:
            self.writing[done.reservation] = Claim(session, set(range(space.parts)), frozenset(pages), chunks)

        return done.reservation

    @rule(data=st.data(), number=st.integers(0, 1), chain=st.integers(0, 5), length=st.integers(1, 14))
    def save(self, data: st.DataObject, number: int, chain: int, length: int) -> None:
        """A whole prompt, as engines do it; without such ones there would hardly be a hit."""
        session = self.some_session(data)
        if session is None:
            return
        wanted = [[True] * length for _ in self.spaces[number].groups]
        reservation = self.begin(session, number, chain, 0, wanted, 0)
        for part in range(self.spaces[number].parts if reservation else 0):
            self.look(session, number, chain, length)  # before the last part there is nothing to find
            self.written(reservation, part)

    @rule(data=st.data(), part=st.integers(0, 2))
    def commit(self, data: st.DataObject, part: int) -> None:
        number = self.some_claim(data, self.writing)
        if number is not None:
            self.written(number, part)

    def written(self, number: int, part: int) -> None:
        claim = self.writing[number]
        self.keeper.commit(claim.session, number, part)
        claim.waiting.discard(part)
        if not claim.waiting:
            for chunk in claim.chunks:
                self.stored[chunk] = self.stored_later.pop(chunk)
            del self.writing[number]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = self.some_claim(data, self.writing)
        if number is not None:
            self.keeper.abort(self.writing.pop(number).session, number)

    @rule(data=st.data(), rank=st.none() | st.integers(0, 2))
    def release(self, data: st.DataObject, rank: int | None) -> None:
        number = self.some_claim(data, self.reading)
        if number is None:
            return
        claim = self.reading[number]
        self.keeper.release(claim.session, number, rank)
        claim.waiting.discard(rank) if rank is not None else claim.waiting.clear()
        if not claim.waiting:
            del self.reading[number]

    @rule(data=st.data(), wrong=st.sampled_from(["session", "kind", "number"]))
    def refuse(self, data: st.DataObject, wrong: str) -> None:
        """Nobody can end what is another's, or is not open, or is of the other kind."""
        claims = self.reading | self.writing
        number = self.some_claim(data, claims)
        if number is None:
            return
        session = claims[number].session if wrong != "session" else "nobody"
        ends: list[Callable[[], None]] = [lambda: self.keeper.release(session, number + 10**9, None)]
        if wrong != "number":
            reads = (number in self.reading) == (wrong == "session")
            ends = [lambda: self.keeper.release(session, number, None)]
            if not reads:
                ends = [
                    lambda: self.keeper.abort(session, number),
                    lambda: self.keeper.commit(session, number, 0),
                ]
        for end in ends:
            with pytest.raises(RequestRefused):
                end()

    @rule(data=st.data(), number=st.integers(0, 1), chain=st.integers(0, 5))
    def repeat(self, data: st.DataObject, number: int, chain: int) -> None:
        """A request that names a chunk twice is a broken client's: refused, and nothing has changed."""
        session = self.some_session(data)
        if session is None:
            return
        space, keys = self.spaces[number], chain_keys(chain, 3) + chain_keys(chain, 3, 1)
        wanted = [data.draw(st.lists(st.booleans(), min_size=6, max_size=6)) for _ in space.groups]
        with pytest.raises(RequestRefused):
            self.keeper.reserve(session, space, keys, wanted, 0, 10**6)
        if self.usable_by_model(space, chain, 3) == 0:
            return
        try:
            found = self.keeper.lookup(session, space, keys)
            self.keeper.release(session, found.lease, None) if found.lease else None
            self.keeper.lookup(session, space, keys, len(keys) // 16)
        except RequestRefused:
            pass

    @rule(number=st.integers(0, 1), chain=st.integers(0, 5), length=st.integers(0, 14))
    def touch(self, number: int, chain: int, length: int) -> None:
        self.keeper.lookup("other", self.spaces[number], chain_keys(chain, length), length)

    @rule(number=st.none() | st.integers(0, 1))
    def clear(self, number: int | None) -> None:
        held = sum(held_chunks(self.keeper, space) for space in self.spaces if number in (None, space.number))
        assert self.keeper.clear(None if number is None else self.spaces[number]) == held
        self.stored = {chunk: slot for chunk, slot in self.stored.items() if number not in (None, chunk[0])}
        self.pinned = {chunk for chunk in self.pinned if number not in (None, chunk[0])}

    @rule(which=st.integers(1, 2), number=st.none() | st.integers(0, 1))
    def clear_tenant(self, which: int, number: int | None) -> None:
        spaces = [space for space in self.spaces if number in (None, space.number)]
        gone = {
            (space.number, group, chain_key(chain, position))
            for space in spaces
            for group in range(len(space.groups))
            for chain in (2 * which, 2 * which + 1)
            for position in range(22)
        }
        before = {chunk for chunk in gone & self.stored.keys() if self.record(chunk) is not None}
        names = {(chunk[0], self.name(chunk).tobytes()) for chunk in before}
        space = None if number is None else self.spaces[number]
        assert self.keeper.clear(space, TENANTS[which]) == len(before)
        assert all(self.record(chunk) is None for chunk in before)
        self.stored = {chunk: slot for chunk, slot in self.stored.items() if chunk not in gone}
        self.pinned -= names

    def name(self, chunk: tuple[int, int, bytes]) -> np.ndarray:
        return group_keys(chunk[2], self.spaces[chunk[0]].fingerprint, chunk[1])

    def record(self, chunk: tuple[int, int, bytes]) -> int | None:
        """The readable record of a chunk of the model."""
        (record,) = self.keeper.chunks.table.find(self.name(chunk)).tolist()
        readable = record >= 0 and self.keeper.chunks.state[record] == ChunkState.COMMITTED
        return record if readable else None

    @rule(number=st.integers(0, 1), chain=st.none() | st.integers(0, 5), length=st.integers(1, 14))
    def pin(self, number: int, chain: int | None, length: int) -> None:
        """A chain, or a whole namespace: all that is readable of it, or (above the share) nothing."""
        records = self.records_of(number, chain, length)
        before = pinned_bytes(self.keeper)
        try:
            pin(self.keeper, records)
        except RequestRefused:
            assert pinned_bytes(self.keeper) == before
            assert (before + self.keeper.slot_bytes(records).sum()) > MOST_PINNED * self.keeper.arena.nbytes
        else:
            names = self.keeper.chunks.table.keys_of(records)
            self.pinned |= {(number, name.tobytes()) for name in names}

    @rule(number=st.integers(0, 1), chain=st.none() | st.integers(0, 5), length=st.integers(1, 14))
    def unpin(self, number: int, chain: int | None, length: int) -> None:
        records = self.records_of(number, chain, length)
        names = {(number, name.tobytes()) for name in self.keeper.chunks.table.keys_of(records)}
        assert unpin(self.keeper, records) == len(names & self.pinned)
        self.pinned -= names

    def records_of(self, number: int, chain: int | None, length: int) -> np.ndarray:
        space = self.spaces[number]
        if chain is None:
            return space_records(self.keeper, space)
        return chain_records(self.keeper, space, chain_keys(chain, length))

    # What must hold after each of them

    @precondition(lambda self: hasattr(self, "keeper"))
    @invariant()
    def pins_hold(self) -> None:
        assert pinned_bytes(self.keeper) <= MOST_PINNED * self.keeper.arena.nbytes
        table = self.keeper.chunks.table
        names = np.frombuffer(b"".join(name for _, name in sorted(self.pinned)), np.uint64).reshape(-1, 2)
        assert (table.find(names) >= 0).all(), "a pinned chunk was evicted"
        assert len(names) == int(self.keeper.chunks.pinned.sum())

    @precondition(lambda self: hasattr(self, "keeper"))
    @invariant()
    def books_balance(self) -> None:
        self.keeper.check_integrity()
        assert used_bytes(self.keeper) <= SMALL
        for space in self.spaces:
            mine = [chunk for chunk in self.stored if chunk[0] == space.number]
            assert held_chunks(self.keeper, space) <= len(mine)

    @precondition(lambda self: hasattr(self, "keeper"))
    @invariant()
    def tenants_hold_what_is_theirs(self) -> None:
        owner = {
            chain_key(chain, position): self.keeper.tenants.number(tenant(chain))
            for chain in range(6)
            for position in range(22)
        }
        for chunk in self.stored:
            record = self.record(chunk)
            assert record is None or self.keeper.chunks.tenant[record] == owner[chunk[2]]
        rows = {row["tenant"]: row["used_bytes"] for row in self.keeper.tenants.report([2, 3])}
        assert rows[TENANTS[1].hex()] <= 20 * PAGE
        assert rows[TENANTS[2].hex()] <= 40 * PAGE

    @precondition(lambda self: hasattr(self, "keeper"))
    @invariant()
    def slots_do_not_overlap(self) -> None:
        chunks = self.keeper.chunks
        live = np.flatnonzero(chunks.state != ChunkState.FREE)
        sizes = [group.slot_bytes for space in self.spaces for group in space.groups]
        kinds = {self.keeper._kind(size): size for size in sizes}
        ranges = sorted(
            (int(chunks.offset[record]), kinds[int(chunks.kind[record])]) for record in live.tolist()
        )
        end = 0
        for offset, size in ranges:
            assert offset >= end
            end = offset + size
        assert end <= self.keeper.arena.nbytes

    # The model

    def __init__(self) -> None:
        super().__init__()
        self.stored_later: dict[tuple[int, int, bytes], Slot] = {}
        self.pinned: set[tuple[int, bytes]] = set()

    def take(self, slot: frozenset[int], chunk: tuple[int, int, bytes]) -> None:
        """A writer writes at once, which it may, as soon as it was given a slot."""
        for claim in [*self.reading.values(), *self.writing.values()]:
            assert not slot & claim.pages, "a slot in use was given to a writer"
        self.memory.update(dict.fromkeys(slot, chunk))

    def usable_by_model(self, space: Namespace, chain: int, length: int, first: int = 0) -> int:
        def there(group: int, position: int) -> bool:
            return (space.number, group, chain_key(chain, first + position)) in self.stored

        def good(end: int) -> bool:
            return all(
                there(group, position)
                for group, spec in enumerate(space.groups)
                for position in range(max(0, end - (spec.window_chunks or end)), end)
            )

        return max(end for end in range(max(0, length - first) + 1) if good(end))

    def some_session(self, data: st.DataObject) -> str | None:
        here = [session for session, count in self.attached.items() if count]
        return data.draw(st.sampled_from(here)) if here else None

    def some_claim(self, data: st.DataObject, claims: dict[int, Claim]) -> int | None:
        return data.draw(st.sampled_from(sorted(claims))) if claims else None


def pages_of(offset: int, nbytes: int) -> frozenset[int]:
    assert offset % PAGE == 0
    return frozenset(range(offset // PAGE, -(-(offset + nbytes) // PAGE)))


class LruKeeper(KeeperMachine):
    policy_name = "lru"


class ArcKeeper(KeeperMachine):
    policy_name = "arc"


class S3FifoKeeper(KeeperMachine):
    policy_name = "s3fifo"


BUDGET = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestLruKeeper, TestArcKeeper, TestS3FifoKeeper = LruKeeper.TestCase, ArcKeeper.TestCase, S3FifoKeeper.TestCase
TestLruKeeper.settings = TestArcKeeper.settings = TestS3FifoKeeper.settings = BUDGET


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["save", "save", "lookup", "reserve", "end", "touch", "clear", "detach"]),
        st.integers(0, 1),  # namespace
        st.integers(0, 5),  # chain
        st.integers(0, 14),  # chunks
        st.integers(0, 8),  # the first of them
    ),
    max_size=40,
)


def answers(keeper: Keeper, operations: list[tuple[str, int, int, int, int]]) -> list[object]:
    """All that an engine can see of what the keeper did, places left out."""
    spaces = [opened(keeper, "one", ONE_GROUP), opened(keeper, "two", TWO_GROUPS)]
    keeper.attach("s")
    seen: list[object] = []
    pending: list[Reserved] = []
    for what, number, chain, length, first in operations:
        space, keys = spaces[number], chain_keys(chain, length, first)
        if what == "save":
            seen.append(save(keeper, space, keys, first))
        elif what == "lookup":
            found = keeper.lookup("s", space, chain_keys(chain, length))
            seen.append((found.chunks, [(row >= 0).tolist() for row in found.offsets]))
        elif what == "reserve":
            flags = [[(chain + index + group) % 3 > 0 for index in range(length)] for group in range(2)]
            done = keeper.reserve("s", space, keys, flags[: len(space.groups)], first, 10**9)
            pending += [done] if done.reservation else []
            seen.append([(row >= 0).tolist() for row in done.offsets])
        elif what == "end" and pending:
            reservation = pending.pop().reservation
            keeper.commit("s", reservation, 0) if first % 2 else keeper.abort("s", reservation)
        elif what == "touch":
            keeper.lookup("s", space, keys, len(keys) // 16)
        elif what == "clear":
            seen.append(keeper.clear(space))
        elif what == "detach":
            keeper.detach("s")
            keeper.attach("s")
            pending.clear()
        seen.append((held_chunks(keeper, spaces[0]), held_chunks(keeper, spaces[1])))
    keeper.check_integrity()
    assert keeper.counters.evicted_chunks == keeper.counters.refused_chunks == 0
    return seen


@given(operations=OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_policy_and_size_change_no_answer_while_there_is_room(
    operations: list[tuple[str, int, int, int, int]],
) -> None:
    sizes = (8 << 20, (9 << 20) + 12345, 64 << 20)
    reference = answers(Keeper(8 << 20, "lru"), operations)
    for policy in POLICIES:
        for size in sizes:
            assert answers(Keeper(size, policy), operations) == reference, (policy, size)


def small_keeper(policy: str = "lru") -> tuple[Keeper, Namespace, int]:
    """A keeper with one model, and the chunks of it that fit."""
    keeper = Keeper(SMALL, policy)
    keeper.attach("s")
    return keeper, opened(keeper, "one", ONE_GROUP), SMALL // (2 * PAGE)


def test_a_prompt_larger_than_the_arena_keeps_its_head() -> None:
    keeper, space, room = small_keeper()
    admitted = save(keeper, space, chain_keys(0, 3 * room))
    assert admitted == [True] * room + [False] * (2 * room)
    assert held(keeper, space, chain_keys(0, 3 * room)) == room
    keeper.check_integrity()


def test_a_long_prompt_saved_piece_by_piece_keeps_its_head() -> None:
    keeper, space, room = small_keeper()
    save(keeper, space, chain_keys(2, room))  # an older prompt, which goes
    epoch = keeper.lookup("s", space, b"").epoch
    for first in range(0, 2 * room, 7):
        keys = chain_keys(0, 7, first)
        done = keeper.reserve("s", space, keys, [[True] * 7], first, epoch)
        if done.reservation:
            keeper.commit("s", done.reservation, 0)
        keeper.check_integrity()
    assert held(keeper, space, chain_keys(0, 2 * room)) == room


@pytest.mark.parametrize("policy", POLICIES)
def test_an_arena_full_of_leased_slots_refuses_and_does_not_wait(policy: str) -> None:
    keeper, space, room = small_keeper(policy)
    assert all(save(keeper, space, chain_keys(0, room)))
    found = keeper.lookup("s", space, chain_keys(0, room))
    assert found.chunks == room
    assert not any(save(keeper, space, chain_keys(2, 5)))
    assert keeper.counters.refused_chunks == 5
    assert keeper.counters.evicted_chunks == 0
    keeper.release("s", found.lease, None)
    assert keeper.arena.available(keeper.arena.size_class(2 * PAGE)) == 0
    keeper.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_newcomers_get_in_where_all_that_is_held_was_used_again(policy: str) -> None:
    keeper, space, room = small_keeper(policy)
    save(keeper, space, chain_keys(0, room))
    assert held(keeper, space, chain_keys(0, room)) == room
    save(keeper, space, chain_keys(2, 5))
    save(keeper, space, chain_keys(2, 5))  # a policy may wait for the second time
    assert held(keeper, space, chain_keys(2, 5)) == 5


def test_an_epoch_from_the_future_does_not_keep_a_chunk_for_ever() -> None:
    keeper, space, room = small_keeper()
    done = keeper.reserve("s", space, chain_keys(0, room), [[True] * room], 0, 10**12)
    keeper.commit("s", done.reservation, 0)
    assert all(save(keeper, space, chain_keys(2, room)))


def test_an_arena_full_of_reserved_slots_refuses() -> None:
    keeper, space, room = small_keeper()
    writing = keeper.reserve("s", space, chain_keys(0, room), [[True] * room], 0, 1)
    assert not any(save(keeper, space, chain_keys(2, 3)))
    refused = keeper.reserve("s", space, chain_keys(2, 3), [[True] * 3], 0, 1)
    assert (refused.reservation, refused.offsets[0].tolist()) == (0, [REFUSED] * 3)
    again = keeper.reserve("s", space, chain_keys(0, 2), [[True] * 2], 0, 1)
    assert (again.reservation, again.offsets[0].tolist()) == (0, [-1, -1])
    keeper.abort("s", writing.reservation)
    assert all(save(keeper, space, chain_keys(2, 3)))
    keeper.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_slabs_move_to_the_model_that_needs_them(policy: str) -> None:
    keeper, one, room = small_keeper(policy)
    two = opened(keeper, "other", [GroupSpec(PAGE, None)])
    assert all(save(keeper, one, chain_keys(0, room)))
    for first in range(0, SLABS * SLOTS, SLOTS):
        assert all(save(keeper, two, chain_keys(2, SLOTS, first), first))
        keeper.check_integrity()
    assert held_chunks(keeper, one) == 0
    assert held_chunks(keeper, two) == SLABS * SLOTS
    assert used_bytes(keeper) == SMALL


def test_slabs_are_not_searched_again_where_none_can_have_become_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full arena of two slot sizes: each save of one asked for the oldest slab of the other."""
    keeper, one, room = small_keeper()
    two = opened(keeper, "other", [GroupSpec(PAGE, None)])
    save(keeper, one, chain_keys(0, room // 2))
    save(keeper, two, chain_keys(2, room))
    searched, search = [], keeper.chunks.coldest_slab
    monkeypatch.setattr(keeper.chunks, "coldest_slab", lambda *terms: searched.append(1) or search(*terms))
    for chain in range(4, 104, 2):
        if chain % 20 == 4:
            assert held(keeper, two, chain_keys(2, room)) == room
        assert save(keeper, one, chain_keys(chain, 1)) == [True]
    assert keeper.counters.evicted_chunks == 50
    assert 0 < len(searched) <= 10
    keeper.check_integrity()


def test_a_slab_that_is_read_does_not_move() -> None:
    keeper, one, room = small_keeper()
    two = opened(keeper, "other", [GroupSpec(PAGE, None)])
    save(keeper, one, chain_keys(0, room))
    found = keeper.lookup("s", one, chain_keys(0, 1))
    leased = pages_of(int(found.offsets[0][0]), 2 * PAGE)
    epoch = keeper.lookup("s", two, b"").epoch
    count = SLABS * SLOTS
    done = keeper.reserve("s", two, chain_keys(2, count), [[True] * count], 0, epoch)
    given_away = {offset // PAGE for offset in done.offsets[0].tolist() if offset >= 0}
    assert len(given_away) == (SLABS - 1) * SLOTS
    assert not given_away & leased
    keeper.check_integrity()


def test_an_empty_slab_moves_even_for_the_oldest_request() -> None:
    keeper, one, room = small_keeper()
    two = opened(keeper, "other", [GroupSpec(PAGE, None)])
    save(keeper, one, chain_keys(0, room))
    keeper.clear(one)
    done = keeper.reserve("s", two, chain_keys(2, 4), [[True] * 4], 0, 0)
    assert (done.offsets[0] >= 0).all()
    keeper.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_ten_times_the_bound_is_stored_and_the_bound_holds(policy: str) -> None:
    keeper = Keeper(SMALL, policy)
    keeper.attach("s")
    spaces = [opened(keeper, "one", ONE_GROUP), opened(keeper, "two", TWO_GROUPS)]
    asked, chain = 0, 0
    while asked < 10 * SMALL:
        for space in spaces:
            save(keeper, space, chain_keys(2 * chain, 9))
            asked += 9 * sum(group.slot_bytes for group in space.groups)
            assert used_bytes(keeper) <= SMALL
        chain += 1
    keeper.check_integrity()
    assert keeper.counters.stored_bytes > 5 * SMALL


def test_a_commit_makes_readable_only_with_the_last_part() -> None:
    keeper = Keeper(SMALL, "lru")
    keeper.attach("s")
    space = opened(keeper, "tp", ONE_GROUP, parts=3)
    done = keeper.reserve("s", space, chain_keys(0, 2), [[True] * 2], 0, 1)
    for part in (2, 0, 0, 2, 7):
        keeper.commit("s", done.reservation, part)
        assert held(keeper, space, chain_keys(0, 2)) == 0
    keeper.commit("s", done.reservation, 1)
    assert held(keeper, space, chain_keys(0, 2)) == 2


def test_a_cleared_chunk_stays_intact_for_its_reader_and_is_found_by_nobody() -> None:
    keeper, space, room = small_keeper()
    save(keeper, space, chain_keys(0, room))
    found = keeper.lookup("s", space, chain_keys(0, 2))
    leased = set(found.offsets[0].tolist())
    assert keeper.clear(None) == room
    assert held(keeper, space, chain_keys(0, 2)) == 0
    again = keeper.reserve("s", space, chain_keys(0, room), [[True] * room], 0, 10**6)
    assert not leased & set(again.offsets[0].tolist())
    assert (again.offsets[0] >= 0).sum() == room - 2
    keeper.release("s", found.lease, 0)
    keeper.check_integrity()
    keeper.abort("s", again.reservation)
    assert used_bytes(keeper) == 0


def test_a_chunk_named_twice_leaves_no_trace() -> None:
    """The second group's repeat must not cost the slots that the first one was given already."""
    keeper = Keeper(SMALL, "lru")
    keeper.attach("s")
    space = opened(keeper, "two", TWO_GROUPS)
    keys = chain_keys(0, 2) + chain_key(0, 1)
    with pytest.raises(RequestRefused, match="twice"):
        keeper.reserve("s", space, keys, [[True, False, False], [False, True, True]], 0, 1)
    keeper.check_integrity()
    assert used_bytes(keeper) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_keys_that_were_made_to_collide_across_groups_leave_no_trace(policy: str) -> None:
    """What sets groups apart is XORed onto keys, and can be computed: policies of two sizes must not mix."""
    keeper = Keeper(SMALL, policy)
    keeper.attach("s")
    space = opened(keeper, "two", TWO_GROUPS)
    keeper.reserve("s", space, chain_keys(0, 1), [[True], [False]], 0, 0)
    save(keeper, space, chain_keys(2, 1))
    tweak = group_keys(bytes(16), space.fingerprint, 0) ^ group_keys(bytes(16), space.fingerprint, 1)
    forged = (np.frombuffer(chain_key(0, 0), "<u8") ^ tweak).tobytes()  # in group 1 the chunk of group 0
    keys = chain_key(2, 0) + forged + chain_key(4, 0)
    with pytest.raises(RequestRefused, match="another group"):
        keeper.reserve("s", space, keys, [[True] * 3] * 2, 0, 0)
    keeper.check_integrity()
    with pytest.raises(RequestRefused, match="another group"):
        keeper.lookup("s", space, keys, 3)
    keeper.check_integrity()
    assert save(keeper, space, chain_keys(4, 2)) == [True, True]


def test_one_group_cannot_be_read_as_another() -> None:
    keeper = Keeper(SMALL, "lru")
    keeper.attach("s")
    space = opened(keeper, "two", TWO_GROUPS)
    done = keeper.reserve("s", space, chain_keys(0, 3), [[True] * 3, [False] * 3], 0, 1)
    keeper.commit("s", done.reservation, 0)
    assert held(keeper, space, chain_keys(0, 3)) == 0
    records = keeper.chunks.table.find(group_keys(chain_keys(0, 3), space.fingerprint, 0))
    assert (records >= 0).all()


def test_namespaces_share_no_chunk() -> None:
    keeper, space, _ = small_keeper()
    save(keeper, space, chain_keys(0, 4))
    assert held(keeper, opened(keeper, "finetune", ONE_GROUP), chain_keys(0, 4)) == 0
    assert held(keeper, space, chain_keys(0, 4)) == 4


def test_a_namespace_is_found_again_and_its_geometry_is_fixed() -> None:
    keeper, space, _ = small_keeper()
    assert opened(keeper, "one", ONE_GROUP) is space
    for groups, parts, readers in ((TWO_GROUPS, 1, 1), (ONE_GROUP, 2, 1), (ONE_GROUP, 1, 2)):
        with pytest.raises(RequestRefused, match="geometry"):
            opened(keeper, "one", groups, parts, readers)


def test_what_cannot_work_is_told_at_start() -> None:
    with pytest.raises(ConfigError, match="lru"):
        Keeper(SMALL, "random")
    with pytest.raises(ConfigError, match="does not fit"):
        opened(Keeper(SMALL, "lru"), "huge", [GroupSpec(SMALL, None)])
    with pytest.raises(ConfigError, match="too small"):
        Keeper(1000, "lru")


def test_counters_count() -> None:
    keeper, space, room = small_keeper()
    save(keeper, space, chain_keys(0, room))
    held(keeper, space, chain_keys(0, room))
    save(keeper, space, chain_keys(2, 5))
    keeper.answered(space, b"", Answer(3, room, room, Counter({1: 2})))
    keeper.answered(space, b"t", Answer(0, 5, 0, Counter()))
    counters = keeper.counters
    assert (counters.hit_chunks, counters.asked_chunks, counters.local_chunks) == (room, room + 5, 3)
    assert counters.tier_chunks == {1: 2}
    assert (counters.stored_chunks, counters.evicted_chunks) == (room + 5, 5)
    assert counters.stored_bytes == (room + 5) * 2 * PAGE
    assert vars(space.counters)["hit_chunks"] == room


def test_a_parent_never_goes_before_its_children_where_another_wrote_it() -> None:
    """Request B saves behind chunks that A is still writing: they are B's too."""
    keeper = Keeper(SMALL, "lru")
    keeper.attach("a")
    keeper.attach("b")
    space = opened(keeper, "one", [GroupSpec(PAGE, None)])
    slots, chain = SLABS * SLOTS, chain_keys(0, 40)
    first = keeper.lookup("a", space, chain).epoch
    parents = keeper.reserve("a", space, chain[: 16 * 10], [[True] * 10], 0, first)
    later = keeper.lookup("b", space, chain).epoch
    children = keeper.reserve("b", space, chain, [[True] * 40], 0, later)
    assert [offset >= 0 for offset in children.offsets[0].tolist()] == [False] * 10 + [True] * 30
    keeper.commit("a", parents.reservation, 0)
    keeper.commit("b", children.reservation, 0)
    for other in range(2, 4 * slots, 2):  # push the chain out, one chunk at a time
        save(keeper, space, chain_keys(other, 1), session="a")
        left = [index for index in range(40) if space_has(keeper, space, chain_key(0, index))]
        assert left == list(range(len(left))), "a parent went before its child"
        if not left:
            return
    raise AssertionError("the chain was never pushed out")


def space_has(keeper: Keeper, space: Namespace, key: bytes) -> bool:
    return bool(keeper.chunks.table.find(group_keys(key, space.fingerprint, 0))[0] >= 0)


def test_counters_are_kept_by_namespace_too() -> None:
    keeper = Keeper(SMALL, "lru")
    keeper.attach("s")
    one, two = opened(keeper, "one", ONE_GROUP), opened(keeper, "two", ONE_GROUP)
    for chain in range(0, 200, 2):
        save(keeper, one if chain % 4 else two, chain_keys(chain, 1))
    for name in ("stored_chunks", "evicted_chunks"):
        parts = [getattr(space.counters, name) for space in (one, two)]
        assert all(parts)
        assert sum(parts) == getattr(keeper.counters, name)
