"""The suite holds a tier in memory to the interface, and the wrappers around it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Capabilities, Got, Key, Put, Tier, Usage
from kvkeep.tiers.faults import Faults, Faulty
from kvkeep.tiers.guard import Guarded
from kvkeep.tiers.meter import Metered
from kvkeep.tiers.seal import SEAL_BYTES, Sealed, check_seal, seal
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import Wrapper
from tests.tiers.conformance import TierConformance
from tests.tiers.place import PAGE, Place, buffers_of, keys_of


class MemoryTier(Tier):
    """The least that is a tier: a dict. Shows that the suite asks for nothing else."""

    def __init__(self, held: dict[Key, bytes], capacity: int | None = None) -> None:
        self.held, self._capacity, self._open = held, capacity, True
        self._lock = threading.Lock()

    capabilities = Capabilities(shared=True, persistent=True)

    def contains(self, keys):
        self._check()
        return [key in self.held for key in keys]

    def get(self, keys, buffers):
        self._check()
        out = []
        for key, buffer in zip(keys, buffers, strict=True):
            value = self.held.get(key)
            if value is not None and len(value) == len(buffer):
                buffer[:] = value
            out.append(Got.MISS if value is None else Got.HIT if len(value) == len(buffer) else Got.DAMAGED)
        return out

    def put(self, keys, buffers):
        self._check()
        return [self._put(key, bytes(buffer)) for key, buffer in zip(keys, buffers, strict=True)]

    def _put(self, key: Key, value: bytes) -> Put:
        with self._lock:
            if self._capacity is not None:
                if len(value) > self._capacity:
                    return Put.REFUSED
                while sum(map(len, self.held.values())) + len(value) > self._capacity:
                    del self.held[next(iter(self.held))]
            self.held[key] = value
        return Put.STORED

    def delete(self, keys):
        self._check()
        for key in keys:
            self.held.pop(key, None)

    def usage(self):
        return Usage(sum(map(len, self.held.values())), self._capacity, len(self.held))

    def close(self):
        self._open = False

    def _check(self) -> None:
        if not self._open:
            raise TierUnavailable("closed")


class MemoryPlace(Place):
    def __init__(self) -> None:
        self.held: dict[Key, bytes] = {}

    def open(self, **options: str) -> Tier:
        return MemoryTier(self.held, int(options["capacity"]) if options else None)

    def opened(self) -> Metered:
        return Metered(Sealed(Guarded(self.open(), "memory")))

    def read(self, key):
        return self.held.get(key)

    def write(self, key, value):
        self.held[key] = value

    def used_bytes(self):
        return sum(map(len, self.held.values()))


class TestMemory(TierConformance):
    @pytest.fixture
    def place(self) -> Place:
        return MemoryPlace()


class TestWrapped(TierConformance):
    """A wrapper is the tier it wraps."""

    @pytest.fixture
    def place(self) -> Place:
        class Wrapped(MemoryPlace):
            def open(self, **options: str) -> Tier:
                return Metered(Guarded(Wrapper(super().open(**options)), "memory"))

        return Wrapped()


class Clock:
    """Counts in steps that floats add up exactly: a back-off is any fraction of a second."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1024) / 1024


class Broken(Wrapper):
    """Fails the next `failures` verbs."""

    failures = 0
    calls = 0

    def contains(self, keys):
        self._fail()
        return super().contains(keys)

    def put(self, keys, buffers):
        self._fail()
        return super().put(keys, buffers)

    def _fail(self) -> None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise TierUnavailable("down")


@pytest.fixture
def broken() -> Broken:
    return Broken(MemoryTier({}))


def guarded(inner: Tier) -> tuple[Guarded, Clock]:
    clock = Clock()
    return Guarded(inner, "test", clock, clock.sleep), clock


def test_a_single_failure_is_tried_again(broken: Broken) -> None:
    guard, clock = guarded(broken)
    broken.failures = 1
    assert guard.contains(keys_of(1)) == [False]
    assert clock.now == 0  # reads do not wait
    broken.failures = 2
    assert guard.put(keys_of(1), buffers_of([PAGE])) == [Put.STORED]
    assert clock.now > 0  # writes back off
    assert guard.available


def test_the_breaker_opens_stays_open_and_closes_by_a_probe(broken: Broken, caplog) -> None:
    guard, clock = guarded(broken)
    broken.failures = 7
    with pytest.raises(TierUnavailable), caplog.at_level(logging.WARNING):
        guard.put(keys_of(1), buffers_of([PAGE]))
    assert not guard.available
    assert broken.calls == 4  # a read has told that it was not the puts alone
    with pytest.raises(TierUnavailable, match="switched off: down"):
        guard.contains(keys_of(1))
    assert broken.calls == 4
    assert len(caplog.records) == 1
    waits = []
    while not guard.available:
        began = clock.now
        while not guard.probe_due:
            clock.sleep(0.25)
        waits.append(clock.now - began)
        guard.probe()
    assert waits == pytest.approx([1, 2, 4, 8])
    assert guard.contains(keys_of(1)) == [False]
    assert len(caplog.records) == 1  # one warning, however long it took


class ReadOnly(Wrapper):
    """Answers, and refuses puts while it is told to."""

    refuses = True
    tries = 0

    def put(self, keys, buffers):
        self.tries += 1
        if self.refuses:
            raise TierUnavailable("read-only")
        return super().put(keys, buffers)


def test_where_only_puts_fail_reads_go_on(caplog) -> None:
    store = ReadOnly(MemoryTier({}))
    guard, clock = guarded(store)
    (key,), sent = keys_of(1), buffers_of([PAGE])
    waits = []
    with caplog.at_level(logging.WARNING):
        while len(waits) < 7:
            began = clock.now
            while not (guard.writable or guard.put_due):
                assert guard.contains([key]) == [False]
                with pytest.raises(TierUnavailable, match="switched off: read-only"):
                    guard.put([key], sent)
                clock.sleep(0.25)
            waits.append(clock.now - began)
            with pytest.raises(TierUnavailable, match=r"^read-only"):
                guard.put([key], sent)
            assert guard.available
            assert not guard.writable
    assert waits == pytest.approx([0, 1, 2, 4, 8, 16, 30])
    assert store.tries == 3 + 6
    assert len(caplog.records) == 1
    store.refuses = False
    clock.sleep(30)
    assert guard.put([key], sent) == [Put.STORED]
    assert guard.writable


def test_a_slow_failure_of_a_read_is_not_tried_again(broken: Broken) -> None:
    guard, clock = guarded(broken)

    class Slow(Wrapper):
        def contains(self, keys):
            clock.sleep(1)
            return super().contains(keys)

    broken.failures = 1
    guard.inner = Slow(broken)
    with pytest.raises(TierUnavailable):
        guard.contains(keys_of(1))
    assert broken.calls == 1


class Paced(Wrapper):
    """Answers take 1 s; values pass at 1 MiB/s."""

    def __init__(self, inner: Tier, clock: Clock) -> None:
        super().__init__(inner)
        self.clock = clock
        self.first: Callable[[], object] | None = None
        """What the next get does before its own."""

    def contains(self, keys):
        self.clock.sleep(1)
        return super().contains(keys)

    def get(self, keys, buffers):
        first, self.first = self.first, None
        if first is not None:
            first()
        self.clock.sleep(1 + sum(map(len, buffers)) / (1 << 20))
        return super().get(keys, buffers)


def test_how_long_reading_takes_is_learnt_from_bytes_and_not_from_batches() -> None:
    clock, mib = Clock(), 1 << 20
    store = Paced(MemoryTier({}), clock)
    meter = Metered(store, clock)
    keys, sent = keys_of(2), buffers_of([mib, 4 * mib], 1)
    meter.put(keys, sent)
    assert meter.read_seconds(mib) == 0
    meter.contains(keys)
    assert meter.read_seconds(mib) == 1

    def get(place: int) -> None:
        assert meter.get(keys[place : place + 1], [sent[place]]) == [Got.HIT]

    store.first = lambda: clock.sleep(300)  # it dials
    get(0)
    assert meter.read_seconds(mib) < 20
    for _ in range(60):
        get(1)
    assert meter.read_seconds(8 * mib) == pytest.approx(1 + 8, rel=0.01)
    for _ in range(30):
        store.first = lambda: get(1)  # beside the other one, which waits meanwhile
        get(1)
    assert meter.read_seconds(8 * mib) == pytest.approx(1 + 9, rel=0.05)
    store.first = lambda: clock.sleep(1000)
    get(1)  # it is held up, once
    assert meter.read_seconds(8 * mib) == pytest.approx(1 + 9, rel=0.05)
    assert not meter.stale
    clock.sleep(31)
    assert meter.stale
    get(1)
    assert meter.read_seconds(mib) < 1.3  # what was before is forgotten


def test_an_answer_that_is_late_once_is_no_measure_and_a_place_that_is_back_is_as_fast_as_it_is_now() -> None:
    class Asked(Wrapper):
        took, fails = 1.0, False

        def contains(self, keys):
            clock.sleep(self.took)
            if self.fails:
                raise TierUnavailable("no answer in time") from TimeoutError()
            return super().contains(keys)

    clock = Clock()
    store = Asked(MemoryTier({}))
    meter = Metered(store, clock)

    def latency(took: float, fails: bool = False) -> float | None:
        store.took, store.fails = took, fails
        with contextlib.suppress(TierUnavailable):
            meter.contains([bytes(24)])
        return meter.latency

    assert [latency(took) for took in (1, 1, 1, 60)] == [1] * 4
    assert [latency(took) for took in (60, 60)] == [1, 60]  # it is slow now
    assert [latency(took) for took in (2, 2, 2)] == [60, 60, 2]
    assert [latency(60, fails=True) for _ in range(3)] == [2, 2, 60]
    assert latency(3) == 3


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(), "connection"),
        (OSError(28, "full"), "system"),
        (ValueError(), "other"),
        (TierUnavailable("no"), "other"),
    ],
)
def test_failures_are_counted_by_kind(cause: Exception, kind: str) -> None:
    class Failing(Wrapper):
        def contains(self, keys):
            try:
                _raise(cause)
            except Exception as error:  # the same one each time, as a client that keeps it may raise it
                raise RuntimeError from error

    guard, _ = guarded(Failing(MemoryTier({})))
    tier = Metered(guard)
    for _ in range(4):
        with pytest.raises(TierUnavailable):
            tier.contains([bytes(24)])
    figures = tier.figures()
    told = {name: count for name, count in figures.items() if name.startswith("errors_") and count}
    assert figures["errors"] == 4
    assert told.pop("errors_off") >= 1, "the breaker is open"
    assert sum(told.values()) == told[f"errors_{kind}"] >= 1


def test_the_seal_binds_key_length_and_every_byte() -> None:
    (key, other), (value,) = keys_of(2), buffers_of([PAGE], 1)
    before = bytes(value[:-SEAL_BYTES])
    seal(key, value)
    assert bytes(value[:-SEAL_BYTES]) == before
    assert check_seal(key, value)
    assert not check_seal(other, value)
    assert not check_seal(key, value[:-1])
    assert not check_seal(key, value[1:])
    assert not check_seal(key, value[:10])
    for place in (0, PAGE // 2, *range(PAGE - SEAL_BYTES, PAGE)):
        value[place] ^= 1
        assert not check_seal(key, value)
        value[place] ^= 1
    assert check_seal(key, value)


def test_what_is_damaged_is_counted_and_deleted_also_where_deleting_fails() -> None:
    class NoDelete(Wrapper):
        def delete(self, keys):
            raise TierUnavailable("read-only")

    held: dict[Key, bytes] = {}
    keys, sent = keys_of(2), buffers_of([PAGE] * 2, 1)
    meter = Metered(Sealed(NoDelete(MemoryTier(held))))
    meter.put(keys, sent)
    held[keys[0]] = held[keys[0]][:-1] + b"?"
    assert meter.get(keys, buffers_of([PAGE] * 2)) == [Got.DAMAGED, Got.HIT]
    assert [meter.counters[name] for name in ("hits", "damaged", "got_bytes")] == [1, 1, PAGE]


def test_faults_may_fall_on_some_verbs_only() -> None:
    tier = Faulty(MemoryTier({}), Faults.of(TierURL("faulty+a://b?fault_errors=1&fault_verbs=get,delete")))
    keys, sent = keys_of(1), buffers_of([PAGE], 1)
    assert tier.put(keys, sent) == [Put.STORED]
    assert tier.contains(keys) == [True]
    for verb in (lambda: tier.get(keys, sent), lambda: tier.delete(keys)):
        with pytest.raises(TierUnavailable):
            verb()
    with pytest.raises(ConfigError, match="fault_verbs='fetch': write some of contains, delete, get, put"):
        Faults.of(TierURL("faulty+a://b?fault_verbs=fetch"))


def test_faults_are_as_ordered() -> None:
    tier = Faulty(Sealed(MemoryTier({})), Faults(flip_rate=1.0))
    outer = Sealed(tier)
    keys, sent = keys_of(4), buffers_of([PAGE] * 4, 1)
    outer.put(keys, sent)
    assert outer.get(keys, buffers_of([PAGE] * 4)) == [Got.DAMAGED] * 4
    tier.faults = Faults(error_rate=1.0)
    with pytest.raises(TierUnavailable):
        outer.contains(keys)
    tier.faults = Faults(hang=True)
    failed = threading.Event()

    def wait() -> None:
        with pytest.raises(TierUnavailable):
            outer.contains(keys)
        failed.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not failed.wait(0.05)
    tier.release()
    assert failed.wait(5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/data/kv", "not a tier URL"),
        ("redis:host", "not a tier URL"),
        ("redis://host:port/0", "cannot read"),
        ("redis://[::1/0", "cannot read"),
        ("fs:///d?capacity", "cannot read"),
        ("nothing://x", "no tier of kind 'nothing'"),
        ("fs:///d?write=sometimes", "write must be one of through, second-touch, never"),
    ],
)
def test_urls_that_cannot_be_are_clear_errors(url: str, message: str) -> None:
    from kvkeep.tiers.open import open_tier

    with pytest.raises(ConfigError, match=message):
        open_tier(url)


def test_a_kind_of_a_third_party_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvkeep.tiers.open import open_tier

    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = "theirs = kvkeep_theirs:open_theirs\nbroken = kvkeep_theirs:no_such_name\n"
    (info / "entry_points.txt").write_text(f"[kvkeep.tiers]\n{points}")
    (tmp_path / "kvkeep_theirs.py").write_text(
        "from tests.tiers.test_wrappers import MemoryTier\n"
        "def open_theirs(url):\n"
        "    return MemoryTier({}, url.take_bytes('capacity', None))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tier = open_tier("theirs://x?capacity=1MiB&write=second-touch").tier
    (key,), sent, back = keys_of(1), buffers_of([PAGE], 1), buffers_of([PAGE])
    assert tier.put([key], sent) == [Put.STORED]
    assert tier.get([key], back) == [Got.HIT]
    assert back == sent
    assert tier.usage() == Usage(PAGE, 1 << 20, 1)
    with pytest.raises(ConfigError, match="unknown option 'size'"):
        open_tier("theirs://x?size=1MiB")
    with pytest.raises(ConfigError, match="broken://, which is kvkeep_theirs:no_such_name, cannot be loaded"):
        open_tier("broken://x")
    with pytest.raises(ConfigError, match=r"no tier of kind 'nothing': known are broken, .*s3, theirs"):
        open_tier("nothing://x")


def test_url_options_are_taken_or_named() -> None:
    url = TierURL("redis://me:secret@host:1/2?ttl=1h&capcity=4GiB&tls=no")
    assert "secret" not in str(url)
    assert url.password == "secret"
    assert url.take_seconds("ttl", 0) == 3600
    assert url.take_bytes("capacity", None) is None
    assert url.take_flag("tls", True) is False
    with pytest.raises(ConfigError, match="unknown option 'capcity': did you mean 'capacity'"):
        url.finish()
    with pytest.raises(ConfigError, match="ttl='soon': not a time"):
        TierURL("a://b?ttl=soon").take_seconds("ttl", 0)


def test_a_bug_in_a_tier_is_a_store_that_is_away(caplog) -> None:
    class Buggy(Wrapper):
        def get(self, keys, buffers):
            raise ZeroDivisionError("theirs")

    guard, _ = guarded(Buggy(MemoryTier({})))
    with pytest.raises(TierUnavailable, match="ZeroDivisionError: theirs"):
        guard.get(keys_of(1), buffers_of([PAGE]))
    assert "an unexpected error" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_tier_that_miscounts_is_a_store_that_is_away(count: int) -> None:
    class Short(Wrapper):
        def contains(self, keys):
            return [True] * count

        def get(self, keys, buffers):
            return [Got.HIT] * count

        def put(self, keys, buffers):
            return [Put.STORED] * count

    guard, _ = guarded(Short(MemoryTier({})))
    keys, buffers = keys_of(2), buffers_of([PAGE, PAGE])
    for verb in (
        lambda: guard.contains(keys),
        lambda: guard.get(keys, buffers),
        lambda: guard.put(keys, buffers),
    ):
        with pytest.raises(TierUnavailable, match=f"{count} results for 2 keys"):
            verb()
