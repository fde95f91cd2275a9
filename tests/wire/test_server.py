"""Whatever comes in on the socket, the keeper lives on, drops at most that client, and its books balance."""

import contextlib
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.errors import KeeperUnavailable, ProtocolError, RequestRefused
from kvkeep.terms import GroupSpec
from kvkeep.wire import messages as msg
from kvkeep.wire.client import Connection

FINGERPRINT = bytes(range(32))
GROUPS = [(5000, None), (9000, 2)]
HELLO = msg.encode(msg.Hello(msg.VERSION, "hostile", False))
OPEN = msg.encode(msg.OpenNamespace(FINGERPRINT, "test", [GroupSpec(*group) for group in GROUPS], 1, 1))
KEYS = bytes(range(16)) + bytes(range(16, 32))


def frame(*items: object) -> bytes:
    """A frame of anything, well-formed or not."""
    body = msgspec.msgpack.encode(list(items))
    return msg.HEADER.pack(len(body)) + body


def reserve(
    keys: bytes = KEYS, wanted: list[bytes] | None = None, namespace: int = 0, epoch: int = 1
) -> bytes:
    rows = [b"\1" * (len(keys) // 16)] * 2 if wanted is None else wanted
    return msg.encode(msg.Reserve(namespace, [msg.Reservation(keys, rows, 0, epoch)]))


TRAILING = bytes([0x95]) + b"\xa5Hello\x01\xa1s\xc2\x00"

# What ends the connection. Each is all that the client sends before it waits for the end.
DROPPED: dict[str, bytes] = {
    "random bytes": random.Random(1).randbytes(4096),
    "random frame": msg.HEADER.pack(64) + random.Random(2).randbytes(64),
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "empty frame": bytes(4),
    "4 GiB frame": b"\xff\xff\xff\xff" + bytes(1000),
    "frame one byte too long": msg.HEADER.pack(msg.MAX_FRAME + 1),
    "4 GiB frame after hello": HELLO + b"\xff\xff\xff\xff",
    "nested": HELLO + msg.HEADER.pack(1 << 20) + b"\x91" * (1 << 20),
    "other version": frame("Hello", msg.VERSION + 1, "s", False),
    "hello of a later version with more to say": frame("Hello", msg.VERSION + 1, "s", False, {"new": 1}),
    "trailing field": msg.HEADER.pack(len(TRAILING)) + TRAILING,
    "session without a name": frame("Hello", msg.VERSION, "", False),
    "session with a long name": frame("Hello", msg.VERSION, "x" * 257, False),
    "a session of the keeper's own": frame("Hello", msg.VERSION, "~movers", False),
    "no hello": frame("Status"),
    "no hello but a reservation": OPEN + reserve(),
    "hello twice": HELLO + HELLO,
    "a reply as request": HELLO + frame("Welcome", 1, "k", 0),
    "unknown message": HELLO + frame("Shutdown"),
    "no message": HELLO + msg.HEADER.pack(1) + b"\xc0",
    "lookup of half a key": HELLO + OPEN + frame("Lookup", 0, b"x" * 17, 0),
    "half a tenant": HELLO + OPEN + frame("Lookup", 0, KEYS, 0, 0.0, 0.0, 0, "", b"1234"),
    "a tenant too long": HELLO + OPEN + frame("Clear", None, b"123456789"),
    "a good item, and one of half a tenant": HELLO
    + OPEN
    + frame("Reserve", 0, [[KEYS, [b"\1\1", b"\1\1"], 0, 1], [KEYS, [b"\1\1", b"\1\1"], 0, 1, b"1234"]]),
    "a miss of fewer than no chunks": HELLO + OPEN + frame("Missed", 0, [[-1, 0]]),
    "a good miss, and one of half a tenant": HELLO + OPEN + frame("Missed", 0, [[2, 0], [2, 0, b"1234"]]),
    "lookup by text": HELLO + OPEN + frame("Lookup", 0, "x" * 16, 0),
    "changes of half a key": HELLO + OPEN + frame("Changes", 0, b"x" * 17, 0),
    "reservation of half a key": HELLO + OPEN + reserve(b"x" * 31, [b"\1", b"\1"]),
    "wanted too short": HELLO + OPEN + reserve(wanted=[b"\1\1", b"\1"]),
    "wanted too long": HELLO + OPEN + reserve(wanted=[b"\1\1", b"\1\1\1"]),
    "wanted of one group": HELLO + OPEN + reserve(wanted=[b"\1\1"]),
    "wanted of no group": HELLO + OPEN + reserve(wanted=[]),
    "one good item, one bad": HELLO
    + OPEN
    + frame("Reserve", 0, [[KEYS, [b"\1\1", b"\1\1"], 0, 1], [KEYS, [b"\1"], 0, 1]]),
    "negative epoch": HELLO + OPEN + frame("Reserve", 0, [[KEYS, [b"\1\1", b"\1\1"], 0, -1]]),
    "negative namespace": HELLO + frame("Lookup", -1, KEYS, 0),
    "namespace beyond 64 bits": HELLO + frame("Lookup", 2**64 - 1, KEYS, 0),
    "rank of a thousand and more": HELLO + frame("Release", 1, 1024),
    "a short fingerprint": HELLO + frame("OpenNamespace", b"x", "l", [[4096, None]], 1, 1),
    "a namespace without groups": HELLO + frame("OpenNamespace", FINGERPRINT, "l", [], 1, 1),
    "a namespace of 257 groups": HELLO + frame("OpenNamespace", FINGERPRINT, "l", [[1, None]] * 257, 1, 1),
    "a chunk of nothing": HELLO + frame("OpenNamespace", FINGERPRINT, "l", [[0, None]], 1, 1),
    "a chunk of exabytes": HELLO + frame("OpenNamespace", FINGERPRINT, "l", [[2**60, None]], 1, 1),
    "no ranks": HELLO + frame("OpenNamespace", FINGERPRINT, "l", [[1, None]], 0, 1),
    "reservations held when the end came": HELLO + OPEN + reserve() + b"\0\0\0\0",
}

# What is answered by a refusal, after which the connection goes on.
REFUSED: dict[str, bytes] = {
    "unknown namespace": frame("Lookup", 999, KEYS, 0),
    "reservation in an unknown namespace": reserve(namespace=999),
    "changes of an unknown namespace": frame("Changes", 999, b"", 0),
    "clear of an unknown namespace": frame("Clear", 2**62),
    "a chunk that fits no slab": frame("OpenNamespace", b"y" * 32, "l", [[2**40, None]], 1, 1),
    "another geometry": frame("OpenNamespace", FINGERPRINT, "l", [[4096, None]], 1, 1),
    "a chunk named twice": reserve(KEYS[:16] * 2),
    "a lookup of too much": frame("Lookup", 0, bytes(16 * (1 << 19) + 16), 0),
    "a reservation of too much": reserve(random.Random(5).randbytes(16 * (1 << 19) + 16)),
    "too many items": frame("Reserve", 0, [[b"", [b"", b""], 0, 1]] * ((1 << 13) + 1)),
    "an item after a good one": frame(
        "Reserve", 0, [[KEYS, [b"\1\1"] * 2, 0, 1], [KEYS[:16] * 2, [b"\1\1"] * 2, 0, 1]]
    ),
}

# What is not answered, and changes nothing, since it is not this session's.
IGNORED: dict[str, bytes] = {
    "commit of nothing": frame("Commit", 2**62, 1023),
    "abort of nothing": frame("Abort", 0),
    "release of nothing": frame("Release", 12345, None),
    "misses of too many": frame("Missed", 0, [[2, 0]] * ((1 << 14) + 1)),
    "a miss in an unknown namespace": frame("Missed", 999, [[2, 0]]),
}


@pytest.fixture(scope="module")
def keeper(module_keeper_process):
    """One keeper that lives through the whole of this file's hostility."""
    return module_keeper_process(patch="from kvkeep.wire import connection; connection._REST = 0.1")


@pytest.fixture
def beside(keeper, wait_until) -> Iterator[Connection]:
    """A good client beside the hostile one: served before and after, by the same process."""
    good = keeper.connect("good", arena=True)
    namespace = good.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    serve(good, namespace)
    pid = good.status()["pid"]
    yield good
    serve(good, namespace)
    assert good.status()["pid"] == pid == keeper.process.pid
    good.clear()
    wait_until(lambda: balanced(good))
    good.close()


def serve(good: Connection, namespace: int) -> None:
    """Save two chunks and find them again."""
    keys = os.urandom(32)
    [done] = good.reserve(namespace, [msg.Reservation(keys, [b"\1\1", b"\1\1"], 0, 10**9)])
    assert done.reservation
    good.commit(done.reservation, 0)
    found = good.lookup(namespace, keys)
    assert found.chunks == 2
    assert [row.tolist() for row in found.offsets] == [row.tolist() for row in done.offsets]
    good.release(found.lease)


def balanced(good: Connection) -> bool:
    figures = good.status()
    names = ("leases", "reservations", "used_bytes", "chunks")
    return [figures[name] for name in names] == [0] * 4 and (figures["sessions"], figures["connections"]) == (
        1,
        1,
    )


def raw(keeper) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(30)
    sock.connect(keeper.socket)
    return sock


def replies(sock: socket.socket) -> Iterator[msg.Reply]:
    """Frames until the end of the stream."""
    stream = sock.makefile("rb")
    while header := stream.read(4):
        yield msg.decode_reply(stream.read(msg.frame_length(header)))


def send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dropped early: so much the better
        sock.sendall(data)


def answers_until_end(sock: socket.socket) -> list[msg.Reply]:
    got: list[msg.Reply] = []
    with contextlib.suppress(ConnectionResetError):
        got.extend(replies(sock))
    return got


@pytest.mark.parametrize("name", DROPPED)
def test_bad_bytes_end_that_connection_only(name: str, keeper, beside: Connection) -> None:
    before = beside.status()["protocol_errors"]
    with raw(keeper) as sock:
        send(sock, DROPPED[name])
        got = answers_until_end(sock)
    assert beside.status()["protocol_errors"] == before + 1
    assert isinstance(got[-1], msg.Refused), "it is told why"
    assert all(not isinstance(reply, msg.Refused) for reply in got[:-1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(name: str, keeper, beside: Connection) -> None:
    before = beside.status()["protocol_errors"]
    with raw(keeper) as sock:
        send(sock, HELLO + OPEN + REFUSED[name] + frame("Status"))
        got = replies(sock)
        kinds = [type(next(got)) for _ in range(4)]
        assert kinds == [msg.Welcome, msg.Namespace, msg.Refused, msg.StatusReply]
        figures = beside.status()
        assert (figures["reservations"], figures["leases"]) == (0, 0), "a refused request changes nothing"
        assert figures["protocol_errors"] == before


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_nobodys_is_ignored(name: str, keeper, beside: Connection) -> None:
    before = beside.status()["counters"]
    with raw(keeper) as sock:
        send(sock, HELLO + IGNORED[name] + frame("Status"))
        got = replies(sock)
        assert [type(next(got)) for _ in range(2)] == [msg.Welcome, msg.StatusReply]
    assert beside.status()["counters"] == before


@pytest.mark.parametrize("cut", [1, 3, 4, 5, len(HELLO) - 1, len(HELLO) + 2, len(HELLO) + 20])
def test_half_a_frame_and_then_the_end(cut: int, keeper, beside: Connection) -> None:
    with raw(keeper) as sock:
        send(sock, (HELLO + OPEN)[:cut])


def test_frames_may_come_byte_by_byte(keeper, beside: Connection) -> None:
    with raw(keeper) as sock:
        for byte in HELLO + OPEN + frame("Status"):
            sock.sendall(bytes([byte]))
        got = replies(sock)
        assert [type(next(got)) for _ in range(3)] == [msg.Welcome, msg.Namespace, msg.StatusReply]


def test_random_bytes_after_hello(keeper, beside: Connection, wait_until) -> None:
    source = random.Random(3)
    for _ in range(100):
        body = bytearray(source.choice([OPEN, reserve(), frame("Lookup", 0, KEYS, 0)])[4:])
        for _ in range(source.randrange(1, 6)):
            body[source.randrange(len(body))] = source.randrange(256)
        with raw(keeper) as sock:
            send(sock, HELLO + msg.HEADER.pack(len(body)) + body + b"\0\0\0\0")
            assert isinstance(answers_until_end(sock)[-1], msg.Refused)
    # Some of these were namespaces and reservations; what they have stored goes with `clear`.
    wait_until(lambda: beside.status()["sessions"] == 1)


def test_the_claims_of_another_session_are_out_of_reach(keeper, beside: Connection) -> None:
    namespace = beside.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    keys = os.urandom(32)
    [done] = beside.reserve(namespace, [msg.Reservation(keys, [b"\1\1", b"\1\1"], 0, 10**9)])
    thief = keeper.connect("thief")
    thief.commit(done.reservation, 0)
    thief.abort(done.reservation)
    assert thief.lookup(namespace, keys).chunks == 0
    beside.commit(done.reservation, 0)
    found = beside.lookup(namespace, keys)
    assert found.chunks == 2
    thief.release(found.lease)
    assert thief.status()["leases"] == 1
    beside.release(found.lease)
    thief.close()


def test_claims_live_as_long_as_any_connection_of_the_session(keeper, beside: Connection, wait_until) -> None:
    first, second = keeper.connect("pair"), keeper.connect("pair")
    namespace = first.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    [done] = first.reserve(namespace, [msg.Reservation(KEYS, [b"\1\1", b"\1\1"], 0, 10**9)])
    first.close()
    wait_until(lambda: beside.status()["connections"] == 2)
    assert beside.status()["reservations"] == 1
    second.commit(done.reservation, 0)
    assert second.lookup(namespace, KEYS).chunks == 2
    assert beside.status()["leases"] == 1
    second.close()
    wait_until(lambda: beside.status()["leases"] == 0)


def test_what_may_still_be_written_to_is_given_out_later(keeper, beside: Connection, wait_until) -> None:
    """By the device of a process that was killed, or by a thread beside the one that let go."""
    with contextlib.closing(keeper.connect("gone")) as engine:
        engine.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
        engine.reserve(0, [msg.Reservation(KEYS, [b"\1\1", b"\1\1"], 0, 1)])
    wait_until(lambda: beside.status()["connections"] == 1)
    assert beside.status()["reservations"] == 1
    wait_until(lambda: beside.status()["reservations"] == 0)


WRITER = """
import socket, sys
from kvkeep.pages import map_shared
from kvkeep.wire import messages as msg
from kvkeep.wire.client import Connection
connection = Connection.open(sys.argv[1], "writer", arena=True, timeout=20.0)
space = connection.open_namespace(bytes(32), "w", [(65536, None)], 1, 1)
keys = bytes(range(64))
[done] = connection.reserve(space, [msg.Reservation(keys, [bytes([1]) * 4], 0, 0)])
memory = connection.map_arena()
print(*done.offsets[0].tolist(), flush=True)
sent = {"bad frame": bytes(4), "crash": msg.encode(msg.Poll([1]))}.get(sys.argv[2], b"")
connection._sock.sendall(sent)
while connection._sock.recv(4096):  # the keeper has closed it
    pass
print("dropped", flush=True)
sys.stdin.readline()  # so far it writes
for offset in done.offsets[0].tolist():
    memory[offset : offset + 65536] = bytes(65536)
"""


@pytest.mark.parametrize("why", ["bad frame", "crash"])
def test_a_client_that_was_dropped_keeps_its_slots_while_it_may_write(
    why: str, keeper_process, child_process, wait_until
) -> None:
    patch = "connection._REST, connection.ServerConnection._stage = 0, lambda *_: 1 / 0"
    keeper = keeper_process(memory="1MiB", patch=f"from kvkeep.wire import connection; {patch}")
    writer = child_process(WRITER, keeper.socket, why)
    held = {int(word) for word in writer.line().split()}
    assert (len(held), writer.line()) == (4, "dropped")
    good = keeper.connect("good", arena=True)
    namespace = good.open_namespace(FINGERPRINT, "test", [(65536, None)], 1, 1)
    keys = os.urandom(16 * 16)
    [done] = good.reserve(namespace, [msg.Reservation(keys, [b"\1" * 16], 0, 0)])
    given = done.offsets[0][done.offsets[0] >= 0].tolist()
    assert len(given) == 12
    assert not held & set(given)
    with good.map_arena() as memory:
        for offset in given:
            memory[offset : offset + 65536] = b"\1" * 65536
        writer.say()
        assert writer.finish() == 0
        assert all(memory[offset : offset + 65536] == b"\1" * 65536 for offset in given)
    wait_until(lambda: good.status()["reservations"] == 1)


def test_what_clients_write_at_the_keepers_end_stays_theirs(
    keeper_process, child_process, tmp_path: Path, wait_until
) -> None:
    """It closes their connections first, and goes on writing to its tiers, for which it may read others."""
    patch = """
import asyncio
from kvkeep.wire import connection, server
connection._REST = 0
async def drain(keeper, movers):
    for _ in range(100):  # what ends with a connection has ended by then
        await asyncio.sleep(0)
    print("held", keeper.keeper.claims.count(server.ClaimKind.RESERVATION), flush=True)
server.KeeperServer._drain = drain
"""
    keeper = keeper_process("--tier", f"fs://{tmp_path}/kv?capacity=64MiB", memory="2MiB", patch=patch)
    writer = child_process(WRITER, keeper.socket, "")
    assert len(writer.line().split()) == 4
    keeper.process.send_signal(signal.SIGTERM)
    assert writer.line() == "dropped"
    assert keeper.process.wait(20) == 0
    assert "held 1" in keeper.log.read_text()


def test_a_chunk_is_not_leased_twice_by_one_lookup(keeper, beside: Connection) -> None:
    """Else its slot would be freed twice, and given to two writers."""
    namespace = beside.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    [done] = beside.reserve(namespace, [msg.Reservation(KEYS[:16], [b"\1", b"\1"], 0, 10**9)])
    beside.commit(done.reservation, 0)
    with pytest.raises(RequestRefused, match="twice"):
        beside.lookup(namespace, KEYS[:16] * 2)
    assert beside.status()["leases"] == 0


def test_as_many_namespaces_as_there_may_be(keeper_process) -> None:
    keeper = keeper_process(patch="from kvkeep.wire import connection; connection._MAX_NAMESPACES = 8")
    client = keeper.connect()
    for number in range(8):
        assert (
            client.open_namespace(bytes([number]) * 32, "x" * 600, [(4096, None)] * 256, 1024, 1024) == number
        )
    with pytest.raises(RequestRefused, match="8 namespaces"):
        client.open_namespace(bytes([8]) * 32, "", GROUPS, 1, 1)
    assert client.open_namespace(bytes([5]) * 32, "", [(4096, None)] * 256, 1024, 1024) == 5
    assert len(client.status()["namespaces"]) == 8


def test_a_client_that_never_reads_is_dropped(keeper_process, wait_until) -> None:
    limits = "connection._MAX_BACKLOG, connection._REST = 1 << 20, 0"
    keeper = keeper_process(patch=f"from kvkeep.wire import connection; {limits}")
    good = keeper.connect("good")
    namespace = good.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    with raw(keeper) as sock:
        send(sock, HELLO + OPEN + reserve())
        wait_until(lambda: good.status()["reservations"] == 1)
        unwanted = reserve(random.Random(4).randbytes(16 * 10_000), [bytes(10_000)] * 2)
        for _ in range(20):  # each answer is 160 kB
            send(sock, unwanted)
        send(sock, bytes(4))  # after which there is nothing to be written, and much that is not read
        wait_until(lambda: good.status()["connections"] == 1)
        assert good.status()["reservations"] == 1, "it may be writing, for all that is known"
        serve(good, namespace)
    wait_until(lambda: good.status()["sessions"] == 1)
    assert good.status()["reservations"] == 0


def test_a_client_that_says_nothing_is_dropped(keeper_process) -> None:
    keeper = keeper_process(patch="from kvkeep.wire import connection; connection._HELLO_DEADLINE = 0.2")
    with raw(keeper) as silent, raw(keeper) as polite:
        send(polite, HELLO)
        assert answers_until_end(silent) == []
        send(polite, frame("Status"))
        got = replies(polite)
        assert [type(next(got)) for _ in range(2)] == [msg.Welcome, msg.StatusReply]


SEEDS = [HELLO, OPEN, reserve(), frame("Release", 1, None), frame("Clear", None)]


@given(
    body=st.binary(max_size=200) | st.sampled_from([seed[4:] for seed in SEEDS]),
    at=st.integers(0, 199),
    byte=st.binary(max_size=4),
)
@settings(max_examples=500, deadline=None)
@example(body=b"\x91" * 100_000, at=0, byte=b"")
@example(body=b"", at=0, byte=b"")
@example(body=b"\x93\xa6Lookup\x00\xdb\xff\xff\xff\xff", at=199, byte=b"")
def test_any_bytes_are_a_message_or_a_protocol_error(body: bytes, at: int, byte: bytes) -> None:
    for data in (body, body[:at] + byte + body[at + len(byte) :]):
        for decode in (msg.decode_request, msg.decode_reply):
            try:
                message = decode(data)
            except ProtocolError:
                continue
            assert decode(msg.encode(message)[4:]) == message


def test_a_frame_has_a_bound() -> None:
    with pytest.raises(ProtocolError, match="exceeds"):
        msg.encode(msg.Lookup(0, bytes(msg.MAX_FRAME), 0))
    for length in (0, msg.MAX_FRAME + 1, 2**32 - 1):
        with pytest.raises(ProtocolError):
            msg.frame_length(msg.HEADER.pack(length))
    assert msg.frame_length(msg.HEADER.pack(msg.MAX_FRAME)) == msg.MAX_FRAME


# The socket itself


def serve_again(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvkeep.cli", "serve", "--memory", "16MiB", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_only_the_owner_can_open_the_socket(keeper_process) -> None:
    path = keeper_process.directory() / "new" / "dir" / "keeper.sock"
    keeper_process(socket=str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_keeper_makes_its_directory_without_being_root(keeper_process, wait_until) -> None:
    home = keeper_process.directory()
    home.chmod(0o777)
    path = home / "new" / "keeper.sock"
    script = (
        "import os, socket, sys; from pathlib import Path; from kvkeep.wire.listen import listen;"
        "os.setgid(65534); os.setuid(65534); listen(Path(sys.argv[1])).close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_socket_is_left_alone(keeper_process) -> None:
    file = keeper_process.directory() / "file"
    file.write_text("precious")
    done = serve_again("--socket", str(file))
    assert (done.returncode, file.read_text()) == (2, "precious")
    assert "not a socket" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_below_a_file_is_a_clear_error(keeper_process) -> None:
    file = keeper_process.directory() / "file"
    file.write_text("precious")
    done = serve_again("--socket", str(file / "keeper.sock"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"kvkeep: cannot listen on {file}")


def test_a_second_keeper_on_one_path_gives_up(keeper, beside: Connection) -> None:
    done = serve_again("--socket", keeper.socket)
    assert done.returncode == 2
    assert "another keeper" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dead_keepers_socket_is_replaced(keeper_process) -> None:
    first = keeper_process()
    first.process.kill()
    first.process.wait(20)
    assert Path(first.socket).is_socket()
    second = keeper_process(socket=first.socket)
    assert second.figures()["pid"] == second.process.pid


def test_a_keeper_that_is_told_to_end_leaves_nothing(keeper_process) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        keeper = keeper_process()
        client = keeper.connect()
        keeper.process.send_signal(number)
        assert keeper.process.wait(20) == 0
        assert list(Path(keeper.socket).parent.iterdir()) == []
        with pytest.raises(KeeperUnavailable):
            client.status()
        assert "Traceback" not in keeper.log.read_text()


def told_to_end(keeper, chunks: int) -> str:
    """A keeper with so many new chunks of each group gets SIGTERM; its log, when it has ended by itself."""
    client = keeper.connect()
    client.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    for chunk in range(chunks):
        item = msg.Reservation(chain_of(chunks)[16 * chunk :][:16], [b"\1", b"\1"], chunk, 0)
        client.commit(client.reserve(0, [item])[0].reservation, 0)
    assert client.status()["chunks"] == 2 * chunks
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.process.wait(20) == 0
    return keeper.log.read_text()


def chain_of(chunks: int) -> bytes:
    return random.Random(6).randbytes(16 * chunks)


def test_what_is_held_at_the_end_is_written_to_the_tier(keeper_process, tmp_path: Path, wait_until) -> None:
    """The first batch has the first chunk; all others are still in memory when the end comes."""
    tier = f"fs://{tmp_path}/kv?capacity=64MiB"
    log = told_to_end(keeper_process("--tier", f"faulty+{tier}&fault_latency=0.5s", "--drain", "15"), 40)
    assert re.search(r"writing \d+ chunks to the tiers before the end", log)
    assert "unwritten" not in log
    client = keeper_process("--tier", tier).connect()
    client.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    ticket = client.lookup(0, chain_of(40), patience=1e6).ticket
    wait_until(lambda: client.poll([ticket]) == b"\2")
    assert client.lookup(0, chain_of(40), ticket=ticket).chunks == 40


def test_a_tier_that_hangs_does_not_hold_up_the_end(keeper_process, tmp_path: Path) -> None:
    tier = f"faulty+fs://{tmp_path}/kv?capacity=64MiB&fault_hang=yes"
    log = told_to_end(keeper_process("--tier", tier, "--drain", "0.3"), 5)
    assert "writing 10 chunks to the tiers before the end" in log
    assert "ended with 10 chunks unwritten: give --drain more than 0.3 s" in log


def test_a_keeper_does_not_remove_its_successors_socket(keeper_process) -> None:
    first = keeper_process()
    Path(first.socket).unlink()
    second = keeper_process(socket=first.socket)
    first.close()
    assert second.figures()["pid"] == second.process.pid


STRANGER = """
import os, socket, sys
from kvkeep.errors import KVKeepError
from kvkeep.wire import messages as msg
from kvkeep.wire.client import Connection
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for _ in range(20):  # whichever comes first, the hello or the refusal
    try:
        Connection.open(sys.argv[1], "stranger", arena=True)
        print("welcome")
    except KVKeepError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(keeper_process, child_process) -> None:
    keeper = keeper_process()
    Path(keeper.socket).parent.chmod(0o755)
    closed = child_process(STRANGER, keeper.socket)
    assert {closed.line().split(" ")[0] for _ in range(20)} == {"KeeperUnavailable"}, "by the socket's mode"
    Path(keeper.socket).chmod(0o666)
    stranger = child_process(STRANGER, keeper.socket)
    assert {stranger.line() for _ in range(20)} == {
        "RequestRefused this keeper belongs to user 0, you are 65534"
    }
    figures = keeper.figures()
    assert (figures["connections"], figures["sessions"]) == (1, 1)


def test_the_figures_of_a_keeper(keeper_process) -> None:
    keeper = keeper_process("--policy", "arc", memory="32MiB")
    client = keeper.connect()
    namespace = client.open_namespace(FINGERPRINT, "a model", GROUPS, 1, 1)
    serve(client, namespace)
    figures = client.status()
    assert figures["policy"] == "arc"
    assert figures["memory_bytes"] == 32 << 20
    assert figures["used_bytes"] == 2 * (8192 + 12288)
    [space] = figures["namespaces"]
    assert (space["label"], space["chunks"], space["hit_chunks"]) == ("a model", 4, 2)
    assert client.clear(namespace) == 4
    assert client.status()["used_bytes"] == 0


def test_offsets_travel_whole(keeper, beside: Connection) -> None:
    namespace = beside.open_namespace(FINGERPRINT, "test", GROUPS, 1, 1)
    keys = os.urandom(16 * 3)
    [done] = beside.reserve(namespace, [msg.Reservation(keys, [b"\1\1\1", b"\0\1\1"], 0, 10**9)])
    assert [row.dtype for row in done.offsets] == [np.dtype("<i8")] * 2
    assert (done.offsets[0] >= 0).tolist() == [True] * 3
    assert (done.offsets[1] >= 0).tolist() == [False, True, True]
    beside.commit(done.reservation, 0)
    found = beside.lookup(namespace, keys)
    assert found.offsets[1].tolist() == [-1, *done.offsets[1].tolist()[1:]]
    beside.release(found.lease)


RACER = """
import sys, time
from kvkeep.cli import main
from kvkeep.wire import listen

answers = listen._answers

def slowly(path):
    answer = answers(path)
    time.sleep(0.5)
    return answer

listen._answers = slowly
print("ready", flush=True)
sys.stdin.readline()
print(main(["serve", "--memory", "16MiB", "--socket", sys.argv[1]]), flush=True)
"""


def test_of_keepers_that_start_at_once_on_one_path_one_serves(
    keeper_process, child_process, wait_until
) -> None:
    """Both find a dead keeper's socket, and neither removes what the other has just bound."""
    path = keeper_process.directory() / "keeper.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    racers = [child_process(RACER, str(path)) for _ in range(3)]
    for racer in racers:
        assert racer.line() == "ready"
    for racer in racers:
        racer.say()
    wait_until(lambda: sum(racer.process.poll() is None for racer in racers) == 1)
    (left,) = [racer for racer in racers if racer.process.poll() is None]
    assert [racer.line() for racer in racers if racer is not left] == ["2", "2"]
    wait_until(path.is_socket)
    connection = Connection.open(str(path), "test", timeout=20.0)
    assert connection.status()["pid"] == left.pid
    connection.close()
    assert list(path.parent.iterdir()) == [path]
