"""Clients that die, race and crowd: what is read is what was stored, whoever was killed."""

import json

import numpy as np
from blake3 import blake3

from kvkeep.wire import messages as msg

SLOT = 16384
GROUPS = [(SLOT, None)]
FINGERPRINT = b"\7" * 32

COMMON = """
import json, os, random, sys, time
from blake3 import blake3
from kvkeep.wire import messages as msg
from kvkeep.wire.client import Connection

SLOT = 16384
socket, name = sys.argv[1], sys.argv[2]
connection = Connection.open(socket, name, arena=True, timeout=60.0)
memory = connection.map_arena()
namespace = connection.open_namespace(b"\\7" * 32, "m", [(SLOT, None)], 1, 1)

def keys_of(chain, length):
    return [blake3(b"%d/%d" % (chain, position)).digest(16) for position in range(length)]

def payload(key):
    return blake3(key).digest(SLOT)

def reserve(keys, first=0, epoch=10**9):
    [done] = connection.reserve(
        namespace, [msg.Reservation(b"".join(keys), [bytes([1]) * len(keys)], first, epoch)]
    )
    return done.reservation, done.offsets[0].tolist() if done.offsets else []

def write(keys, offsets):
    for key, offset in zip(keys, offsets):
        if offset >= 0:
            memory[offset : offset + SLOT] = payload(key)

def tell(line):
    print(line, flush=True)
"""

KILLED_WHILE_WRITING = """
keys = keys_of(1, 8)
reservation, offsets = reserve(keys)
write(keys[:4], offsets[:4])
memory[offsets[4] : offsets[4] + 100] = payload(keys[4])[:100]
tell("writing")
sys.stdin.readline()
"""

KILLED_WHILE_READING = """
keys = keys_of(1, 8)
reservation, offsets = reserve(keys)
write(keys, offsets)
connection.commit(reservation, 0)
found = connection.lookup(namespace, b"".join(keys))
tell(found.chunks)
sys.stdin.readline()
"""

SAME_CHUNKS = """
tell("ready")
sys.stdin.readline()
stored = 0
for chain in range(60):
    keys = keys_of(chain, 4)
    reservation, offsets = reserve(keys)
    write(keys, offsets)
    if reservation:
        connection.commit(reservation, 0)
        stored += sum(offset >= 0 for offset in offsets)
connection.status()
tell(stored)
"""

CROWD = """
source = random.Random(name)
tell("ready")
sys.stdin.readline()
deadline = time.monotonic() + 10
operations = checked = wrong = 0
late = []
while operations < 800 and time.monotonic() < deadline:
    operations += 1
    keys = keys_of(source.randrange(40), 12)[: source.randrange(1, 13)]
    found = connection.lookup(namespace, b"".join(keys))
    for key, offset in zip(keys, found.offsets[0].tolist() if found.chunks else []):
        wrong += memory[offset : offset + SLOT] != payload(key)
        checked += 1
    if found.lease:
        late.append((found.lease, keys[: found.chunks], found.offsets[0].tolist()))
    while len(late) > source.randrange(4):
        lease, held, offsets = late.pop(0)
        for key, offset in zip(held, offsets):  # a lease holds until it is given back
            wrong += memory[offset : offset + SLOT] != payload(key)
        connection.release(lease)
    rest = keys[found.chunks :]
    if rest:
        reservation, offsets = reserve(rest, found.chunks, found.epoch)
        abort = source.random() < 0.1
        write(rest[: len(rest) // 2] if abort else rest, offsets)
        if reservation:
            connection.abort(reservation) if abort else connection.commit(reservation, 0)
tell(json.dumps([operations, checked, wrong]))
"""


def keys_of(chain: int, length: int) -> list[bytes]:
    return [blake3(b"%d/%d" % (chain, position)).digest(16) for position in range(length)]


def intact(connection, memory, namespace: int, keys: list[bytes]) -> int:
    """Chunks found of a chain, each of which must hold the bytes that belong to its key."""
    found = connection.lookup(namespace, b"".join(keys))
    for key, offset in zip(keys, found.offsets[0].tolist() if found.chunks else [], strict=False):
        assert memory[offset : offset + SLOT] == blake3(key).digest(SLOT)
    if found.lease:
        connection.release(found.lease)
    return found.chunks


def balanced(figures: dict) -> bool:
    return (figures["leases"], figures["reservations"]) == (0, 0)


def test_what_a_killed_writer_had_reserved_is_free_again(keeper_process, child_process, wait_until) -> None:
    keeper = keeper_process()
    other = keeper.connect("other", arena=True)
    namespace = other.open_namespace(FINGERPRINT, "m", GROUPS, 1, 1)
    child = child_process(COMMON + KILLED_WHILE_WRITING, keeper.socket, "victim")
    assert child.line() == "writing"
    keys = keys_of(1, 8)
    reservation = msg.Reservation(b"".join(keys), [b"\1" * 8], 0, 10**9)
    [blocked] = other.reserve(namespace, [reservation])
    assert blocked.reservation == 0, "nobody else may write what is being written"
    assert other.lookup(namespace, b"".join(keys)).chunks == 0, "half-written chunks are not found"
    child.kill()
    wait_until(lambda: other.status()["reservations"] == 0)
    figures = other.status()
    assert figures["used_bytes"] == figures["chunks"] == 0
    assert other.lookup(namespace, b"".join(keys)).chunks == 0
    [done] = other.reserve(namespace, [reservation])
    assert (done.offsets[0] >= 0).all()
    with other.map_arena() as memory:
        for key, offset in zip(keys, done.offsets[0].tolist(), strict=True):
            memory[offset : offset + SLOT] = blake3(key).digest(SLOT)
        other.commit(done.reservation, 0)
        assert intact(other, memory, namespace, keys) == 8


def test_what_a_killed_reader_had_leased_can_be_evicted_again(
    keeper_process, child_process, wait_until
) -> None:
    keeper = keeper_process(memory="1MiB")  # 64 slots
    other = keeper.connect("other")
    namespace = other.open_namespace(FINGERPRINT, "m", GROUPS, 1, 1)
    child = child_process(COMMON + KILLED_WHILE_READING, keeper.socket, "victim")
    assert child.line() == "8"
    flood = msg.Reservation(np.arange(160, dtype="<u8").tobytes(), [b"\1" * 80], 0, 10**9)
    slots = 64
    [leased] = other.reserve(namespace, [flood])
    assert (leased.offsets[0] >= 0).sum() == slots - 8
    other.abort(leased.reservation)
    child.kill()
    wait_until(lambda: other.status()["leases"] == 0)
    assert other.status()["chunks"] == 8, "what was committed stays"
    other.lookup(namespace, b"")  # a later request: what it brings is newer than what was read before
    [free] = other.reserve(namespace, [flood])
    assert (free.offsets[0] >= 0).sum() == slots


def test_two_engines_that_save_the_same_chunks_store_them_once(
    keeper_process, child_process, wait_until
) -> None:
    keeper = keeper_process()
    children = [child_process(COMMON + SAME_CHUNKS, keeper.socket, name) for name in ("a", "b")]
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.say()
    stored = [int(child.line()) for child in children]
    figures = keeper.figures()
    assert sum(stored) == figures["counters"]["stored_chunks"] == figures["chunks"] == 60 * 4
    reader = keeper.connect("reader", arena=True)
    namespace = reader.open_namespace(FINGERPRINT, "m", GROUPS, 1, 1)
    with reader.map_arena() as memory:
        assert sum(intact(reader, memory, namespace, keys_of(chain, 4)) for chain in range(60)) == 60 * 4
    assert [child.finish() for child in children] == [0, 0]
    wait_until(lambda: balanced(keeper.figures()))


def test_engines_never_read_each_others_bytes(keeper_process, child_process, wait_until) -> None:
    keeper = keeper_process(memory="2MiB")  # a fifth of what is asked for
    children = [child_process(COMMON + CROWD, keeper.socket, name) for name in ("a", "b", "c", "victim")]
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.say()
    wait_until(lambda: keeper.figures()["counters"]["lookups"] > 200)
    children.pop().kill()  # in the middle of whatever it does
    results = [json.loads(child.line()) for child in children]
    assert sum(wrong for _, _, wrong in results) == 0
    assert all(checked > 0 for _, checked, _ in results)
    figures = keeper.figures()
    assert figures["counters"]["evicted_chunks"] > 100
    assert figures["used_bytes"] <= figures["memory_bytes"] <= 2 << 20
    assert [child.finish() for child in children] == [0, 0, 0]
    wait_until(lambda: balanced(keeper.figures()))
    assert keeper.process.poll() is None
    assert keeper.figures()["protocol_errors"] == 0
