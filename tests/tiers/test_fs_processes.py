"""The file-system tier between processes: shared, bounded together, and killed at any moment."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvkeep.errors import TierUnavailable
from kvkeep.tiers import fs_space
from kvkeep.tiers.base import Got, Key, Put, Tier
from kvkeep.tiers.seal import SEAL_BYTES, Sealed
from tests.tiers.fs_place import FsPlace, counted
from tests.tiers.fs_writer import BATCH, buffers_for, content_of
from tests.tiers.place import PAGE, buffers_of, closing, keys_of


@pytest.fixture
def place(tmp_path: Path) -> FsPlace:
    return FsPlace(tmp_path / "kv")


class Writer:
    """See fs_writer.py."""

    def __init__(self, place: FsPlace, capacity: int, size: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tiers.fs_writer", str(place.root), str(capacity), size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.pid = 0

    def begin(self, seed: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        while True:  # the fork may be quicker than its parent
            line = self._line()
            if len(line) < 24:
                self.pid = int(line)
                return

    def kill(self) -> list[Key]:
        """kill -9; all keys that were acknowledged."""
        os.kill(self.pid, signal.SIGKILL)
        keys = []
        while (line := self._line()) != "dead":
            keys.append(bytes.fromhex(line))
        return keys

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait(20)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the writer ended with {self.process.wait(20)}"
        return line.strip()


class Reader:
    """Reads what it finds, in a thread, while others write and are killed."""

    def __init__(self, place: FsPlace) -> None:
        self.tier = place.open(readonly="yes")
        self._stop, self._hits = threading.Event(), 0
        self._pool = ThreadPoolExecutor(1)
        self._work = self._pool.submit(self._read)

    def _read(self) -> None:
        source = random.Random(0)
        while not self._stop.is_set():
            there = [key for key, _ in iter(self.tier.keys())]  # type: ignore[attr-defined]
            results = look(self.tier, source.sample(there, min(BATCH, len(there))))
            assert Got.DAMAGED not in results
            self._hits += results.count(Got.HIT)

    def close(self) -> None:
        self._stop.set()
        self._work.result(20)
        self._pool.shutdown()
        self.tier.close()
        assert self._hits > BATCH


@contextmanager
def at_work(place: FsPlace, capacity: int, size: str = "small") -> Iterator[tuple[Writer, Writer, Reader]]:
    place.open(capacity=str(capacity)).close()
    one, other, reader = Writer(place, capacity, size), Writer(place, capacity, size), Reader(place)
    try:
        yield one, other, reader
    finally:
        one.close()
        other.close()
        reader.close()


def look(tier: Tier, keys: list[Key]) -> list[Got]:
    """Get them through the seal; every hit must be what that key has."""
    buffers = buffers_for(keys)
    results = Sealed(tier).get(keys, buffers)
    for key, buffer, result in zip(keys, buffers, results, strict=True):
        assert result is not Got.HIT or buffer[:-SEAL_BYTES] == content_of(key)
    return results


def assert_tidy(tier: Tier, place: FsPlace) -> None:
    """The books are right, and nothing is left of anybody."""
    assert counted(tier) == (place.used_bytes(), len(place.files()))
    assert len(list(place.root.glob("tmp/*"))) == 1
    assert not [path for path in place.files() if "tmp" in path.parts[-3:]]


# All three together are the hundred rounds. In each, one of two writers is killed amid the other's work, who
# goes on for a moment; in every second one both write the same values.


def killed(one: Writer, other: Writer, number: int, source: random.Random) -> Iterator[list[Key]]:
    """One round: what each of the two had been told is stored, once it is dead."""
    one.begin(number)
    other.begin(number if number % 2 else 1000 + number)
    time.sleep(source.uniform(0.0, 0.15))
    yield one.kill()
    yield other.kill()


def test_kill_9_loses_nothing_that_was_acknowledged(place: FsPlace) -> None:
    source, everything = random.Random(1), list[Key]()
    with at_work(place, 1 << 30) as (one, other, reader):
        for number in range(40):
            keys = list[Key]()
            for stored in killed(one, other, number, source):
                assert look(reader.tier, stored) == [Got.HIT] * len(stored)
                keys += stored
            keys = list(dict.fromkeys(keys))
            everything += keys
            with closing(place.open(capacity=str(1 << 30))) as tier:
                assert look(tier, keys) == [Got.HIT] * len(keys)
                assert_tidy(tier, place)
    assert len(everything) > 40 * BATCH
    with closing(place.open()) as tier:
        assert look(tier, everything) == [Got.HIT] * len(everything)


@pytest.mark.parametrize(
    ("size", "rounds", "bound"), [("small", 40, 64 * PAGE), ("large", 20, 24 << 20)], ids=["small", "large"]
)
def test_kill_9_while_evicting_leaves_whole_values_within_the_bound(
    place: FsPlace, size: str, rounds: int, bound: int
) -> None:
    """The large ones are written over evicted ones that are as long, past the page cache where that is to be
    had."""
    source, newest, count = random.Random(2), list[Key](), 0
    with at_work(place, bound, size) as (one, other, _reader):
        for number in range(rounds):
            for stored in killed(one, other, number, source):
                newest, count = [*newest, *stored][-200:], count + len(stored)
            assert place.used_bytes() <= bound
            with closing(place.open(capacity=str(bound))) as tier:
                assert_tidy(tier, place)
                keys = list(dict.fromkeys(newest))
                assert Got.DAMAGED not in look(tier, [key for key in keys if size == "small"] or keys[-24:])
    assert count > BATCH


_HANG_IN_PUT = """
import mmap, sys, time
from kvkeep.tiers import fs
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.url import TierURL

tier = open_raw(TierURL("fs://" + sys.argv[1] + "?depth=2"))
rename, renames = fs.rename_new, []

def hang(*names):
    renames.append(names)
    if len(renames) == 3:
        print("hangs", flush=True)
    if len(renames) > 2:  # two threads may come here
        time.sleep(60)
    return rename(*names)

fs.rename_new = hang
keys = [b"namespac" + bytes([number] * 16) for number in range(8)]
tier.put(keys, [memoryview(mmap.mmap(-1, 4096)) for _ in keys])
"""


def test_a_process_killed_beside_others_leaves_the_books_a_batch_too_high_until_one_is_alone(
    place: FsPlace, child_process
) -> None:
    with closing(place.open(capacity="1MiB")) as beside:
        beside.put(keys_of(4), buffers_of([PAGE] * 4))
        child = child_process(_HANG_IN_PUT, str(place.root))
        assert child.line() == "hangs"
        assert counted(beside) == (12 * PAGE, 12)  # promised before a byte was written
        assert place.used_bytes() <= 12 * PAGE
        child.kill()
        with closing(place.open()) as third:
            assert not third.counting
            assert counted(third) == (12 * PAGE, 12)
            assert len(list(place.root.glob("tmp/*"))) == 2  # the dead one's temporaries are gone
            assert not list(place.root.glob("tmp/*/[0-9]*"))
            assert third.put(keys_of(1, 1), buffers_of([PAGE])) == [Put.STORED]
    with closing(place.open()) as alone:
        assert_tidy(alone, place)
        assert 5 <= counted(alone)[1] <= 7


def test_many_crashes_are_counted_off_though_others_are_at_work(place: FsPlace) -> None:
    with closing(place.open(capacity="1MiB")) as beside:
        for number in range(16):
            (place.root / "tmp" / f"dead{number}").mkdir()
        with closing(place.open()) as tier:
            assert counted(tier) == (0, 0)
            assert tier.put(keys_of(3), buffers_of([PAGE] * 3)) == [Put.STORED] * 3
        with closing(place.open()) as tier:
            assert not tier.counting
        assert counted(beside) == (3 * PAGE, 3)


def test_two_processes_share_what_they_put(place: FsPlace, child_process) -> None:
    script = (
        "import mmap, sys\n"
        "from kvkeep.tiers.open import open_tier\n"
        "tier = open_tier('fs://' + sys.argv[1]).tier\n"
        "value = memoryview(mmap.mmap(-1, 8192))\n"
        "value[:5] = b'child'\n"
        "print(tier.put([b'c' * 24], [value])[0].value, flush=True)\n"
        "sys.stdin.readline()\n"
        "print(tier.get([b'p' * 24], [value])[0].value, bytes(value[:6]).decode(), flush=True)\n"
        "tier.delete([b'p' * 24])\n"
        "tier.close()\n"
        "print('bye', flush=True)"
    )
    with closing(place.open()) as raw:
        tier, (value, back) = Sealed(raw), buffers_of([2 * PAGE] * 2)
        value[:6] = b"parent"
        assert tier.put([b"p" * 24], [value]) == [Put.STORED]
        child = child_process(script, str(place.root))
        assert child.line() == "stored"
        assert tier.get([b"c" * 24], [back]) == [Got.HIT]
        assert back[:5] == b"child"
        child.say()
        assert child.line() == "hit parent"
        assert child.line() == "bye"
        assert tier.contains([b"p" * 24, b"c" * 24]) == [False, True]
        assert counted(raw) == (2 * PAGE, 1)


def test_books_that_somebody_holds_are_an_outage_in_bounded_time(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs_space, "_LOCK_WAIT", 0.2)
    keys, sent = keys_of(2), buffers_of([PAGE] * 2)
    with closing(place.open(capacity="1MiB")) as tier:
        with (place.root / "usage").open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            began = time.monotonic()
            with pytest.raises(TierUnavailable, match="locked by another process"):
                tier.put(keys, sent)
            assert time.monotonic() - began < 5
            assert tier.get(keys, sent) == [Got.MISS] * 2  # reads need no books
        assert tier.put(keys, sent) == [Put.STORED] * 2
        with (place.root / "writers").open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert tier.put(keys, sent) == [Put.LATER] * 2
        assert tier.put(keys, sent) == [Put.STORED] * 2
    with closing(place.open()) as tier:  # what could not be noted is counted by the next
        assert counted(tier) == (2 * PAGE, 2)


def test_opening_at_the_same_time(place: FsPlace) -> None:
    script = (
        "import sys\n"
        "from kvkeep.tiers.open import open_tier\n"
        "sys.stdin.readline()\n"
        "for _ in range(20): open_tier('fs://' + sys.argv[1] + '?capacity=1MiB').tier.close()"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(place.root)], stdin=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.close()
    assert [child.wait(60) for child in children] == [0] * 4
    with closing(place.open()) as tier:
        assert not tier.counting
        assert_tidy(tier, place)


@contextmanager
def children_share(
    place: FsPlace, count: int, nbytes: int, bound: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    script = (
        "import random, sys, mmap\n"
        "from kvkeep.tiers.open import open_raw; from kvkeep.tiers.url import TierURL\n"
        "root, bound, nbytes, seed = sys.argv[1], *map(int, sys.argv[2:])\n"
        "source, memory = random.Random(seed), memoryview(mmap.mmap(-1, 8 << 16))\n"
        "tier = open_raw(TierURL(f'fs://{root}?capacity={bound}&depth=3'))\n"
        "stored = 0\n"
        "while nbytes > 0:\n"
        "    keys = [b'namespac' + source.randbytes(16) for _ in range(8)]\n"
        "    sizes = [source.randrange(1, 17) << 12 for _ in keys]\n"
        "    tier.put(keys, [memory[n << 16: (n << 16) + size] for n, size in enumerate(sizes)])\n"
        "    nbytes -= sum(sizes)\n"
        "tier.close()"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(place.root), str(bound), str(nbytes), str(seed)])
        for seed in range(count)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait(20)


def test_the_bound_holds_for_all_processes_together(place: FsPlace) -> None:
    bound = 8 << 20
    place.open(capacity=str(bound)).close()
    looks, most = 0, 0
    with children_share(place, 3, 20 * bound // 3, bound) as children:
        while any(child.poll() is None for child in children):
            time.sleep(0.03)
            with stopped([child for child in children if child.poll() is None]):  # so that it is one moment
                most = max(most, place.used_bytes())
                looks += 1
            assert most <= bound
        assert [child.wait(20) for child in children] == [0] * 3
    assert looks > 10
    assert most > bound // 2
    with closing(place.open()) as tier:
        assert not tier.counting
        assert_tidy(tier, place)


@contextmanager
def stopped(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """With every thread of these at rest."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        while not _rests(process.pid):
            time.sleep(0.0005)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def _rests(pid: int) -> bool:
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return all(task.rsplit(")", 1)[1].split()[0] in "TZX" for task in tasks)
