"""Chunks go down and come up through real threads; the test plays the event loop."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from kvkeep.errors import RequestRefused, TierStillReads
from kvkeep.identity import group_keys
from kvkeep.keeper import flush, movers, probes
from kvkeep.keeper.fetch import Stage
from kvkeep.keeper.journal import MEMORY, Journal
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.leases import ClaimKind
from kvkeep.keeper.movers import Asked, Movers
from kvkeep.keeper.operator_moves import move_down
from kvkeep.terms import GroupSpec
from kvkeep.tiers.base import Key, Tier
from kvkeep.tiers.faults import Faults, Faulty
from kvkeep.tiers.guard import Guarded
from kvkeep.tiers.meter import Metered
from kvkeep.tiers.open import Opened, WriteWhen, open_raw
from kvkeep.tiers.seal import SEAL_BYTES, Sealed
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import Wrapper
from tests.keeper.test_keeper import PAGE, SLABS, chain_key, chain_keys, opened
from tests.tiers.test_wrappers import Clock, MemoryTier, ReadOnly

SMALL = SLABS * 8 * PAGE
PAYLOAD = PAGE - SEAL_BYTES


def wrapped(
    raw: Tier, write: WriteWhen = WriteWhen.THROUGH, clock: Callable[[], float] = time.perf_counter
) -> Opened:
    guard = Guarded(raw, "test", sleep=lambda seconds: None)
    return Opened("test://", Metered(Sealed(guard), clock), guard, write)


class Host:
    """One keeper with tiers, and an engine that writes and reads real bytes."""

    def __init__(self, *tiers: Opened, memory: int = SMALL) -> None:
        self.keeper = Keeper(memory, "lru", SEAL_BYTES)
        self.keeper.attach("s")
        self.memory = memoryview(mmap.mmap(-1, self.keeper.arena.nbytes))
        self.calls: queue.Queue[Callable[[], None]] = queue.Queue()
        self.movers = Movers(self.keeper, tiers, self.memory, self.calls.put)
        self.movers.start()
        self.space = opened(self.keeper, "one", [GroupSpec(PAYLOAD, None)])

    def run_until(self, done: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, "not in time"
            try:
                self.calls.get(timeout=0.01)()
            except queue.Empty:
                self.movers.tick()
            self.keeper.check_integrity()

    def save(self, chain: int, length: int, first: int = 0) -> None:
        keys = chain_keys(chain, length, first)
        epoch = self.keeper.lookup("s", self.space, b"").epoch
        done = self.keeper.reserve("s", self.space, keys, [[True] * length], first, epoch)
        for index, offset in enumerate(done.offsets[0].tolist()):
            if offset >= 0:
                self.memory[offset : offset + PAYLOAD] = content(chain, first + index)
        if done.reservation:
            self.keeper.commit("s", done.reservation, 0)
        self.movers.kick()

    def flushed(self) -> None:
        self.run_until(lambda: not self.movers.unwritten)

    def ask(self, chain: int, length: int, recompute: float = 0.0) -> int:
        """A request, from its lookup to its load; checks each byte that it was given."""
        keys = chain_keys(chain, length)
        found = self.keeper.lookup("s", self.space, keys)
        ticket = 0
        if found.chunks < length:
            ticket = self.movers.fetch(Asked("s", self.space, keys, 0, recompute, 5.0), found)
        if ticket:
            self.run_until(lambda: self.movers.fetches.stage("s", ticket) is Stage.DONE)
            if found.lease:
                self.keeper.release("s", found.lease, None)
            found = self.keeper.lookup("s", self.space, keys)
            self.movers.fetches.forget("s", ticket)
        if found.lease:
            for index, offset in enumerate(found.offsets[0].tolist()):
                assert self.memory[offset : offset + PAYLOAD] == content(chain, index)
            self.keeper.release("s", found.lease, None)
        self.keeper.check_integrity()
        return found.chunks

    def forget_memory(self) -> None:
        self.keeper.clear(None)


def content(chain: int, position: int) -> bytes:
    name = chain_key(chain, position)
    return name * (PAYLOAD // len(name)) + name[: PAYLOAD % len(name)]


@pytest.fixture
def held() -> dict[Key, bytes]:
    return {}


@pytest.fixture
def faulty(held: dict[Key, bytes]) -> Iterator[Faulty]:
    tier = Faulty(MemoryTier(held), Faults())
    yield tier
    tier.release()


def test_what_was_committed_goes_down_and_comes_up(held: dict[Key, bytes], faulty: Faulty) -> None:
    host = Host(wrapped(faulty))
    host.save(0, 20)
    host.flushed()
    assert len(held) == 20
    host.forget_memory()
    assert host.ask(0, 30) == 20
    assert host.ask(0, 20) == 20  # in memory by now
    (figures,) = host.movers.figures()
    assert (figures["hits"], figures["stored"], figures["waiting_chunks"]) == (20, 20, 0)


def test_what_a_directory_evicts_is_told_and_known(tmp_path: Path) -> None:
    """From memory and tier, from the tier alone, and of a namespace that nobody has opened here."""
    host = Host(wrapped(open_raw(TierURL(f"fs://{tmp_path / 'kv'}?capacity={32 * PAGE}"))), memory=4 * SMALL)
    tier = host.movers.tiers[0].tier
    tier.put([b"stranger" + bytes(16)], [memoryview(bytearray(PAGE))])
    journal = host.keeper.journal = Journal(host.keeper.chunks)
    for chain in (0, 2):
        host.save(chain, 10)
        host.flushed()
        if not chain:
            host.forget_memory()
    before = journal.since(0, host.space).last
    for chain in range(4, 14, 2):
        host.save(chain, 10)
        host.flushed()
    told = journal.since(before, host.space)
    last = {key.tobytes(): state for key, state in zip(told.keys, told.states.tolist(), strict=True)}
    for chain, memory in ((0, 0), (2, MEMORY)):
        keys = group_keys(chain_keys(chain, 10), host.space.fingerprint, 0)
        names = [host.space.fingerprint[:8] + key.tobytes() for key in keys]
        here = tier.contains(names)
        assert not all(here)
        for key, held in zip(keys, here, strict=True):
            if not held:
                assert last[key.tobytes()] == memory
        if memory:
            stored = host.keeper.chunks.stored[host.keeper.chunks.table.find(keys)] != 0
            assert stored.tolist() == here
    tier.close()


def test_another_host_finds_it_and_does_not_write_it_again(held: dict[Key, bytes]) -> None:
    first, second = (Host(wrapped(MemoryTier(held))) for _ in range(2))
    first.save(0, 10)
    first.flushed()
    assert second.ask(0, 10) == 10
    second.forget_memory()
    second.save(0, 10)
    second.flushed()
    assert second.movers.figures()[0]["stored"] == 0


def test_more_than_memory_is_kept_below(held: dict[Key, bytes], faulty: Faulty) -> None:
    host = Host(wrapped(faulty))
    for chain in range(0, 40, 2):
        host.save(chain, 30)
        host.flushed()
    assert host.keeper.counters.evicted_chunks > 0
    for chain in range(0, 40, 2):
        assert host.ask(chain, 30) == 30


def test_flipped_bits_below_are_misses(held: dict[Key, bytes], faulty: Faulty) -> None:
    host = Host(wrapped(faulty))
    host.save(0, 20)
    host.flushed()
    host.forget_memory()
    faulty.faults = Faults(flip_rate=0.3)
    assert host.ask(0, 20) < 20
    assert host.movers.figures()[0]["damaged"] > 0


def test_second_touch_writes_only_what_is_asked_for_again(held: dict[Key, bytes]) -> None:
    host = Host(wrapped(MemoryTier(held), WriteWhen.SECOND_TOUCH))
    host.save(0, 5)
    host.save(2, 5)
    host.flushed()
    assert not held
    assert host.ask(2, 5) == 5
    host.movers.kick()
    host.flushed()
    assert len(held) == 5


def test_a_tier_that_is_only_read_is_not_written(held: dict[Key, bytes]) -> None:
    host = Host(wrapped(MemoryTier(held), WriteWhen.NEVER))
    host.save(2, 5)
    host.flushed()
    host.ask(2, 5)
    host.flushed()
    assert not held


def test_what_the_second_tier_has_is_promoted_to_the_first(held: dict[Key, bytes]) -> None:
    other = Host(wrapped(MemoryTier(held)))
    other.save(0, 10)
    other.flushed()
    near: dict[Key, bytes] = {}
    host = Host(wrapped(MemoryTier(near)), wrapped(MemoryTier(held)))
    assert host.ask(0, 10) == 10
    host.flushed()
    assert near.keys() == held.keys()


def test_loading_is_weighed_against_computing(held: dict[Key, bytes], faulty: Faulty) -> None:
    host = Host(wrapped(faulty))
    host.save(0, 20)
    host.flushed()
    host.forget_memory()
    assert host.ask(0, 5, recompute=1.0) == 5  # how fast it is was not known, and is now
    host.forget_memory()
    assert host.ask(0, 20, recompute=-1) == 0
    assert host.ask(0, 20, recompute=1e-12) == 0
    assert host.ask(0, 20, recompute=10.0) == 20


class Timed(Wrapper):
    """Each get takes `seconds` of a clock that only it moves."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.clock, self.seconds = Clock(), 0.0

    def get(self, keys, buffers):
        self.clock.sleep(self.seconds)
        return super().get(keys, buffers)


def test_a_store_that_was_slow_once_is_tried_again_and_nobody_waits_for_that(held: dict[Key, bytes]) -> None:
    store = Timed(MemoryTier(held))
    host = Host(wrapped(store, clock=store.clock))

    def hits() -> object:
        return host.movers.figures()[0]["hits"]

    host.save(0, 20)
    host.flushed()
    host.forget_memory()
    store.seconds = 10.0
    assert host.ask(0, 20) == 20
    host.forget_memory()
    store.seconds = 0.0
    assert host.ask(0, 20, recompute=1e-4) == 0
    assert hits() == 20
    store.clock.sleep(31.0)
    assert host.ask(0, 20, recompute=1e-4) == 0
    host.run_until(lambda: hits() == 40 and not host.movers.figures()[0]["reading_bytes"])
    assert host.ask(0, 20, recompute=1e-4) == 20  # it is in memory
    host.forget_memory()
    assert host.ask(0, 20, recompute=1e-4) == 20
    assert hits() == 60


class Gate(Wrapper):
    """A get waits until it is opened."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.open = threading.Event()

    def get(self, keys, buffers):
        assert self.open.wait(20)
        return super().get(keys, buffers)


def test_what_a_near_store_has_is_not_given_up_for_a_slow_one(held: dict[Key, bytes]) -> None:
    near = dict[Key, bytes]()
    for store, length in ((near, 10), (held, 20)):
        other = Host(wrapped(MemoryTier(store)))
        other.save(0, length)
        other.flushed()
    gate = Gate(MemoryTier(held))
    far = wrapped(gate, WriteWhen.NEVER)
    host = Host(wrapped(MemoryTier(near)), far)
    journal = host.keeper.journal = Journal(host.keeper.chunks)
    host.run_until(lambda: far.tier.latency is not None)
    far.tier.latency = 1000.0
    assert host.ask(0, 20) == 10
    assert journal.since(0, host.space).states.all()  # nobody has said that the others are nowhere
    gate.open.set()
    host.run_until(lambda: len(host.keeper.chunks) == 20 and not host.movers.figures()[1]["reading_bytes"])
    assert host.ask(0, 20) == 20


def test_what_a_store_has_not_answered_yet_counts_as_long_as_it_takes(
    held: dict[Key, bytes], faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_PATIENCE", 1e9)
    monkeypatch.setattr(movers, "_MOST_FETCHES", 1 << 20)
    opened_ = wrapped(faulty)
    host = Host(opened_)
    host.run_until(lambda: opened_.tier.latency is not None)  # before any request has come
    faulty.faults = Faults(hang=True)
    found = host.keeper.lookup("s", host.space, b"")
    asked = Asked("s", host.space, chain_keys(0, 5), 0, patience=0.001)
    assert not all(host.movers.fetch(asked, found) for _ in range(20000))


def test_a_hung_store_holds_up_nobody_and_nothing_is_lost(held: dict[Key, bytes], faulty: Faulty) -> None:
    host = Host(wrapped(faulty))
    host.save(0, 5)
    host.flushed()
    host.forget_memory()
    faulty.faults = Faults(hang=True)
    keys = chain_keys(0, 5)
    found = host.keeper.lookup("s", host.space, keys)
    ticket = host.movers.fetch(Asked("s", host.space, keys, 0, patience=5.0), found)
    assert host.movers.fetches.stage("s", ticket) is Stage.PROBING
    host.movers.fetches.forget("s", ticket)  # its deadline
    host.save(2, 5)
    found = host.keeper.lookup("s", host.space, chain_keys(2, 5))
    assert found.chunks == 5
    host.keeper.release("s", found.lease, None)
    faulty.faults = Faults()
    faulty.release()
    host.flushed()
    host.run_until(lambda: host.ask(0, 5) == 5)  # it counts as slow for a while: fetched, not waited for


def test_slots_of_a_read_that_goes_on_are_nobodys_until_it_is_over(held: dict[Key, bytes]) -> None:
    class Late(Wrapper):
        over: Future[None] | None = None

        def get(self, keys, buffers):
            if self.over is not None:
                self.into = buffers
                raise TierStillReads("no answer in time", self.over)
            return super().get(keys, buffers)

    late = Late(MemoryTier(held))
    host = Host(wrapped(late))
    host.save(0, 5)
    host.flushed()
    host.forget_memory()
    late.over = over = Future()
    assert host.ask(0, 5) == 0  # told at once
    reserved = host.keeper.claims.count(ClaimKind.RESERVATION)
    assert reserved == 1
    for chain in range(2, 40, 2):  # many times what memory holds
        host.save(chain, 5)
        host.flushed()
    assert host.ask(0, 5) == 0
    for view in late.into:
        view[:] = bytes(len(view))  # the late bytes
    late.over = None
    assert host.ask(38, 5) == 5  # nobody else's
    over.set_result(None)
    host.run_until(lambda: not host.keeper.claims.count(ClaimKind.RESERVATION))
    assert host.ask(0, 5) == 5


def test_a_store_that_hangs_for_ever_hides_no_other(
    held: dict[Key, bytes], faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_PATIENCE", 0.2)
    other = Host(wrapped(MemoryTier(held)))
    for chain in range(0, 12, 2):
        other.save(chain, 3)
        other.flushed()
    dead = MemoryTier({})
    host = Host(wrapped(Faulty(dead, faulty.faults), WriteWhen.NEVER), wrapped(MemoryTier(held)))
    assert host.ask(0, 3) == 3
    faulty.faults.hang = True
    tickets = []
    for chain in range(2, 10, 2):  # more than there are threads
        keys = chain_keys(chain, 3)
        found = host.keeper.lookup("s", host.space, keys)
        tickets += [host.movers.fetch(Asked("s", host.space, keys, 0, patience=5.0), found)]
    assert all(tickets)
    host.run_until(lambda: all(host.movers.fetches.stage("s", ticket) is Stage.DONE for ticket in tickets))
    assert [host.ask(chain, 3) for chain in range(2, 12, 2)] == [3] * 5


def test_a_tier_that_fails_as_it_is_about_to_be_asked_leaves_nothing_open(
    held: dict[Key, bytes], faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(wrapped(faulty))
    faulty.faults = Faults(error_rate=1.0)
    host.run_until(lambda: not host.ask(0, 3) and not host.movers.tiers[0].guard.available)
    monkeypatch.setattr(probes.Probes, "within", lambda self, patience: ([0], []))
    assert host.ask(0, 3) == 0
    assert len(host.movers.fetches) == 0


def test_a_tier_that_fails_is_switched_off_and_comes_back(held: dict[Key, bytes], faulty: Faulty) -> None:
    opened_ = wrapped(faulty)
    host = Host(opened_)
    faulty.faults = Faults(error_rate=1.0)
    host.save(0, 10)
    host.run_until(lambda: not opened_.guard.available)
    assert host.ask(2, 10) == 0  # at once: no ticket
    faulty.faults = Faults()
    host.run_until(lambda: opened_.guard.available)
    host.flushed()
    assert len(held) == 10  # what waited was written


def test_what_a_directory_puts_off_is_written_once_it_has_counted(tmp_path: Path) -> None:
    opened_ = wrapped(open_raw(TierURL(f"fs://{tmp_path / 'kv'}?capacity=1MiB")))
    host = Host(opened_)
    with (tmp_path / "kv" / "writers").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as who counts
        host.save(0, 5)
        host.run_until(lambda: opened_.tier.seconds["put"].buckets()[-1][1] > 2)
        assert host.movers.unwritten == 5  # the end waits for it
    host.flushed()
    (figures,) = host.movers.figures()
    assert [figures[what] for what in ("stored", "refused", "errors")] == [5, 0, 0]
    opened_.tier.close()


def test_a_store_that_comes_back_empty_gets_all_that_is_held(
    held: dict[Key, bytes], faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "_MOST_SOUGHT", 7)
    host = Host(wrapped(faulty))
    for chain in (0, 2):
        host.save(chain, 10)
    host.flushed()
    faulty.faults = Faults(error_rate=1.0)  # too short to be switched off for
    assert host.ask(4, 5) == 0
    faulty.faults = Faults()
    kept = dict(held)
    held.clear()
    host.run_until(lambda: held == kept)
    host.flushed()
    assert host.movers.figures()[0]["stored"] == 40
    faulty.faults = Faults(error_rate=1.0)  # with all that it had
    assert host.ask(4, 5) == 0
    faulty.faults = Faults()
    host.movers.tick()
    host.save(6, 1)
    host.flushed()
    assert host.movers.figures()[0]["stored"] == 41


def test_a_tier_that_cannot_say_what_is_gone_goes_on(held: dict[Key, bytes]) -> None:
    class Odd(Wrapper):
        def gone(self):
            raise ZeroDivisionError("theirs")

    host = Host(wrapped(Odd(MemoryTier(held))))
    for chain in (0, 2):
        host.save(chain, 5)
        host.flushed()
    assert len(held) == 10


def test_a_keeper_that_ends_reads_no_more_and_writes_what_it_has(held: dict[Key, bytes]) -> None:
    """Whose connection it has closed may still copy: no slot is given out to what comes from below."""
    first = Host(wrapped(MemoryTier(held)))
    first.save(0, 10)
    first.flushed()
    host = Host(wrapped(MemoryTier(held)))
    host.save(2, 5)
    host.movers.reading = False
    assert host.ask(0, 10) == 0
    assert len(host.keeper.chunks) == 5
    with pytest.raises(RequestRefused, match="this keeper is ending"):
        host.movers.prefetch(host.space, b"", b"")
    host.flushed()
    assert len(held) == 15


def test_a_tier_that_takes_nothing_more_is_read_and_written_again_later(held: dict[Key, bytes]) -> None:
    store = ReadOnly(MemoryTier(held))
    opened_ = wrapped(store)
    host = Host(opened_)
    store.refuses = False
    host.save(0, 5)
    host.flushed()
    host.forget_memory()
    store.refuses = True
    host.save(2, 5)
    host.run_until(lambda: not opened_.guard.writable)
    tries = store.tries
    assert host.movers.unwritten == 0  # nobody waits for it at the end
    with pytest.raises(RequestRefused, match="takes no values: read-only"):
        host.movers.write(0, np.arange(1))
    assert host.ask(0, 5) == 5
    host.save(4, 5)
    host.run_until(lambda: store.tries > tries)
    assert [host.movers.figures()[0][what] for what in ("available", "writable")] == [True, False]
    store.refuses = False
    host.run_until(lambda: opened_.guard.writable)
    host.flushed()
    assert len(held) == 15


def test_no_request_waits_for_a_store_that_is_slow_to_answer(held: dict[Key, bytes], faulty: Faulty) -> None:
    host = Host(wrapped(faulty))
    host.save(0, 5)
    host.flushed()
    host.forget_memory()
    faulty.faults = Faults(latency=0.05)
    keys = chain_keys(0, 5)
    for _ in range(30):
        found = host.keeper.lookup("s", host.space, keys)
        ticket = host.movers.fetch(Asked("s", host.space, keys, 0, 1e-9, 0.02), found)
        if not ticket:
            break
        host.run_until(lambda ticket=ticket: host.movers.fetches.stage("s", ticket) is Stage.DONE)
        host.movers.fetches.forget("s", ticket)
    else:
        raise AssertionError("each request was told to wait")
    faulty.faults = Faults()
    deadline = time.monotonic() + 10
    while not (ticket := host.movers.fetch(Asked("s", host.space, chain_keys(4, 5), 0, 1e-9, 0.02), found)):
        assert time.monotonic() < deadline, "it is fast again, and nobody notices"
        time.sleep(0.01)
        host.run_until(host.calls.empty)


def test_a_queue_forgets_the_oldest_beyond_its_bound(
    held: dict[Key, bytes], faulty: Faulty, monkeypatch
) -> None:
    monkeypatch.setattr(flush, "_MOST_WAITING", 20)
    opened_ = wrapped(faulty)
    host = Host(opened_, memory=64 * SMALL)
    faulty.faults = Faults(error_rate=1.0)
    host.save(0, 5)
    host.run_until(lambda: not opened_.guard.available and len(host.keeper.queues[0]) == 5)
    for chain in range(2, 20, 2):
        host.save(chain, 5)
    (figures,) = host.movers.figures()
    assert figures["waiting_chunks"] == 20
    assert figures["lost_chunks"] == 30
    faulty.faults = Faults()
    host.run_until(lambda: opened_.guard.available)
    host.flushed()
    assert len(held) == 20
    assert host.movers.figures()[0]["waiting_chunks"] == 0


def test_a_chunk_is_not_moved_down_twice_at_once(held: dict[Key, bytes]) -> None:
    """Else it would be leased twice by one claim, and its slot freed twice."""
    host = Host(wrapped(MemoryTier(held)))
    host.save(0, 3)
    keys = chain_keys(0, 3)
    with pytest.raises(RequestRefused, match="twice"):
        asyncio.run(move_down(host.keeper, host.movers, host.space, keys + keys, 0, drop=False, wait=0.0))
    host.keeper.check_integrity()
    host.flushed()
