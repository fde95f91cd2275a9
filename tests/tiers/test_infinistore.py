"""The infinistore tier on InfiniStore's own server, behind a proxy that cuts and hangs."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Got, Key, Put, key_name
from kvkeep.tiers.infinistore import Marker
from kvkeep.tiers.infinistore_wire import OK, Link, _payload
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.url import TierURL
from tests.tiers import infini
from tests.tiers.conformance import TierConformance
from tests.tiers.netns import loopback_only
from tests.tiers.place import PAGE, Place, Proxy, buffers_of, closing, free_port, keys_of, query


class InfiniPlace(Place):
    capacity_option = None  # the server's memory is the bound

    def __init__(self, server: infini.Server) -> None:
        self.server = server
        self.proxy = Proxy(("127.0.0.1", server.port))

    def address(self, **options: str) -> str:
        return f"infinistore://127.0.0.1:{self.proxy.port}{query(options)}"

    @contextmanager
    def link(self) -> Iterator[Link]:
        link = Link("127.0.0.1", self.server.port, 10)
        yield link
        link.close()

    def exists(self, name: bytes) -> bool:
        with self.link() as link:
            return link.exist([name])[0]

    def marker(self, key: Key) -> Marker | None:
        head = memoryview(bytearray(24))
        with self.link() as link:
            if link.get(key_name(key).encode(), head) < 0:
                return None
        return Marker(bytes(head[8:16]), int.from_bytes(head[16:], "little"))

    def read(self, key: Key) -> bytes | None:
        marker = self.marker(key)
        if marker is None:
            return None
        value = memoryview(bytearray(marker.length))
        with self.link() as link:
            assert link.get(marker.value_name(key), value) == marker.length
        return bytes(value)

    def write(self, key: Key, value: bytes) -> None:
        marker = Marker(b"\x01" * 8, len(value))
        with self.link() as link:
            assert link.put(marker.value_name(key), memoryview(value)) == OK
            assert link.put_small(key_name(key).encode(), marker.packed()) == OK

    def used_bytes(self) -> int:
        raise NotImplementedError("no bound of ours, so nobody asks")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[infini.Server]:
    python = infini.environment()
    with loopback_only():  # it listens on all interfaces, so there is only one here
        running = infini.Server(python, tmp_path_factory.mktemp("infinistore"))
        yield running
        running.kill()


@pytest.fixture
def place(server: infini.Server) -> Iterator[InfiniPlace]:
    if not server.alive:
        server.start()
    found = InfiniPlace(server)
    yield found
    found.proxy.close()


class TestInfiniStore(TierConformance):
    pass


@contextmanager
def put_that_stays_half(place: InfiniPlace, name: bytes, size: int) -> Iterator[None]:
    with socket.create_connection(("127.0.0.1", place.server.port), 10) as half:
        half.sendall(_payload(b"P", name, size) + bytes(size // 2))
        while not place.exists(name):
            time.sleep(0.01)
        yield


def test_values_that_are_not_whole_are_not_seen(place: InfiniPlace) -> None:
    (key,), (value,), (back,) = keys_of(1, 1), buffers_of([8 * PAGE], 1), buffers_of([8 * PAGE])
    with closing(place.open()) as tier, closing(place.open()) as other:
        with put_that_stays_half(place, Marker(b"\x02" * 8, len(value)).value_name(key), len(value)):
            assert tier.contains([key]) == [False]
            assert tier.get([key], [back]) == [Got.MISS]
            assert other.put([key], [value]) == [Put.STORED]
            assert tier.get([key], [back]) == [Got.HIT]
        assert tier.get([key], [back]) == [Got.HIT]  # whoever began has left
        assert back == value
        tier.delete([key])
        assert tier.contains([key]) == [False]
    assert place.server.alive


def test_what_was_replaced_is_forgotten(place: InfiniPlace) -> None:
    (key,), values = keys_of(1, 2), buffers_of([PAGE] * 2, 2)
    with closing(place.open()) as tier:
        tier.put([key], values[:1])
        first = place.marker(key)
        assert place.exists(first.value_name(key))
        tier.put([key], values[1:])
        assert not place.exists(first.value_name(key))
        assert place.read(key) == bytes(values[1])


def test_a_value_evicted_before_its_marker_is_a_miss(place: InfiniPlace) -> None:
    (key,), (value,) = keys_of(1, 3), buffers_of([PAGE], 3)
    with closing(place.open()) as tier:
        place.write(key, bytes(value))
        with place.link() as link:
            link.delete([Marker(b"\x01" * 8, PAGE).value_name(key)])
        assert tier.get([key], buffers_of([PAGE])) == [Got.MISS]
        assert tier.put([key], [value]) == [Put.STORED]
        assert place.read(key) == bytes(value)


def test_a_reader_that_gives_up_does_not_end_the_server(place: InfiniPlace) -> None:
    (key,), (value,), (back,) = keys_of(1, 4), buffers_of([64 << 20], 4), buffers_of([64 << 20])

    class Halfway(Link):
        def _receive(self, target):
            if len(target) == len(value):
                place.proxy.hang()  # the value has begun to come
            super()._receive(target)

    with closing(place.open(timeout="300ms")) as tier, closing(place.open()) as patient:
        patient.put([key], [value])
        tier._pool.flush()
        tier._pool._dial = lambda address: Halfway(*address, 0.3)
        with pytest.raises(TierUnavailable, match="no answer in time"):
            tier.get([key], [back])
        at_the_end = bytes(back)
        place.proxy.restore()
        assert patient.get([key], buffers_of([64 << 20])) == [Got.HIT]
        assert bytes(back) == at_the_end  # what came late went elsewhere
    assert place.server.alive


def test_a_full_server_makes_room(place: InfiniPlace) -> None:
    sent, back = buffers_of([16 << 20] * 8, 5), buffers_of([16 << 20] * 8)
    with closing(place.open()) as tier:
        for seed in range(10):  # 1.25 GiB into 1 GiB
            assert tier.put(keys_of(8, 100 + seed), sent) == [Put.STORED] * 8
        assert tier.get(keys_of(8, 109), back) == [Got.HIT] * 8
        assert back == sent
        assert tier.contains(keys_of(8, 100)) == [False] * 8


def test_a_value_that_does_not_fit_is_refused(place: InfiniPlace) -> None:
    (key,), (large,), (small,) = keys_of(1, 6), buffers_of([(1 << 30) + PAGE]), buffers_of([PAGE], 6)
    # Not through the proxy: a reset takes with it what it had not passed on.
    with closing(open_raw(TierURL(f"infinistore://127.0.0.1:{place.server.port}"))) as tier:
        assert tier.put([key], [large]) == [Put.REFUSED]
        assert tier.put([key], [small]) == [Put.STORED]
        assert place.read(key) == bytes(small)


def test_a_server_that_was_restarted_is_found_again(place: InfiniPlace) -> None:
    (key,), (value,), (back,) = keys_of(1, 7), buffers_of([PAGE], 7), buffers_of([PAGE])
    with closing(place.open()) as tier:
        tier.put([key], [value])
        place.server.kill()
        with pytest.raises(TierUnavailable):
            tier.get([key], [back])
        place.server.start()
        assert tier.get([key], [back]) == [Got.MISS]  # no stale connection is tried first
        assert tier.put([key], [value]) == [Put.STORED]
        assert tier.get([key], [back]) == [Got.HIT]


def test_what_cannot_work_is_said_at_once(place: InfiniPlace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody, mute = free_port(), silent.getsockname()[1]
        for rest, message in (
            (f"127.0.0.1:{nobody}", "nobody answers.*start InfiniStore's server"),
            (f"127.0.0.1:{mute}?timeout=200ms", "is not InfiniStore, or not well: .*no answer in time"),
            (f"user:x@127.0.0.1:{nobody}", "it has no users"),
            (f"127.0.0.1:{nobody}/path", "write it as infinistore://host:port"),
            (f"127.0.0.1:{nobody}?timeout=0", "timeout must be more than 0"),
        ):
            with pytest.raises(ConfigError, match=message):
                open_raw(TierURL(f"infinistore://{rest}"))
