"""The peer tier on real keepers: what one holds the other reads; refusals, forgeries, deaths, garbage."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import trustme

from kvkeep.errors import ConfigError, ProtocolError, TierUnavailable
from kvkeep.tiers import peer_wire as wire
from kvkeep.tiers.base import Got, Put, Tier
from kvkeep.tiers.open import WriteWhen, open_raw, open_tier
from kvkeep.tiers.peer import Address
from kvkeep.tiers.peer_wire import Channel
from kvkeep.tiers.seal import seal
from tests.tiers.conformance import TierConformance
from tests.tiers.peer_place import Lending, PeerPlace, garbled
from tests.tiers.place import PAGE, Place, Proxy, buffers_of, closing, free_port, keys_of

MEMORY = "256MiB"
CHUNK = 256 * PAGE
TOKEN = "correct horse battery staple 17"


@pytest.fixture(scope="module")
def lending(module_keeper_process: Any) -> Lending:
    return Lending(module_keeper_process, memory=MEMORY)


@pytest.fixture
def place(lending: Lending) -> Iterator[Place]:
    lending.forget()
    place = PeerPlace(lending)
    yield place
    place.proxy.close()


@pytest.fixture
def token(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


class TestPeer(TierConformance):
    # Slots are whole pages, of at most a sixteenth of the arena.
    sizes: ClassVar[list[int]] = [PAGE << shift for shift in range(12)]
    test_unaligned_buffers_work = None  # type: ignore[assignment]
    # A peer cannot be written to: what puts and deletes do there is its engine's affair.
    test_verbs_from_several_threads = None  # type: ignore[assignment]
    test_concurrent_writers_of_one_key_leave_one_whole_value = None  # type: ignore[assignment]
    test_flipped_and_truncated_and_foreign_values_are_misses_and_go = None  # type: ignore[assignment]
    test_random_flips_in_many_values_are_counted_and_never_served = None  # type: ignore[assignment]
    test_seals_are_made_and_checked_on_the_way = None  # type: ignore[assignment]
    test_a_store_that_hangs_is_given_up_in_time = None  # type: ignore[assignment]
    test_a_cut_connection_is_an_error_and_then_forgotten = None  # type: ignore[assignment]


def saved(
    lending: Lending, count: int, seed: int = 1, size: int = CHUNK
) -> tuple[list[bytes], list[memoryview]]:
    """Values that a keeper holds, with the seal that they will come with."""
    keys, sent = keys_of(count, seed), buffers_of([size] * count, seed)
    for key, value in zip(keys, sent, strict=True):
        lending.save(key, value)
        seal(key, value)
    return keys, sent


@contextmanager
def reader(lending: Lending, port: int | None = None, **options: str) -> Iterator[Tier]:
    with closing(open_raw(lending.url(port, **options))) as tier:
        yield tier


def patiently(verb: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return verb()
        except TierUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# What it gives


def test_it_is_read_only(lending: Lending) -> None:
    opened = open_tier(str(lending.url()))
    with closing(opened.tier):
        assert opened.write is WriteWhen.NEVER
        assert opened.tier.capabilities.live
        assert opened.tier.put(keys_of(2), buffers_of([PAGE] * 2)) == [Put.REFUSED] * 2
        opened.tier.delete(keys_of(2))
    with pytest.raises(ConfigError, match="write must be one of never"):
        open_tier(str(lending.url(write="through")))


def test_values_of_another_namespace_are_not_given(lending: Lending) -> None:
    keys, _ = saved(lending, 2)
    strangers = [b"stranger" + key[8:] for key in keys]
    with reader(lending) as tier:
        assert tier.contains(strangers) == [False, False]
        assert tier.get(strangers, buffers_of([CHUNK] * 2)) == [Got.MISS] * 2
        assert tier.contains(keys) == [True, True]


def test_threads_share_a_few_connections(lending: Lending) -> None:
    keys, sent = saved(lending, 64)
    problems: list[object] = []

    def work(seed: int) -> None:
        back = buffers_of([CHUNK] * 64)
        for _ in range(5):
            results = tier.get(keys, back)
            if results != [Got.HIT] * 64 or garbled(results, sent, back) or not all(tier.contains(keys)):
                problems.append(results)

    with reader(lending, connections="3") as tier:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        assert lending.figures()["connections"] <= 5


def test_more_than_may_be_lent_at_once_is_given_in_turns(keeper_process: Any) -> None:
    lending = Lending(keeper_process, memory="32MiB")  # of which 8 MiB at once
    keys, sent = saved(lending, 24)
    with reader(lending, connections="4") as tier:
        back = buffers_of([CHUNK] * 24)
        assert tier.get(keys, back) == [Got.HIT] * 24
        assert back == sent
    assert lending.figures()["lent_bytes"] == 0


def test_a_value_is_given_whole_or_not_at_all(lending: Lending) -> None:
    """Memory that went wrong after its seal was made, and a chunk that was evicted since it was asked for."""
    keys, sent = keys_of(2, 5), buffers_of([CHUNK] * 2, 5)
    offsets = [lending.save(key, value) for key, value in zip(keys, sent, strict=True)]
    opened = open_tier(str(lending.url()))
    with closing(opened.tier):
        back = buffers_of([CHUNK] * 2)
        assert opened.tier.get(keys, back) == [Got.HIT] * 2
        lending.flip(offsets[0] + 1000)
        assert opened.tier.get(keys, back) == [Got.DAMAGED, Got.HIT]
        assert opened.tier.contains(keys) == [True, True]
        lending.forget()
        assert opened.tier.get(keys, back) == [Got.MISS] * 2


def test_a_slot_that_is_written_anew_is_sealed_anew(keeper_process: Any) -> None:
    """The same key may come with other bytes, once it was evicted; its old seal lies there still."""
    lending = Lending(keeper_process)
    with reader(lending) as tier:
        for seed in (1, 2, 3):
            (key,), (value,) = keys_of(1), buffers_of([CHUNK], seed)
            lending.save(key, value)
            seal(key, value)
            (back,) = buffers_of([CHUNK])
            assert tier.get([key], [back]) == [Got.HIT]
            assert back == value
            lending.forget()


# Who may read


def test_a_token_lets_in(keeper_process: Any, token: str, tmp_path: Path) -> None:
    lending = Lending(keeper_process, where=f"0?token_file={token}")
    keys, sent = saved(lending, 3)
    with reader(lending, token_file=token) as tier:
        back = buffers_of([CHUNK] * 3)
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert back == sent
    other = tmp_path / "other"
    other.write_text("another token of enough length")
    with pytest.raises(ConfigError, match=r"wants another token.*token_file="):
        open_raw(lending.url(token_file=str(other)))
    with pytest.raises(ConfigError, match="wants a token"):
        open_raw(lending.url())
    short = tmp_path / "short"
    short.write_text("short")
    with pytest.raises(ConfigError, match="shorter than 16 characters"):
        open_raw(lending.url(token_file=str(short)))
    assert lending.figures()["dropped"] == 2
    assert "a wrong token" in lending.keeper.log.read_text()


def test_a_keeper_without_our_token_is_not_believed(lending: Lending, token: str) -> None:
    """It lets everybody in; it cannot show that it is who we mean."""
    with pytest.raises(ConfigError, match=r"wants another token|does not have our token"):
        open_raw(lending.url(token_file=token))


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0", "10.1.2.3:7440"])
def test_a_port_for_other_hosts_needs_a_token(keeper_process: Any, where: str) -> None:
    with pytest.raises(AssertionError, match="open to other hosts, so it needs a token"):
        keeper_process("--peers", where)


def test_what_others_can_reach_is_encrypted_or_called_plain(
    keeper_process: Any, token: str, papers: Path
) -> None:
    """A token alone does not keep what passes from being replaced on its way."""
    closed = f"0.0.0.0:0?token_file={token}"
    for where, why in (
        (closed, "without TLS: a token keeps strangers out"),
        (f"{closed}&plain=no", "plain=yes"),
        (f"127.0.0.1:0?token_file={token}&transport=nixl&device=eth0", "on eth0 asks nobody for a token"),
        (f"{closed}&plain=no&transport=nixl", "without TLS"),
        ("0.0.0.0:0?plain=yes", "so it needs a token"),
    ):
        with pytest.raises(AssertionError, match=why):
            keeper_process("--peers", where)
    with pytest.raises(ConfigError, match="can read the whole arena"):
        open_tier(f"peer://10.0.0.1:1?token_file={token}&transport=nixl&device=mlx5_0:1")
    keeper_process("--peers", f"{closed}&plain=yes")
    keeper_process("--peers", f"{closed}&cert={papers}/server.crt&key={papers}/server.key")


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("somewhere:1", "takes ADDRESS:PORT"),
        ("127.0.0.1:99999", "cannot read"),
        ("127.0.0.1:0?tokn_file=x", "did you mean 'token_file'"),
        ("127.0.0.1:0?token_file=/nowhere", "cannot read the token"),
        ("127.0.0.1:0?cert=/nowhere", "certificate and its key"),
        ("192.0.2.1:7440?ca=x&cert=x&key=x", "cannot read the certificate"),
    ],
)
def test_where_it_cannot_be_served(keeper_process: Any, where: str, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        keeper_process("--peers", where)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca"))
    other.cert_pem.write_to_path(str(folder / "other-ca"))
    for name, by in (("server", ca), ("client", ca), ("stranger", other)):
        issued = by.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.crt"))
    return folder


def test_tls(keeper_process: Any, papers: Path, token: str) -> None:
    where = f"0?cert={papers}/server.crt&key={papers}/server.key&token_file={token}"
    lending = Lending(keeper_process, where=where)
    keys, sent = saved(lending, 9)
    with reader(lending, ca=f"{papers}/ca", token_file=token) as tier:
        back = buffers_of([CHUNK] * 9)
        assert tier.contains(keys) == [True] * 9
        assert tier.get(keys, back) == [Got.HIT] * 9
        assert back == sent
    with pytest.raises(ConfigError, match="CERTIFICATE_VERIFY_FAILED"):
        open_raw(lending.url(ca=f"{papers}/other-ca", token_file=token))
    with reader(lending, token_file=token, timeout="1s") as plain, pytest.raises(TierUnavailable):
        plain.contains(keys)


def test_mutual_tls(keeper_process: Any, papers: Path) -> None:
    where = f"0?cert={papers}/server.crt&key={papers}/server.key&ca={papers}/ca"
    lending = Lending(keeper_process, where=where)
    keys, sent = saved(lending, 2)
    ours = {"ca": f"{papers}/ca", "cert": f"{papers}/client.crt", "key": f"{papers}/client.key"}
    with reader(lending, **ours) as tier:
        back = buffers_of([CHUNK] * 2)
        assert tier.get(keys, back) == [Got.HIT] * 2
        assert back == sent
    theirs = ours | {"cert": f"{papers}/stranger.crt", "key": f"{papers}/stranger.key"}
    for options in (theirs, {"ca": f"{papers}/ca"}):
        with suppress(ConfigError), reader(lending, **options) as tier, pytest.raises(TierUnavailable):
            tier.contains(keys)
    assert lending.figures()["given_chunks"] == 2


# Forged, replayed, of another version, garbage


def greeted(lending: Lending, token: str) -> Channel:
    return Address("127.0.0.1", lending.port, wire.read_token(token)).dial(5.0)


class Tap:
    """Passes one connection on to a keeper, and keeps what its client said."""

    def __init__(self, port: int) -> None:
        self.said: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._target = ("127.0.0.1", port)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, client, []), daemon=True)
            back.start()
            self._pump(client, server, self.said)
            back.join(20)

    def _pump(self, source: socket.socket, sink: socket.socket, kept: list[bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                kept.append(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(20)


def test_a_recorded_connection_opens_no_other(keeper_process: Any, token: str) -> None:
    lending = Lending(keeper_process, where=f"0?token_file={token}")
    keys, _ = saved(lending, 2)
    tap = Tap(lending.port)
    channel = Address("127.0.0.1", tap.port, TOKEN.encode()).dial(5.0)
    channel.send(wire.Take(b"".join(keys), [CHUNK] * 2))
    assert channel.reply(wire.Given).states == b"\0\0"
    for buffer in buffers_of([CHUNK] * 2):
        channel.fill(buffer)
    channel.close()
    tap.close()
    given = lending.figures()["given_bytes"]
    assert given == 2 * CHUNK
    with socket.create_connection(("127.0.0.1", lending.port)) as thief:
        thief.settimeout(10)
        thief.recv(1000)
        with suppress(OSError):
            thief.sendall(b"".join(tap.said))
            heard = b""
            while data := thief.recv(1 << 16):
                heard += data
        assert len(heard) <= 34  # the verdict
        assert heard[:2] != b"\0\0"
    assert lending.figures()["given_bytes"] == given
    assert "a wrong token" in lending.keeper.log.read_text()


def test_a_frame_sent_again_ends_the_connection(keeper_process: Any, token: str) -> None:
    lending = Lending(keeper_process, where=f"0?token_file={token}")
    keys, _ = saved(lending, 1)
    tap = Tap(lending.port)
    channel = Address("127.0.0.1", tap.port, TOKEN.encode()).dial(5.0)
    before = len(tap.said)
    channel.send(wire.Have(keys[0]))
    assert channel.reply(wire.Held).held == b"\1"
    channel.write(memoryview(b"".join(tap.said[before:])))
    with pytest.raises((OSError, ProtocolError)):
        channel.reply(wire.Held)
    channel.close()
    tap.close()
    assert "forged or replayed" in lending.keeper.log.read_text()
    assert lending.figures()["asked"] == 1


def test_a_frame_that_was_changed_is_not_answered(keeper_process: Any, token: str) -> None:
    lending = Lending(keeper_process, where=f"0?token_file={token}")
    keys, _ = saved(lending, 1)
    channel = greeted(lending, token)
    channel.agree(b"not the token at all", bytes(32), bytes(32), server=False)
    channel.send(wire.Take(keys[0], [CHUNK]))
    with pytest.raises((OSError, ProtocolError)):
        channel.reply(wire.Given)
    channel.close()
    assert "forged or replayed" in lending.keeper.log.read_text()
    assert lending.figures()["given_chunks"] == 0


def test_a_peer_of_another_version_is_told_so(lending: Lending) -> None:
    """An old client here, and an old keeper there."""
    with socket.create_connection(("127.0.0.1", lending.port)) as old:
        old.settimeout(10)
        old.recv(42, socket.MSG_WAITALL)
        old.sendall(struct.pack("<8sH32s32s", b"kvkpeer\0", wire.VERSION + 1, bytes(32), bytes(32)))
        assert old.recv(34, socket.MSG_WAITALL) == struct.pack("<H32s", 1, bytes(32))
        assert old.recv(1) == b""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        sock.sendall(struct.pack("<8sH32s", b"kvkpeer\0", wire.VERSION + 1, bytes(32)))
        sock.close()

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(ConfigError, match=r"speaks version 2.*install the same kvkeep on both"):
        open_raw(lending.url(int(listener.getsockname()[1])))
    listener.close()


def test_what_is_no_keeper_is_told_so(lending: Lending) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nServer: x\r\n\r\n")
        sock.close()

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(ConfigError, match="no kvkeep"):
        open_raw(lending.url(int(listener.getsockname()[1])))
    listener.close()


def frame(*items: object) -> bytes:
    return msgspec.msgpack.encode(list(items))


HOSTILE: dict[str, bytes] = {
    "half a key": frame("Have", b"x" * 23),
    "too many keys": frame("Have", b"x" * 24 * (wire.MOST_KEYS + 1)),
    "lengths for other keys": frame("Take", b"x" * 48, [PAGE]),
    "a length of nothing": frame("Take", b"x" * 24, [0]),
    "a length beyond 64 bits": frame("Take", b"x" * 24, [2**64 - 1]),
    "a negative length": frame("Take", b"x" * 24, [-1]),
    "a key twice": b"",  # made of one that is held
    "a reply": frame("Held", b""),
    "nothing": b"\xc0",
    "nested": b"\x91" * 100_000,
    "random": os.urandom(500),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_end_their_connection_and_nothing_else(lending: Lending, name: str) -> None:
    keys, sent = saved(lending, 1, seed=40)
    body = HOSTILE[name] or frame("Take", keys[0] * 2, [CHUNK] * 2)
    channel = Address("127.0.0.1", lending.port).dial(5.0)
    mac = channel._mac(False, 0, body)
    channel.write(memoryview(struct.pack("<I", len(body)) + body + mac))
    with pytest.raises((OSError, ProtocolError)):
        channel.reply(wire.Given)
    channel.close()
    with reader(lending) as tier:
        back = buffers_of([CHUNK])
        assert tier.get(keys, back) == [Got.HIT]
        assert back == sent


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\n\r\n" * 9, os.urandom(4096), bytes(4096), b"\x16\x03\x01" + bytes(200)]
)
def test_bytes_of_strangers(lending: Lending, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", lending.port)) as stranger:
        stranger.settimeout(20)
        with suppress(ConnectionError):
            stranger.sendall(data)
            while stranger.recv(1 << 16):  # until it hangs up: at once, or after its patience
                pass
    with reader(lending) as tier:
        assert tier.contains(keys_of(1, 999)) == [False]


def test_connections_are_bounded(keeper_process: Any) -> None:
    lending = Lending(keeper_process, patch="import kvkeep.wire.peers as p; p._MOST_CONNECTIONS = 4")
    keys, _ = saved(lending, 1)
    address = Address("127.0.0.1", lending.port)
    held = [address.dial(5.0) for _ in range(4)]
    with pytest.raises(ConnectionRefusedError, match="as many connections"):
        address.dial(5.0)
    held.pop().close()
    with reader(lending) as tier:
        assert patiently(lambda: tier.contains(keys)) == [True]
    for channel in held:
        channel.close()


def test_a_burst_passes_no_bound(keeper_process: Any) -> None:
    """Of those that have yet to say who they are only so many are listened to; room comes as they go."""
    lending = Lending(keeper_process, patch="import kvkeep.wire.peers as p; p._MOST_CONNECTIONS = 2")
    keys, _ = saved(lending, 1)
    burst = [socket.create_connection(("127.0.0.1", lending.port), 5) for _ in range(60)]
    assert sum(bool(sock.recv(1)) for sock in burst) == 4
    for sock in burst:
        sock.close()
    with reader(lending) as tier:
        assert patiently(lambda: tier.contains(keys)) == [True]


def test_without_threads_it_is_there_once_there_are_some_again(keeper_process: Any) -> None:
    patch = """
import threading
start, left = threading.Thread.start, [3]
def fails(thread):
    if thread.name == "kvkeep-peer" and left[0]:
        left[0] -= 1
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = fails
"""
    lending = Lending(keeper_process, patch=patch)
    keys, _ = saved(lending, 1)
    with reader(lending) as tier:
        assert patiently(lambda: tier.contains(keys)) == [True]
    assert lending.keeper.log.read_text().count("--peers: can't start new thread") == 3


# Slow, hung, cut off, killed


def test_a_peer_that_does_not_read_is_given_up(keeper_process: Any, wait_until: Any) -> None:
    lending = Lending(
        keeper_process, memory=MEMORY, patch="import kvkeep.wire.peers as p; p._SEND_SECONDS = 0.5"
    )
    keys, _ = saved(lending, 32)
    channel = Address("127.0.0.1", lending.port).dial(5.0)
    channel.send(wire.Take(b"".join(keys), [CHUNK] * 32))
    wait_until(lambda: lending.figures()["lent_bytes"] == 32 * CHUNK)
    wait_until(lambda: lending.figures()["lent_bytes"] == 0)
    wait_until(lambda: lending.figures()["connections"] == 0)
    assert lending.keeper.figures()["leases"] == 0
    channel.close()


def test_a_peer_that_hangs_is_given_up_in_time(place: PeerPlace) -> None:
    keys, sent = saved(place.lending, 3)
    with reader(place.lending, place.proxy.port, timeout="0.5s") as tier:
        back = buffers_of([CHUNK] * 3)
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert tier.contains(keys) == [True] * 3
        place.proxy.hang()
        for verb in (lambda: tier.contains(keys), lambda: tier.get(keys, back)):
            began = time.monotonic()
            with pytest.raises(TierUnavailable, match="in time"):
                verb()
            assert time.monotonic() - began < 5
        place.proxy.cut()
        place.proxy.restore()
        assert patiently(lambda: tier.get(keys, back)) == [Got.HIT] * 3
        assert back == sent


def test_a_link_that_is_cut_in_mid_value(place: PeerPlace) -> None:
    keys, sent = saved(place.lending, 8)
    with reader(place.lending, place.proxy.port, timeout="1s", connections="1") as tier:
        for cut_after in (0, 1, 100, CHUNK // 2, CHUNK, 3 * CHUNK + 7):
            back = buffers_of([CHUNK] * 8)
            place.proxy.cut_after(cut_after)
            with pytest.raises(TierUnavailable):
                tier.get(keys, back)
            place.proxy.restore()
            assert patiently(lambda back=back: tier.get(keys, back)) == [Got.HIT] * 8
            assert back == sent


def test_a_slow_link_is_slow_and_right(place: PeerPlace) -> None:
    """About 20 MB/s, in pieces."""
    keys, sent = saved(place.lending, 4)
    slow = SlowProxy(("127.0.0.1", place.lending.port))
    with reader(place.lending, slow.port) as tier:
        back = buffers_of([CHUNK] * 4)
        assert tier.get(keys, back) == [Got.HIT] * 4
        assert back == sent
    slow.close()


class SlowProxy(Proxy):
    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(0.003)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_peer_that_dies_in_mid_read_and_comes_back(keeper_process: Any, kill: int) -> None:
    port = free_port()
    lending = Lending(keeper_process, where=str(port), memory=MEMORY)
    keys, sent = saved(lending, 100)
    back = buffers_of([CHUNK] * 100)
    wrong: list[object] = []
    died = threading.Event()

    def read() -> None:
        while not died.is_set():
            try:
                results = tier.get(keys, back)
            except TierUnavailable:
                died.set()
                return
            if garbled(results, sent, back):
                wrong.append(results)

    with reader(lending, timeout="2s") as tier:
        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.3)
        os.kill(lending.keeper.process.pid, kill)
        lending.keeper.process.wait(20)
        thread.join(20)
        assert died.is_set()
        assert not wrong
        with pytest.raises(TierUnavailable):
            tier.contains(keys)
        again = Lending(keeper_process, where=str(port), memory=MEMORY)
        assert patiently(lambda: tier.get(keys, back)) == [Got.MISS] * 100
        keys, sent = saved(again, 100)
        assert patiently(lambda: tier.get(keys, back)) == [Got.HIT] * 100
        assert not garbled([Got.HIT] * 100, sent, back)


def test_eviction_beside_reading(keeper_process: Any) -> None:
    """Chunks come and go while they are read: each is what its key says, or a miss."""
    lending = Lending(keeper_process, memory="32MiB")
    keys, sent = keys_of(60, 3), buffers_of([CHUNK] * 60, 3)
    for key, value in zip(keys, sent, strict=True):
        seal(key, value)
    stop = threading.Event()
    seen: set[Got] = set()
    wrong: list[object] = []

    def read() -> None:
        back = buffers_of([CHUNK] * 60)
        while not stop.is_set():
            try:
                results = tier.get(keys, back)
            except TierUnavailable as error:
                wrong.append(error)
                return
            seen.update(results)
            if garbled(results, sent, back) or Got.DAMAGED in results:
                wrong.append(results)

    with reader(lending) as tier:
        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(4):
            for key, value in zip(keys, sent, strict=True):
                lending.save(key, value)
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
    assert not wrong, lending.keeper.log.read_text()
    assert seen == {Got.HIT, Got.MISS}


# As a keeper uses it


def test_a_peer_that_is_not_there_yet_is_used_once_it_is(keeper_process: Any, tmp_path: Path) -> None:
    port = free_port()
    lent_url = f"peer://127.0.0.1:{port}"
    opened = open_tier(lent_url)
    with closing(opened.tier):
        with pytest.raises(TierUnavailable):
            opened.tier.contains(keys_of(1))
        lending = Lending(keeper_process, where=str(port))
        keys, _ = saved(lending, 1)
        assert patiently(lambda: opened.tier.contains(keys)) == [True]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("peer://", "write it as peer://host"),
        ("peer://h/path", "write it as peer://host"),
        ("peer://secret@h", "token goes into a file"),
        ("peer://a,b", "write it as peer://host"),
        ("peer://127.0.0.1:1?timeout=0s", "more than 0"),
        ("peer://127.0.0.1:1?tls=no&ca=x", "for TLS"),
        ("peer://127.0.0.1:1?conections=3", "did you mean 'connections'"),
    ],
)
def test_urls_that_cannot_be(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_tier(url)
