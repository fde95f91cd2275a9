"""A client of a keeper that dies, stops or refuses: bounded, told what happened, and its mapping stays."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kvkeep.errors import KeeperUnavailable, RequestRefused
from kvkeep.identity import group_keys, tenant_of
from kvkeep.wire import messages as msg
from kvkeep.wire.client import Connection, first_ticket

GROUPS = [(4096, None)]


def test_tenants_are_told_apart_and_requests_counted_once(keeper_process) -> None:
    """A request that waits for tiers looks twice: the second time counts."""
    factory = keeper_process
    a, b = tenant_of("a"), tenant_of("b")
    keeper = factory(
        "--tenant-quota", f"{a.hex()}=8192", "--tier", f"fs://{factory.directory()}?capacity=4MiB"
    )
    client = keeper.connect()
    space = client.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    first = client.lookup(space, bytes(range(48)), patience=1e6, tenant=a)
    deadline = time.monotonic() + 20
    while first.ticket and client.poll([first.ticket]) != b"\2":
        assert time.monotonic() < deadline
    assert client.lookup(space, bytes(range(48)), ticket=first.ticket, tenant=a).chunks == 0
    rows = [b"\1\1\1"]
    mine = msg.Reservation(bytes(range(48)), rows, 0, 0, a)
    other = msg.Reservation(bytes(range(100, 148)), rows, 0, 0, b)
    both = client.reserve(space, [mine, other])
    assert [done.kept() for done in both] == [1, 3]
    for done in both:
        client.commit(done.reservation, 0)
    (held,) = client.reserve(space, [other])
    assert (held.reservation, held.kept()) == (0, 3), "what is held is not refused"
    found = client.lookup(space, bytes(range(48)), tenant=a)
    assert found.chunks == 1, "a slot with its seal takes two pages, and the quota is two"
    told = {row["tenant"]: row for row in client.status(b)["tenants"]}
    assert set(told) == {a.hex(), b.hex()}
    assert (told[a.hex()]["asked_chunks"], told[a.hex()]["hit_chunks"]) == (6, 1)
    assert (told[a.hex()]["refused_chunks"], told[b.hex()]["stored_chunks"]) == (2, 3)
    assert client.clear(tenant=b) == 3
    assert client.clear(space, tenant_of("nobody")) == 0


def test_a_killed_keeper_is_unavailable(keeper_process) -> None:
    keeper = keeper_process()
    client = keeper.connect(arena=True)
    namespace = client.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    keeper.process.kill()
    keeper.process.wait(20)
    with pytest.raises(KeeperUnavailable):
        client.lookup(namespace, bytes(16))
    assert client.closed
    for call in (client.status, lambda: client.commit(1, 0), lambda: client.release(1)):
        with pytest.raises(KeeperUnavailable, match="closed"):
            call()
    with pytest.raises(KeeperUnavailable, match="no keeper answers"):
        keeper.connect()


def test_a_keeper_killed_in_the_middle_of_a_call(keeper_process) -> None:
    keeper = keeper_process()
    client = keeper.connect()
    os.kill(keeper.process.pid, signal.SIGSTOP)
    raised: list[BaseException] = []

    def call() -> None:
        try:
            client.status()
        except KeeperUnavailable as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    keeper.process.kill()
    thread.join(60)
    assert len(raised) == 1


def test_a_stopped_keeper_costs_no_more_than_the_timeout(keeper_process) -> None:
    keeper = keeper_process()
    client = keeper.connect(timeout=0.2)
    good = keeper.connect("good")
    os.kill(keeper.process.pid, signal.SIGSTOP)
    with pytest.raises(KeeperUnavailable, match="no answer"):
        client.status()
    # A late answer must not be taken for the next one's.
    assert client.closed
    os.kill(keeper.process.pid, signal.SIGCONT)
    assert good.status()["pid"] == keeper.process.pid
    assert keeper.connect("test").status()["pid"] == keeper.process.pid


def test_to_clear_a_large_arena_may_take_longer_than_other_calls(keeper_process) -> None:
    keeper = keeper_process()
    client = keeper.connect(timeout=0.01)
    os.kill(keeper.process.pid, signal.SIGSTOP)
    later = threading.Timer(0.2, os.kill, (keeper.process.pid, signal.SIGCONT))
    later.start()
    assert client.clear() == 0
    later.join()


def test_a_stopped_keeper_does_not_hold_up_one_way_messages_for_ever(keeper_process) -> None:
    keeper = keeper_process()
    client = keeper.connect(timeout=0.2)
    os.kill(keeper.process.pid, signal.SIGSTOP)

    def release_often() -> None:
        for _ in range(100_000):
            client.release(1)

    with pytest.raises(KeeperUnavailable):
        release_often()


def test_the_mapping_outlives_the_keeper(keeper_process) -> None:
    keeper = keeper_process()
    writer, reader = keeper.connect("w", arena=True), keeper.connect("r", arena=True)
    written, read = writer.map_arena(), reader.map_arena()
    written[4096:8192] = b"x" * 4096
    keeper.process.kill()
    keeper.process.wait(20)
    assert read[4096:8192] == b"x" * 4096
    read[0] = 7
    assert written[0] == 7
    assert len(read) == reader.arena_bytes == 16 << 20


def test_the_arena_can_be_neither_shrunk_nor_grown(keeper_process) -> None:
    client = keeper_process().connect(arena=True)
    fd = client._arena_fd
    assert fd is not None
    for size in (0, client.arena_bytes - 4096, client.arena_bytes + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(fd).st_size == client.arena_bytes


def test_without_the_arena_there_is_no_descriptor(keeper_process) -> None:
    client = keeper_process().connect()
    with pytest.raises(RequestRefused, match="without the arena"):
        client.map_arena()


def test_connections_leave_no_descriptor(keeper_process) -> None:
    keeper = keeper_process()
    keeper.connect(arena=True).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        keeper.connect(arena=True).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_keepers_descriptors_go_with_its_clients(keeper_process, wait_until) -> None:
    keeper = keeper_process()
    fds = Path(f"/proc/{keeper.process.pid}/fd")
    first = keeper.connect()
    wait_until(lambda: first.status()["connections"] == 1)
    before = len(list(fds.iterdir()))
    clients = [keeper.connect(f"c{number}", arena=True) for number in range(20)]
    wait_until(lambda: len(list(fds.iterdir())) == before + 20)
    for client in clients:
        client.close()
    wait_until(lambda: len(list(fds.iterdir())) <= before)


def test_no_keeper_is_unavailable(keeper_process) -> None:
    path = keeper_process.directory() / "none.sock"
    for socket in (str(path), str(path) + "x" * 200):
        with pytest.raises(KeeperUnavailable, match="no keeper answers"):
            Connection.open(socket, "s")


def test_a_refusal_leaves_the_connection_usable(keeper_process) -> None:
    client = keeper_process().connect()
    with pytest.raises(RequestRefused, match="no namespace 3"):
        client.lookup(3, bytes(16))
    namespace = client.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    with pytest.raises(RequestRefused, match="geometry"):
        client.open_namespace(bytes(32), "m", [(8192, None)], 1, 1)
    assert client.lookup(namespace, bytes(16)).chunks == 0


def test_a_restarted_keeper_is_another_one(keeper_process) -> None:
    keeper = keeper_process()
    first = keeper.connect().keeper
    keeper.close()
    again = keeper_process(socket=keeper.socket).connect()
    assert again.keeper != first
    assert again.status()["keeper"] == again.keeper


def test_long_prompts_fit_a_frame(keeper_process) -> None:
    """A million tokens in 16-token chunks, in two groups."""
    client = keeper_process(memory="64MiB").connect()
    namespace = client.open_namespace(bytes(32), "m", [(4096, None), (4096, 4)], 1, 1)
    keys = b"".join(number.to_bytes(16, "little") for number in range(65536))
    [done] = client.reserve(namespace, [msg.Reservation(keys, [b"\1" * 65536, b"\1" * 65536], 0, 10**9)])
    assert [len(row) for row in done.offsets] == [65536] * 2
    assert 0 < (done.offsets[0] >= 0).sum() < 65536
    client.abort(done.reservation)
    assert client.status()["used_bytes"] == 0


def test_a_look_tells_that_the_keeper_is_gone(keeper_process, wait_until) -> None:
    keeper = keeper_process()
    client = keeper.connect()
    for _ in range(2):
        assert not client.ended
        assert client.status()["pid"] == keeper.process.pid, "a look leaves it as it was"
    keeper.process.kill()
    wait_until(lambda: client.ended)
    assert not client.closed
    client.close()
    assert client.ended


SMALL = """
import os, resource, sys
from kvkeep.errors import KVKeepError
from kvkeep.wire.client import Connection
soft = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1  # room for the socket, none for the arena
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
try:
    Connection.open(sys.argv[1], "small", arena=True)
except KVKeepError as error:
    print(type(error).__name__, error)
"""


def test_an_arena_for_which_there_is_no_descriptor(keeper_process, child_process) -> None:
    """It passes: no refusal, after which nobody would try again."""
    said = child_process(SMALL, keeper_process().socket).line()
    assert said.startswith("KeeperUnavailable"), said
    assert "descriptors" in said


IMPOSTOR = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    with listener.accept()[0] as client:
        print(len(client.recv(4096)), flush=True)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_keeper_is_told_nothing(keeper_process, child_process) -> None:
    folder = keeper_process.directory()
    folder.chmod(0o777)
    path = str(folder / "keeper.sock")
    impostor = child_process(IMPOSTOR, path)
    assert impostor.line() == "ready"
    with pytest.raises(KeeperUnavailable, match="belongs to user 65534, you are 0"):
        Connection.open(path, "victim", arena=True)
    assert impostor.line() == "0"


def test_what_is_not_held_need_not_be_asked_for(keeper_process, wait_until) -> None:
    """It is counted all the same, and shown."""
    keeper = keeper_process()
    client, keys = keeper.connect(presence=True), bytes(range(48))
    space = client.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    names = group_keys(keys, bytes(32), 0)
    assert client.absent(names)
    client.missed(space, [msg.Miss(3, 1, tenant_of("a")), msg.Miss(0, 0)])
    [told] = client.status()["namespaces"]
    counts = [told[name] for name in ("lookups", "local_chunks", "asked_chunks", "hit_chunks")]
    assert counts == [2, 1, 2, 0]
    assert client.status(tenant_of("a"))["tenants"][0]["asked_chunks"] == 2
    [done] = client.reserve(space, [msg.Reservation(keys, [b"\1\1\0"], 0, 0)])
    assert not client.absent(names[:2])
    assert client.absent(names[2:])
    client.abort(done.reservation)
    wait_until(lambda: client.absent(names))
    assert not keeper.connect().absent(names), "without the table nothing is known"


def test_who_must_hear_of_every_lookup_lets_nobody_see(keeper_process) -> None:
    directory = keeper_process.directory()
    for more in (
        ["--tier", f"fs://{directory}/t?capacity=4MiB"],
        ["--record", f"{directory}/r"],
        ["--traces", "http://127.0.0.1:9/v1/traces"],
    ):
        assert not keeper_process(*more).connect(presence=True).absent(group_keys(bytes(16), bytes(32), 0))


def test_both_descriptors_come_and_go(keeper_process) -> None:
    keeper = keeper_process()
    keeper.connect(arena=True, presence=True).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        keeper.connect(arena=True, presence=True).close()
    client = keeper.connect(arena=True, presence=True)
    assert len(client.map_arena()) == client.arena_bytes
    assert client.absent(group_keys(bytes(16), bytes(32), 0))
    client.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_writers_hear_what_was_reserved_for_their_session(keeper_process) -> None:
    keeper, keys = keeper_process(), bytes(range(32))
    asker, other = keeper.connect("mine"), keeper.connect("mine", arena=True)
    stranger = keeper.connect("another", arena=True, timeout=0.2)
    space = asker.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    first, second = (msg.Reservation(keys[at : at + 16], [b"\1"], 0, 0) for at in (0, 16))
    asker.begin_reserve(space, [first], 3)
    asker.begin_reserve(space, [second, first], 5)
    assert asker.status()["reservations"] == 2, "answers of others are not taken for this one's"
    told = [asker.reserved(3), asker.reserved(5)]
    assert [[done.reservation > 0 for done in some] for some in told] == [[True], [True, False]]
    assert told[0][0].epoch > 0
    assert other.status()["reservations"] == 2
    [mine, _] = other.reserved(5)
    assert mine.reservation == told[1][0].reservation
    assert mine.offsets[0].tolist() == told[1][0].offsets[0].tolist()
    with pytest.raises(KeeperUnavailable, match="no answer"):
        stranger.reserved(5)


def test_answers_of_others_do_not_make_a_wait_longer(keeper_process) -> None:
    keeper = keeper_process()
    asker, writer = keeper.connect("mine"), keeper.connect("mine", arena=True, timeout=0.0)
    space = asker.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    for number in range(2):
        asker.begin_reserve(space, [msg.Reservation(bytes([number] * 16), [b"\1"], 0, 0)], 1 + number)
    assert asker.reserved(2)
    assert keeper.figures()["reservations"] == 2  # so both have been sent to the writer
    with pytest.raises(KeeperUnavailable, match="only those of others"):
        writer.reserved(3)
    assert writer.closed


def test_who_waits_after_another_does_not_wait_anew(keeper_process) -> None:
    """A step's ranks and its scheduler share the keeper's time; what has come by then is heard also later."""
    keeper = keeper_process()
    asker, writer = (keeper.connect("mine", arena=arena, timeout=1000.0) for arena in (False, True))
    space = asker.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    asker.begin_reserve(space, [msg.Reservation(bytes(16), [b"\1"], 0, 0)], 1)
    assert asker.status()["reservations"] == 1  # so it has been answered
    assert asker.reserved(1, until=0.0)[0].reservation == writer.reserved(1, until=0.0)[0].reservation
    os.kill(keeper.process.pid, signal.SIGSTOP)
    try:
        asker.begin_reserve(space, [msg.Reservation(bytes(range(16)), [b"\1"], 0, 0)], 2)
        for one in (writer, asker):
            with pytest.raises(KeeperUnavailable, match="no answer"):
                one.reserved(2, until=0.0)  # not in a thousand seconds
    finally:
        os.kill(keeper.process.pid, signal.SIGCONT)


def test_writers_hear_of_a_refusal_too(keeper_process) -> None:
    keeper = keeper_process()
    asker, writer = keeper.connect("mine"), keeper.connect("mine", arena=True)
    space = asker.open_namespace(bytes(32), "m", GROUPS, 1, 1)
    good = msg.Reservation(bytes(16), [b"\1"], 0, 0)
    asker.begin_reserve(space, [good, msg.Reservation(bytes(32), [b"\1\1"], 0, 0)], 1)
    for one in (asker, writer):
        with pytest.raises(RequestRefused, match="twice"):
            one.reserved(1)
    assert asker.status()["reservations"] == 0
    asker.begin_reserve(space, [good], 2)
    assert asker.reserved(2)[0].reservation == writer.reserved(2)[0].reservation > 0


def test_an_answer_that_nobody_asked_for(keeper_process) -> None:
    client = keeper_process().connect()
    client._send(msg.Status())
    with pytest.raises(KeeperUnavailable, match="StatusReply where nobody had asked"):
        client.reserved(1)
    assert client.closed


def test_two_engines_of_one_name_do_not_take_each_others_slots(keeper_process) -> None:
    """As where replicas have one `engine_id`, and one keeper."""
    keeper, keys, tickets = keeper_process(), bytes(range(32)), [first_ticket(), first_ticket()]
    askers = [keeper.connect("same") for _ in range(2)]
    writers = [keeper.connect("same", arena=True) for _ in range(2)]
    for turn in range(3):
        for asker, ticket, at in zip(askers, tickets, (0, 16), strict=True):
            space = asker.open_namespace(bytes(32), "m", GROUPS, 1, 1)
            key = bytes([turn]) + keys[at + 1 : at + 16]
            asker.begin_reserve(space, [msg.Reservation(key, [b"\1"], 0, 0)], ticket + turn)
    numbers = set[int]()
    for turn in range(3):
        for asker, writer, ticket in zip(askers, writers, tickets, strict=True):
            [told], [heard] = asker.reserved(ticket + turn), writer.reserved(ticket + turn)
            assert told.reservation == heard.reservation
            numbers.add(told.reservation)
    assert len(numbers) == 6
