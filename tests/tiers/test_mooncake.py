"""The mooncake tier on a real master and node; both are stopped and killed under it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mooncake", reason="needs mooncake: pip install 'kvkeep[mooncake]'")
try:
    import mooncake.store  # noqa: F401
except ImportError as error:
    pytest.skip(f"{error}: apt-get install libibverbs1 libnuma1 libcurl4", allow_module_level=True)

from kvbench.memory import Bed
from kvbench.raw_mooncake import RawMooncake
from kvkeep.errors import ConfigError, TierStillReads, TierUnavailable
from kvkeep.tiers.base import Got, Key, Put, Tier, key_name
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.url import TierURL
from tests.tiers import moon
from tests.tiers.conformance import TierConformance
from tests.tiers.netns import loopback_only
from tests.tiers.place import PAGE, Place, buffers_of, closing, free_port, keys_of, query

MIB = 1 << 20
NODE_BYTES = 512 * MIB


class MoonPlace(Place):
    capacity_option = None  # the nodes' memory is the bound

    def __init__(self, master: moon.Master, node: moon.Node, behind: Any) -> None:
        self.master, self.node, self._behind = master, node, behind

    def address(self, **options: str) -> str:
        return f"mooncake://{self.master.address}{query({'hostname': '127.0.0.1', **options})}"

    def read(self, key: Key) -> bytes | None:
        return self._behind.get(key_name(key)) or None

    def write(self, key: Key, value: bytes) -> None:
        self._behind.remove(key_name(key), True)
        assert self._behind.put(key_name(key), value) == 0

    def used_bytes(self) -> int:
        raise NotImplementedError("no bound of ours, so nobody asks")


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Mooncake's clients listen on all interfaces, so there is only one here."""
    with loopback_only():
        yield


@pytest.fixture(scope="module")
def store(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoonPlace]:
    directory = tmp_path_factory.mktemp("mooncake")
    master = moon.Master(directory / "master.log")
    try:
        node = moon.Node(master.address, NODE_BYTES, directory / "node.log")
        try:
            behind = moon.client(master.address)
            yield MoonPlace(master, node, behind)
            behind.close()
        finally:
            node.kill()
    finally:
        master.kill()


@pytest.fixture
def place(store: MoonPlace) -> MoonPlace:
    store._behind.remove_all(True)
    return store


class TestMooncake(TierConformance):
    def test_overwrite(self, tier: Tier) -> None:
        """Objects are immutable: the first value stays until it is deleted."""
        (key,), (old,), (new,) = keys_of(1), buffers_of([4 * PAGE], 4), buffers_of([4 * PAGE], 5)
        (back,) = buffers_of([4 * PAGE])
        assert tier.put([key], [old]) == [Put.STORED]
        assert tier.put([key], [new]) == [Put.STORED]
        assert tier.get([key], [back]) == [Got.HIT]
        assert back == old
        tier.delete([key])
        assert tier.put([key], [new]) == [Put.STORED]
        assert tier.get([key], [back]) == [Got.HIT]
        assert back == new


def test_attached_memory_is_sent_and_filled_where_it_lies(place: MoonPlace, monkeypatch) -> None:
    every = buffers_of([2 * MIB] * 160, 1)
    sent, back = every[:80], every[80:]
    with closing(place.open()) as tier:
        tier.attach(memoryview(sent[0].obj))
        monkeypatch.setattr(tier._landings, "take_free", None)
        assert tier.put(keys_of(80), sent) == [Put.STORED] * 80
        assert tier.get([*keys_of(80)[1:], *keys_of(1, 9)], back) == [*[Got.HIT] * 79, Got.MISS]
        assert back[:79] == sent[1:]


@pytest.mark.parametrize("goes_on", [False, True])
def test_attached_memory_is_the_callers_again_once_a_late_read_is_over(
    place: MoonPlace, monkeypatch, goes_on: bool
) -> None:
    keys, every = keys_of(2), buffers_of([8 * MIB] * 4, 4)
    with closing(place.open(timeout="500ms")) as tier:
        tier.attach(memoryview(every[0].obj))
        tier.put(keys, every[:2])
        if goes_on:
            monkeypatch.setattr("kvkeep.tiers.mooncake.MOST_SECONDS", 0.0)
        place.node.stop()
        began = time.monotonic()
        with pytest.raises(TierStillReads, match="no answer within") as given_up:
            tier.get(keys, every[2:])
        assert time.monotonic() - began < 5
        assert not given_up.value.over.done()
        place.node.go_on()
        _until_back(tier)
        assert given_up.value.over.done() is not goes_on
        assert tier.get(keys, every[2:]) == [Got.HIT] * 2
        assert every[2:] == every[:2]


def test_the_raw_baseline_moves_what_the_tier_moves(place: MoonPlace) -> None:
    url = TierURL(f"mooncake://{place.master.address}?hostname=127.0.0.1")
    raw = RawMooncake(url, bed := Bed(MIB, 8, 2))
    for _ in range(2):
        assert raw.put() > 0
        assert raw.get() > 0
        raw.forget()
    raw.close()
    bed.close()


def test_values_longer_than_a_landing_are_refused(place: MoonPlace) -> None:
    keys, sent = keys_of(3), buffers_of([MIB, 3 * MIB, MIB], 2)
    with closing(place.open(buffer="2MiB")) as tier:
        assert tier.capabilities.max_value_bytes == 2 * MIB
        assert tier.put(keys, sent) == [Put.STORED, Put.REFUSED, Put.STORED]
        assert tier.get(keys, buffers_of([MIB, 3 * MIB, MIB])) == [Got.HIT, Got.MISS, Got.HIT]


def test_more_gets_at_once_than_landings(place: MoonPlace) -> None:
    keys, sent = keys_of(24), buffers_of([2 * MIB] * 24, 3)
    problems: list[str] = []
    with closing(place.open()) as tier:
        tier.put(keys, sent)

        def read() -> None:
            back = buffers_of([2 * MIB] * 24)
            for _ in range(5):  # a lease of 2 s is over before a busy machine has moved all: a miss
                if tier.get(keys, back) == [Got.HIT] * 24 and back == sent:
                    return
            problems.append("not all came back")

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not problems


def test_a_node_that_hangs_is_given_up_in_time_and_writes_nothing_late(place: MoonPlace) -> None:
    keys, sent, back = keys_of(4), buffers_of([8 * MIB] * 4, 4), buffers_of([8 * MIB] * 4)
    with closing(place.open(timeout="500ms")) as tier:
        tier.put(keys, sent)
        place.node.stop()
        for verb in (
            lambda: tier.get(keys, back),
            lambda: tier.put(keys_of(4, 9), sent),
        ):
            began = time.monotonic()
            with pytest.raises(TierUnavailable, match="no answer within"):
                verb()
            assert time.monotonic() - began < 5
        place.node.go_on()
        _until_back(tier)
        assert not any(any(buffer[:: 64 << 10]) for buffer in back)
        assert tier.get(keys, back) == [Got.HIT] * 4
        assert back == sent


def test_a_master_that_hangs_is_given_up_in_time(place: MoonPlace) -> None:
    keys, sent, back = keys_of(2), buffers_of([MIB] * 2, 5), buffers_of([MIB] * 2)
    with closing(place.open(timeout="500ms")) as tier:
        tier.put(keys, sent)
        place.master.stop()
        try:
            for verb in (
                lambda: tier.contains(keys),
                lambda: tier.get(keys, back),
                lambda: tier.put(keys_of(2, 9), sent),
                lambda: tier.delete(keys),
            ):
                began = time.monotonic()
                with pytest.raises(TierUnavailable):
                    verb()
                assert time.monotonic() - began < 5
        finally:
            place.master.go_on()
        _until_back(tier)
        assert tier.put(keys, sent) == [Put.STORED] * 2  # the late delete may have removed them
        assert tier.get(keys, back) == [Got.HIT] * 2
        assert back == sent


def test_close_ends_verbs_under_way(place: MoonPlace) -> None:
    keys, sent = keys_of(2), buffers_of([MIB] * 2, 7)
    tier, ended = place.open(timeout="30s"), list[str]()
    tier.put(keys, sent)

    def waiting() -> None:
        try:
            tier.get(keys, buffers_of([MIB] * 2))
        except TierUnavailable as error:
            ended.append(str(error))

    thread = threading.Thread(target=waiting)
    place.node.stop()
    try:
        thread.start()
        time.sleep(0.2)
        assert not ended
        began = time.monotonic()
        tier.close()
        thread.join(5)
        assert ended == ["mooncake: the tier is closed"]
        assert time.monotonic() - began < 5
    finally:
        place.node.go_on()


def test_a_transfer_that_may_still_go_on_keeps_its_memory(place: MoonPlace, monkeypatch) -> None:
    keys, sent, back = keys_of(2), buffers_of([8 * MIB] * 2, 7), buffers_of([8 * MIB] * 2)
    with closing(place.open(timeout="500ms")) as tier:
        tier.put(keys, sent)
        monkeypatch.setattr("kvkeep.tiers.mooncake.MOST_SECONDS", 0.0)
        place.node.stop()
        with pytest.raises(TierUnavailable):
            tier.get(keys, back)
        place.node.go_on()
        _until_back(tier)
        assert tier._landings._lost == 1
        assert tier.get(keys, back) == [Got.HIT] * 2
        assert back == sent


def test_a_batch_that_cannot_go_on_gives_its_landings_back(place: MoonPlace, monkeypatch) -> None:
    keys, sent = keys_of(6), buffers_of([8 * MIB] * 6, 7)
    with closing(place.open()) as tier:
        begin = tier._calls.begin
        for _ in range(2):
            left = iter([begin])  # the first group goes, the second one does not
            with monkeypatch.context() as patch:
                patch.setattr(tier._calls, "begin", lambda work, left=left: next(left, _refused)(work))
                with pytest.raises(TierUnavailable, match="too many"):
                    tier.get(keys, buffers_of([8 * MIB] * 6))
            _until_back(tier)
            assert tier._landings._free.qsize() == 4
        assert tier.put(keys, sent) == [Put.STORED] * 6
        assert tier.get(keys, sent) == [Got.HIT] * 6


def _refused(_work: Any) -> Any:
    raise TierUnavailable("too many are out")


def test_a_call_that_hangs_keeps_neither_close_nor_the_process(place: MoonPlace) -> None:
    script = f"""
import os, signal, sys, time
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.url import TierURL
tier = open_raw(TierURL("mooncake://{place.master.address}?hostname=127.0.0.1&timeout=300ms"))
os.kill({place.master._process.pid}, signal.SIGSTOP)
time.sleep(0.2)
try:
    tier.contains([b"k" * 24])
except TierUnavailable as error:
    print(error)
tier.close()
"""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=25, check=False
        )
    finally:
        place.master.go_on()
    assert (done.returncode, done.stdout) == (0, "mooncake: no answer within 0.3 s\n"), done.stderr[-2000:]


def test_the_memory_of_this_process_is_not_persistent(place: MoonPlace) -> None:
    with closing(place.open(segment="16MiB")) as tier:
        assert not tier.capabilities.persistent
        assert tier.capabilities.shared


def test_what_cannot_work_is_said_at_once(place: MoonPlace) -> None:
    master = place.master.address
    for url, message in (
        (f"mooncake://127.0.0.1:{free_port()}", "no master answers.*start mooncake_master"),
        ("mooncake://no-such-host.invalid", "no master answers at no-such-host.invalid:50051"),
        (f"mooncake://{master}/path", "write it as mooncake://master:port"),
        (f"mooncake://{master}?segment=1MiB", "segment must be 0, or 16 MiB"),
        (f"mooncake://{master}?timeout=0s", "timeout must be more than 0"),
        (f"mooncake://{master}?timeout=60s", "timeout must be 55 s or less"),
        (f"mooncake://{master}?protocol=udp", "protocol must be one of tcp, rdma"),
        (f"mooncake://{master}?metadata=http://127.0.0.1:1/x", "does not start.*metadata= and hostname="),
    ):
        began = time.monotonic()
        with pytest.raises(ConfigError, match=message):
            open_raw(TierURL(url))
        assert time.monotonic() - began < 20


@contextmanager
def small_store(directory: Path) -> Iterator[MoonPlace]:
    """One with 64 MiB that the test may break."""
    master = moon.Master(directory / "master.log")
    place = MoonPlace(master, moon.Node(master.address, 64 * MIB, directory / "node.log"), None)
    try:
        yield place
    finally:
        place.node.kill()
        place.master.kill()


def test_a_full_store_refuses_and_makes_room(network: None, tmp_path: Path) -> None:
    keys, sent, back = keys_of(6), buffers_of([8 * MIB] * 6, 8), buffers_of([8 * MIB] * 6)
    (other,), (large,), (into,) = keys_of(1, 1), buffers_of([24 * MIB], 9), buffers_of([24 * MIB])
    with small_store(tmp_path) as place, closing(place.open()) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 6
        assert tier.get(keys, back) == [Got.HIT] * 6  # which leases them: they make no room
        assert tier.put([other], [large]) == [Put.REFUSED]
        deadline = time.monotonic() + 30
        while tier.put([other], [large]) == [Put.REFUSED]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert tier.get([other], [into]) == [Got.HIT]
        assert into == large


def test_nodes_and_masters_may_die(network: None, tmp_path: Path) -> None:
    keys, sent, back = keys_of(2), buffers_of([MIB] * 2, 6), buffers_of([MIB] * 2)
    with small_store(tmp_path) as place, closing(place.open()) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 2
        place.node.kill()
        with pytest.raises(TierUnavailable, match="a transfer failed"):
            tier.get(keys, back)
        place.node = moon.Node(place.master.address, 64 * MIB, tmp_path / "node.log")
        _until_stored(tier, keys_of(2, 1), sent)
        place.master.kill()
        with pytest.raises(TierUnavailable, match="no master"):
            tier.contains(keys)
        place.master.start()
        _until_stored(tier, keys_of(2, 2), sent)
        assert tier.get(keys_of(2, 2), back) == [Got.HIT] * 2
        assert back == sent


def _until_back(tier: Any) -> None:
    """No call is out any more, nor what its end sets off."""
    deadline = time.monotonic() + 20
    while tier._calls.out:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _until_stored(tier: Tier, keys: list[Key], sent: list[memoryview]) -> None:
    """The books are in order again after some heartbeats."""
    deadline = time.monotonic() + 30
    while True:
        try:
            if tier.put(keys, sent) == [Put.STORED] * len(keys):
                return
        except TierUnavailable:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.3)
