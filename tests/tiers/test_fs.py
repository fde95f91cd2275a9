"""The file-system tier in one process: the suite, eviction, books, faults of the medium, opening."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers import fs, fs_io, fs_space
from kvkeep.tiers.base import Got, Put, Tier
from kvkeep.tiers.fs_root import values
from kvkeep.tiers.open import open_raw, open_tier
from kvkeep.tiers.seal import Sealed
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import innermost
from tests.tiers.conformance import TierConformance
from tests.tiers.fs_place import FsPlace, counted
from tests.tiers.place import PAGE, Place, buffers_of, closing, keys_of, wait_until


@pytest.fixture
def place(tmp_path: Path) -> FsPlace:
    return FsPlace(tmp_path / "kv")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, where that is allowed."""
    path = tmp_path / "mounted"
    path.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "kvkeep-test", path],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


class TestFs(TierConformance):
    """Aligned buffers past the page cache, others through it."""


class TestBuffered(TierConformance):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        class Buffered(FsPlace):
            def open(self, **options: str) -> Tier:
                return super().open(direct="no", fsync="yes", depth="3", **options)

        return Buffered(tmp_path / "kv")


# Eviction


def test_recent_hits_survive(place: FsPlace) -> None:
    with closing(place.open(capacity=str(64 * PAGE))) as tier:
        old = [keys_of(8, seed) for seed in range(8)]
        for keys in old:
            tier.put(keys, buffers_of([PAGE] * 8))
        assert tier.get(old[0], buffers_of([PAGE] * 8)) == [Got.HIT] * 8
        for seed in range(100, 104):
            tier.put(keys_of(8, seed), buffers_of([PAGE] * 8))
        assert tier.contains(old[0]) == [True] * 8
        assert tier.contains(old[1] + old[2]) == [False] * 16
        assert tier.contains(old[7]) == [True] * 8


def test_tails_of_chains_go_first(place: FsPlace) -> None:
    with closing(place.open(capacity=str(64 * PAGE))) as tier:
        chain = keys_of(40)
        tier.put(chain[:20], buffers_of([PAGE] * 20))
        tier.put(chain[20:], buffers_of([PAGE] * 20))
        tier.get(chain, buffers_of([PAGE] * 40))  # one use of all: their order is that of this batch
        for seed in range(1, 9):
            tier.put(keys_of(4, seed), buffers_of([PAGE] * 4))
            held = tier.contains(chain)
            assert held == sorted(held, reverse=True)
        assert 10 <= sum(held) <= 36


def test_it_tells_what_it_has_removed(place: FsPlace) -> None:
    with closing(place.open(capacity=str(64 * PAGE))) as tier:
        put = [key for seed in range(12) for key in keys_of(16, seed)]
        for start in range(0, len(put), 16):
            tier.put(put[start : start + 16], buffers_of([PAGE] * 16))
        told = tier.gone()
        assert sorted(told) == sorted(
            key for key, here in zip(put, tier.contains(put), strict=True) if not here
        )
        assert len(told) >= 8 * 16
        kept = next(key for key, here in zip(put, tier.contains(put), strict=True) if here)
        tier.delete([kept, *told])
        assert tier.gone() == [kept]
        assert tier.gone() == []


def test_a_peek_is_no_use(place: FsPlace) -> None:
    with closing(place.open(capacity=str(64 * PAGE))) as tier:
        first, second = keys_of(32, 1), keys_of(32, 2)
        tier.put(first, buffers_of([PAGE] * 32))
        tier.put(second, buffers_of([PAGE] * 32))
        assert tier.peek(first, buffers_of([PAGE] * 32)) == [Got.HIT] * 32
        tier.put(keys_of(8, 3), buffers_of([PAGE] * 8))
        assert sum(tier.contains(first)) <= 24
        assert tier.contains(second) == [True] * 32


def test_a_hot_set_survives_five_times_the_bound_and_the_search_is_short(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, real = [0], fs_space.values

    def counting(root: str, fan_out: int, prune: bool = False):
        for found in real(root, fan_out, prune):
            looked[0] += 1
            yield found

    monkeypatch.setattr(fs_space, "values", counting)
    with closing(place.open(capacity=str(600 * PAGE))) as tier:
        hot = keys_of(60)
        tier.put(hot, buffers_of([PAGE] * 60))
        looked[0], evicted = 0, 0
        for seed in range(50):
            assert tier.put(keys_of(60, seed + 1), buffers_of([PAGE] * 60)) == [Put.STORED] * 60
            assert tier.get(hot, buffers_of([PAGE] * 60)) == [Got.HIT] * 60
            evicted += 60
        assert looked[0] < 12 * evicted
        assert place.used_bytes() <= 600 * PAGE


def test_a_namespace_that_nobody_uses_is_evicted(place: FsPlace) -> None:
    with closing(place.open(capacity=str(64 * PAGE))) as tier:
        stale = [b"oldmodel" + key[8:] for key in keys_of(32)]
        tier.put(stale, buffers_of([PAGE] * 32))
        for seed in range(1, 9):
            tier.put(keys_of(8, seed), buffers_of([PAGE] * 8))
        assert not any(tier.contains(stale))


def test_empty_directories_are_removed_in_passing(place: FsPlace) -> None:
    with closing(place.open(capacity="1MiB")) as tier:
        keys = keys_of(20)
        tier.put(keys, buffers_of([PAGE] * 20))
        tier.delete(keys[1:])
        for fan_out in range(256):
            assert len(list(values(str(place.root), fan_out, prune=True))) == (keys[0][8] == fan_out)
        assert [path.name for path in (place.root / keys[0][:8].hex()).iterdir()] == [f"{keys[0][8]:02x}"]
        tier.delete(keys)
        for fan_out in range(256):
            assert not list(values(str(place.root), fan_out, prune=True))
        assert not (place.root / keys[0][:8].hex()).exists()
        assert tier.put(keys, buffers_of([PAGE] * 20)) == [Put.STORED] * 20


@pytest.mark.parametrize("sealed", [True, False])
def test_what_is_evicted_under_a_reader_is_a_miss_and_never_other_bytes(place: FsPlace, sealed: bool) -> None:
    """Evicted files are overwritten in place, also while somebody has them open."""
    bound, size, batch = 48, 32 * PAGE, 8
    rounds: list[tuple[list[bytes], list[memoryview]]] = []
    seen: list[Got] = []
    problems: list[str] = []
    done = threading.Event()
    with closing(place.open(capacity=str(bound * size))) as raw, closing(place.open(depth="2")) as other:
        through = Sealed(other) if sealed else other
        put = Sealed(raw) if sealed else raw

        def read(seed: int) -> None:
            source, back = random.Random(seed), buffers_of([size] * batch)
            while not done.is_set():
                if not rounds:
                    time.sleep(0)
                    continue
                keys, sent = rounds[-source.randrange(1, min(len(rounds), 8) + 1)]
                results = through.get(keys, back)
                seen.extend(results)
                for result, got, was in zip(results, back, sent, strict=True):
                    if result is Got.HIT and got != was:
                        problems.append("other bytes")

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        try:
            for seed in range(60):
                keys, sent = keys_of(batch, seed), buffers_of([size] * batch, seed)
                assert put.put(keys, sent) == [Put.STORED] * batch
                rounds.append((keys, sent))
        finally:
            done.set()
            for reader in readers:
                reader.join()
    assert not problems
    assert Got.DAMAGED not in seen
    assert seen.count(Got.HIT) > 100
    assert Got.MISS in seen


@pytest.mark.parametrize("sealed", [True, False])
def test_a_file_that_loses_its_name_while_it_is_read_is_a_miss(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    (key,), (value,), (back,) = keys_of(1), buffers_of([2 * PAGE], 1), buffers_of([2 * PAGE])
    with closing(place.open()) as raw:
        tier, real = Sealed(raw) if sealed else raw, fs.transfer
        tier.put([key], [value])

        def evicted_in_between(call, fd, view, direct):
            spare = place.root / "spare"
            place.path(key).rename(spare)
            spare.write_bytes(b"?" * 2 * PAGE)
            return real(call, fd, view, direct)

        monkeypatch.setattr(fs, "transfer", evicted_in_between)
        assert tier.get([key], [back]) == [Got.MISS]


def test_where_all_values_are_always_in_use_the_oldest_go(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = fs_space.Space._choose

    def and_use(space: fs_space.Space, nbytes: int, **options: bool) -> list:
        victims = choose(space, nbytes, **options)
        for victim in victims:
            os.utime(victim.path)
        return victims

    monkeypatch.setattr(fs_space.Space, "_choose", and_use)
    with closing(place.open(capacity=str(8 * PAGE))) as tier:
        for seed in range(4):
            assert tier.put(keys_of(8, seed), buffers_of([PAGE] * 8)) == [Put.STORED] * 8


def test_evicted_files_are_overwritten_by_values_as_long(place: FsPlace) -> None:
    with closing(place.open(capacity=str(64 * PAGE))) as tier:
        tier.put(keys_of(32), buffers_of([2 * PAGE] * 32))
        before = {path.stat().st_ino for path in place.files()}
        keys, sent, back = keys_of(8, 1), buffers_of([2 * PAGE] * 8, 1), buffers_of([2 * PAGE] * 8)
        assert tier.put(keys, sent) == [Put.STORED] * 8
        assert {path.stat().st_ino for path in place.files()} == before
        assert tier.get(keys, back) == [Got.HIT] * 8
        assert back == sent
        assert tier.put(keys_of(4, 2), buffers_of([3 * PAGE] * 4)) == [Put.STORED] * 4
        assert counted(tier) == (place.used_bytes(), len(place.files()))


def test_a_batch_larger_than_the_bound_keeps_its_beginning(place: FsPlace) -> None:
    with closing(place.open(capacity=str(10 * PAGE))) as tier:
        keys = keys_of(30)
        put = tier.put(keys, buffers_of([PAGE] * 30))
        assert put == [Put.STORED] * 10 + [Put.REFUSED] * 20
        sizes = [PAGE, 11 * PAGE, 2 * PAGE]
        assert tier.put(keys_of(3, 1), buffers_of(sizes)) == [Put.STORED, Put.REFUSED, Put.STORED]


# The books


def test_usage_follows_puts_replacements_and_deletes(place: FsPlace) -> None:
    with closing(place.open(capacity="1MiB")) as tier:
        keys = keys_of(4)
        tier.put(keys, buffers_of([PAGE, 2 * PAGE, 100, 5000]))
        assert counted(tier) == (6 * PAGE, 4)
        tier.put(keys[:2], buffers_of([3 * PAGE, PAGE]))
        assert counted(tier) == (7 * PAGE, 4)
        assert place.used_bytes() == 7 * PAGE
        tier.delete([*keys[1:3], *keys_of(3, 1)])
        assert counted(tier) == (5 * PAGE, 2)
        assert tier.usage().capacity_bytes == 1 << 20
    with closing(place.open()) as again:
        assert not again.counting
        assert counted(again) == (5 * PAGE, 2)
        assert again.usage().capacity_bytes == 1 << 20  # that of the first opening


def test_replacements_and_removals_by_many_threads_leave_the_books_right(place: FsPlace) -> None:
    with closing(place.open(capacity=str(100 * PAGE))) as tier, closing(place.open()) as other:
        keys = keys_of(12)

        def work(through: Tier, seed: int) -> None:
            for turn in range(30):
                through.put(
                    keys, buffers_of([PAGE * (1 + (seed + turn + number) % 4) for number in range(12)])
                )
                through.delete(keys[(seed + turn) % 4 :: 4])

        threads = [threading.Thread(target=work, args=((tier, other)[seed % 2], seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted(tier) == (place.used_bytes(), len(place.files()))


def test_values_removed_by_hand_are_noticed_when_room_is_short(place: FsPlace) -> None:
    with closing(place.open(capacity=str(16 * PAGE))) as tier:
        tier.put(keys_of(16), buffers_of([PAGE] * 16))
        counted(tier)
        for path in place.files():
            path.unlink()
        more = keys_of(16, 1)
        tier.put(more, buffers_of([PAGE] * 16))  # the books are full, and there is nothing to evict
        assert counted(tier) == (place.used_bytes(), len(place.files()))
        assert tier.put(more, buffers_of([PAGE] * 16)) == [Put.STORED] * 16


def test_books_that_are_lost_are_made_again_and_reads_do_not_wait(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, sent = keys_of(20), buffers_of([PAGE] * 20, 1)
    with closing(place.open(capacity="1MiB")) as tier:
        tier.put(keys, sent)
    (place.root / "usage").unlink()
    go, scan = threading.Event(), fs_space.Space.scan

    def slow(space):
        assert go.wait(20)
        return scan(space)

    monkeypatch.setattr(fs_space.Space, "scan", slow)
    with closing(place.open()) as tier, closing(place.open()) as other:
        assert tier.counting
        for through in (tier, other):
            back = buffers_of([PAGE] * 20)
            assert through.get(keys, back) == [Got.HIT] * 20
            assert back == sent
            assert all(through.contains(keys))
            assert through.put(keys_of(2, 1), buffers_of([PAGE] * 2)) == [Put.LATER] * 2
        assert tier.usage().values is None
        tier.delete(keys[:1])
        go.set()
        assert counted(tier) == (19 * PAGE, 19)
        assert counted(other) == (19 * PAGE, 19)
        assert other.put(keys_of(2, 1), buffers_of([PAGE] * 2)) == [Put.STORED] * 2
        assert counted(other) == (21 * PAGE, 21)


def test_a_count_under_way_does_not_hold_up_close(place: FsPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(place.open(capacity="8MiB")) as tier:
        tier.put(keys_of(500), buffers_of([PAGE] * 500))
    (place.root / "usage").unlink()
    real = fs_space.values

    def slow(root, fan_out, prune=False):
        threading.Event().wait(0.02)
        return real(root, fan_out, prune)

    monkeypatch.setattr(fs_space, "values", slow)
    place.open().close()
    monkeypatch.undo()
    with closing(place.open()) as tier:
        assert counted(tier) == (500 * PAGE, 500)


# Faults of the medium


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path, flags, mode=0o777):
        fd = real(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:  # as Linux does: the new file is there
            os.close(fd)
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return fd

    monkeypatch.setattr(os, "open", refuse)


def test_where_o_direct_is_refused_it_is_done_without(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch)
    keys, sent, back = keys_of(3), buffers_of([4 * PAGE] * 3, 1), buffers_of([4 * PAGE] * 3)
    with closing(place.open()) as tier:
        assert not tier.direct
        assert tier.put(keys, sent) == [Put.STORED] * 3
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert back == sent
    with pytest.raises(ConfigError, match="without O_DIRECT: leave out direct=yes"):
        place.open(direct="yes")


def test_a_transfer_refused_or_cut_short_under_o_direct_goes_on_without(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, sent, back = keys_of(3), buffers_of([4 * PAGE] * 3, 1), buffers_of([4 * PAGE] * 3)
    moves = [0, 0]

    def fussy(real):
        def move(fd, views, at):
            moves[0] += 1
            if at or moves[0] % 2:
                if os.get_inheritable(fd) or fs_io.fcntl.fcntl(fd, fs_io.fcntl.F_GETFL) & os.O_DIRECT:
                    raise OSError(errno.EINVAL, "not aligned to what I need")
                return real(fd, views, at)
            moves[1] += 1
            fs_io.fcntl.fcntl(fd, fs_io.fcntl.F_SETFL, 0)
            return real(fd, [views[0][:5000]], at)

        return move

    with closing(place.open(depth="1")) as tier:
        assert tier.direct
        monkeypatch.setattr(os, "pwritev", fussy(os.pwritev))
        monkeypatch.setattr(os, "preadv", fussy(os.preadv))
        assert tier.put(keys, sent) == [Put.STORED] * 3
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert back == sent
        assert moves[1]


def test_without_o_direct_in_the_middle_a_value_is_written_all_the_same(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a remount: the probe at open said yes."""
    keys, sent, back = keys_of(3), buffers_of([4 * PAGE] * 3, 1), buffers_of([4 * PAGE] * 3)
    with closing(place.open()) as tier:
        assert tier.direct
        refuse_direct(monkeypatch)
        assert tier.put(keys, sent) == [Put.STORED] * 3
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert back == sent


def test_where_a_rename_cannot_refuse_to_replace_links_are_made(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: a value is new there, or it replaces one; nothing of ours stays behind."""
    monkeypatch.setattr(fs, "rename_new", lambda _source, _target: False)
    keys, sent, back = keys_of(3), buffers_of([PAGE] * 3, 1), buffers_of([PAGE] * 3)
    with closing(place.open()) as tier:
        for _ in range(2):
            assert tier.put(keys, sent) == [Put.STORED] * 3
            assert counted(tier) == (3 * PAGE, 3)
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert back == sent
        assert not list(place.root.glob("tmp/*/[0-9]*"))


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_a_fault_of_the_medium_is_an_outage_and_leaves_nothing(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    keys, sent, back = keys_of(8), buffers_of([PAGE] * 8, 1), buffers_of([PAGE] * 8)

    def fail(*_args):
        raise OSError(code, os.strerror(code))

    with closing(place.open(capacity="1MiB", depth="2")) as tier:
        tier.put(keys[:4], sent[:4])
        for module, name in ((os, "pwritev"), (fs, "rename_new")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                with pytest.raises(TierUnavailable, match=os.strerror(code)):
                    tier.put(keys[4:], sent[4:])
            assert len(place.files()) == 4
            assert counted(tier) == (4 * PAGE, 4)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(TierUnavailable, match=os.strerror(code)):
                tier.get(keys, back)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", fail)
            with pytest.raises(TierUnavailable, match=os.strerror(code)):
                tier.delete(keys)
        assert tier.get(keys[:4], back[:4]) == [Got.HIT] * 4
        assert tier.put(keys, sent) == [Put.STORED] * 8


def test_one_file_that_cannot_be_read_is_damaged_and_the_others_are_hits(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, sent, back = keys_of(8), buffers_of([PAGE] * 8, 1), buffers_of([PAGE] * 8)
    with closing(place.open(depth="2")) as tier:
        tier.put(keys, sent)
        bad, real = place.path(keys[3]).stat().st_ino, os.preadv

        def read(fd, views, at):
            if os.fstat(fd).st_ino == bad:
                raise OSError(errno.EIO, "bad sector")
            return real(fd, views, at)

        monkeypatch.setattr(os, "preadv", read)
        assert tier.get(keys, back) == [Got.DAMAGED if number == 3 else Got.HIT for number in range(8)]


def test_a_directory_that_vanishes_is_an_outage(place: FsPlace) -> None:
    with closing(place.open()) as tier:
        place.root.rename(place.root.with_name("elsewhere"))
        with pytest.raises(TierUnavailable):
            tier.contains(keys_of(1))
        with pytest.raises(TierUnavailable):
            tier.put(keys_of(1), buffers_of([PAGE]))
        place.root.with_name("elsewhere").rename(place.root)
        assert tier.put(keys_of(1), buffers_of([PAGE])) == [Put.STORED]


def test_a_file_system_that_turns_read_only_takes_no_values_until_it_is_writable_again(
    mounted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, again = FsPlace(mounted / "kv"), ["mount", "--bind", mounted, mounted]
    keys, sent, back = keys_of(4), buffers_of([PAGE] * 4, 1), buffers_of([PAGE] * 4)
    opened = open_tier(place.address(capacity="4MiB"))
    with closing(opened.tier) as tier:
        assert tier.put(keys[:2], sent[:2]) == [Put.STORED] * 2
        subprocess.run(again, check=True)  # over the first: that one has files open
        subprocess.run(["mount", "-o", "remount,bind,ro", mounted], check=True)
        try:
            for _ in range(4):
                with pytest.raises(TierUnavailable, match="Read-only file system"):
                    tier.put(keys, sent)
            assert not opened.guard.writable
            (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert "is only read until it takes values again" in warning
            assert tier.get(keys, back) == [Got.HIT] * 2 + [Got.MISS] * 2
            assert back[:2] == sent[:2]
        finally:
            subprocess.run(["umount", mounted], check=True)
        wait_until(lambda: opened.guard.put_due, 10)
        assert tier.put(keys, sent) == [Put.STORED] * 4
        assert opened.guard.writable
        assert counted(innermost(tier)) == (4 * PAGE, 4)


def test_a_full_file_system_refuses_and_is_lived_in(mounted: Path) -> None:
    place = FsPlace(mounted / "kv")
    with closing(place.open(capacity="6MiB")) as tier:
        first = keys_of(32)
        assert tier.put(first, buffers_of([16 * PAGE] * 32, 1)) == [Put.STORED] * 32
        ballast = mounted / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:  # all that is left, but a little
            for _ in range(8 << 20 >> 16):
                file.write(bytes(1 << 16))
                file.flush()
        for seed in range(1, 12):  # what was not used for long gives way, though the books have room
            assert tier.put(keys_of(8, seed), buffers_of([16 * PAGE] * 8, seed)) == [Put.STORED] * 8
            assert counted(tier) == (place.used_bytes(), len(place.files()))
        put = tier.put(keys_of(60, 20), buffers_of([16 * PAGE] * 60, 20))
        assert Put.REFUSED in put
        assert counted(tier) == (place.used_bytes(), len(place.files()))
        ballast.unlink()
        assert tier.put(keys_of(32, 1), buffers_of([16 * PAGE] * 32, 2)) == [Put.STORED] * 32
    assert not list(place.root.glob("tmp/*"))


def test_a_file_system_that_is_read_only(mounted: Path) -> None:
    place, keys, sent = FsPlace(mounted / "kv"), keys_of(4), buffers_of([PAGE] * 4, 1)
    with closing(place.open(capacity="6MiB")) as tier:
        tier.put(keys, sent)
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    with pytest.raises(ConfigError, match="mounted read-only: mount it writable, or set readonly=yes"):
        place.open()
    back = buffers_of([PAGE] * 4)
    with closing(place.open(readonly="yes")) as reader:
        assert reader.get(keys, back) == [Got.HIT] * 4
        assert back == sent


def test_flipped_bits_on_the_way_are_damage_also_where_the_tier_checks_itself(place: FsPlace) -> None:
    keys, sent = keys_of(4), buffers_of([4 * PAGE] * 4, 1)
    opened = open_tier(f"faulty+fs://{place.root}?fault_flips=1")
    with closing(opened.tier) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 4
        assert tier.get(keys, buffers_of([4 * PAGE] * 4)) == [Got.DAMAGED] * 4
        assert tier.contains(keys) == [False] * 4


# Opening


def test_readonly_touches_nothing(place: FsPlace) -> None:
    with pytest.raises(ConfigError, match="not there"):
        place.open(readonly="yes")
    keys, sent, back = keys_of(2), buffers_of([PAGE] * 2, 1), buffers_of([PAGE] * 2)
    with closing(place.open()) as tier:
        tier.put(keys, sent)

    def look() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in place.root.rglob("*")}

    before = look()
    with closing(place.open(readonly="yes")) as tier:
        assert tier.get(keys, back) == [Got.HIT] * 2
        assert back == sent
        assert tier.put(keys, sent) == [Put.REFUSED] * 2
        with pytest.raises(TierUnavailable, match="readonly"):
            tier.delete(keys)
        assert tier.usage().values == 2
    assert look() == before


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ConfigError, match="not empty and not a kvkeep directory: give an empty or a new one"):
        FsPlace(tmp_path / "photos").open()
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_the_root_of_a_fresh_disk_will_do(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    with closing(FsPlace(tmp_path).open()) as tier:
        assert tier.put(keys_of(1), buffers_of([PAGE])) == [Put.STORED]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"kind": "kvkeep fs tier", "format": 2, "capacity_bytes": 1 << 20}, "written in format 2"),
        ({"kind": "something", "format": 1, "capacity_bytes": 1 << 20}, "format 1 of 'something'"),
        ({"format": 1}, "is not one of kvkeep's"),
        ([], "is not one of kvkeep's"),
        ("{", "is not one of kvkeep's"),
    ],
)
def test_another_format_is_left_alone(tmp_path: Path, meta: object, message: str) -> None:
    text = meta if isinstance(meta, str) else json.dumps(meta)
    (tmp_path / "kvkeep.json").write_text(text)
    (tmp_path / "value").write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        FsPlace(tmp_path).open()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kvkeep.json", "value"]
    assert (tmp_path / "kvkeep.json").read_text() == text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("fs://data/kv", "three slashes"),
        ("fs:///", "three slashes"),
        ("fs:///{}/missing/kv", "not there: create the directory"),
        ("fs:///{}/file", "is not a directory"),
        ("fs:///{}/file/kv", "is not a directory"),
        ("fs:///{}/kv?capacity=0", "set the option capacity"),
        ("fs:///{}/kv?capacity=9999TiB", "set the option capacity"),
        ("fs:///{}/kv?mount=yes", "not on a mounted file system"),
        ("fs:///{}/kv?direct=perhaps", "direct must be one of auto, yes, no"),
        ("fs:///{}/kv?depth=0", "depth must be 1 or more"),
        ("fs:///{}/kv?capcity=1GiB", "did you mean 'capacity'"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(tmp_path: Path, url: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    if "mount" in url and any(map(os.path.ismount, list(tmp_path.parents)[:-1])):
        pytest.skip("the temporary directory is on a mount of its own")
    with pytest.raises(ConfigError, match=message):
        open_tier(url.format(str(tmp_path).lstrip("/")))


def test_without_a_capacity_it_is_half_of_what_is_free(place: FsPlace, mounted: Path) -> None:
    with closing(open_raw(TierURL(f"fs://{mounted}/kv?mount=yes"))) as tier:
        assert tier.usage().capacity_bytes == pytest.approx(4 << 20, rel=0.05)


def test_where_no_permission_is_given(tmp_path: Path) -> None:
    if os.getuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="no permission"):
            FsPlace(tmp_path / "kv").open()
        return
    script = (
        "import os, sys, kvkeep.tiers.fs\n"
        "from kvkeep.tiers.open import open_tier; from kvkeep.errors import ConfigError\n"
        "os.setuid(65534)\n"
        "try: open_tier('fs://' + sys.argv[1])\n"
        "except ConfigError as error: print(error)"
    )
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "kv")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "no permission" in done.stdout, done.stderr


# What the books may have wrong is counted by whoever opens the directory next


def test_eviction_that_fails_halfway_leaves_doubts(place: FsPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = fs_space.Space._sample

    def the_second_fails(space: fs_space.Space) -> None:
        if space.gone:  # a value was evicted, and kept to be overwritten
            raise OSError(errno.EIO, "bad directory")
        sample(space)

    with closing(place.open(capacity=str(8 * PAGE))) as tier:
        assert tier.put(keys_of(8), buffers_of([PAGE] * 8)) == [Put.STORED] * 8
        with monkeypatch.context() as patch:
            patch.setattr(fs_space.Space, "_sample", the_second_fails)
            with pytest.raises(TierUnavailable, match="bad directory"):
                tier.put(keys_of(4, 1), buffers_of([PAGE] * 4))
        assert place.used_bytes() == 7 * PAGE
    with closing(place.open()) as tier:
        assert counted(tier) == (7 * PAGE, 7)


def test_books_that_are_held_for_too_long_leave_doubts(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(place.open(capacity="1MiB")) as tier:
        monkeypatch.setattr(fs_space, "_LOCK_WAIT", 0.1)
        with tier._space._mutex, pytest.raises(TierUnavailable, match="locked by this process"):
            tier.put(keys_of(2), buffers_of([PAGE] * 2))
        assert not tier._space.exact


def test_with_fsync_the_names_of_new_directories_are_durable_too(
    place: FsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = set(), fs.sync_directory

    def sync(path: str) -> None:
        synced.add(path)
        real(path)

    monkeypatch.setattr(fs, "sync_directory", sync)
    keys = keys_of(3)
    with closing(place.open(fsync="yes")) as tier:
        assert tier.put(keys, buffers_of([PAGE] * 3)) == [Put.STORED] * 3
    folders = {place.path(key).parent for key in keys}
    assert synced == {str(path) for path in {*folders, *(folder.parent for folder in folders), place.root}}
