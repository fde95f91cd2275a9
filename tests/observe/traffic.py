"""What engines do to a keeper: prompts that begin alike are looked up, read, and saved."""

import hashlib
import time
from collections.abc import Callable

from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

CHUNK = 64 << 10
CHUNK_TOKENS = 128


def keys_of(document: int, chunks: int) -> bytes:
    names = (f"{document}/{place}".encode() for place in range(chunks))
    return b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in names)


class Engine:
    """One engine with one model on one keeper."""

    def __init__(
        self, connection: Connection, model: str = "SmolLM2-135M bfloat16 tp1", number: int = 7
    ) -> None:
        self.connection = connection
        self.space = connection.open_namespace(
            bytes([number]) * 32, model, [(CHUNK, None)], 1, 1, CHUNK_TOKENS
        )

    def request(
        self, document: int, chunks: int, first: int = 0, trace: str = "", tenant: bytes = b""
    ) -> int:
        """One prompt, from lookup to commit; waits for tiers. Returns how many chunks were found."""
        keys, link = keys_of(document, chunks), self.connection
        found = link.lookup(self.space, keys, first, 0.0, 5.0, trace=trace, tenant=tenant)
        if found.ticket:
            deadline = time.monotonic() + 20
            while link.poll([found.ticket]) != b"\2":
                assert time.monotonic() < deadline
            if found.lease:
                link.release(found.lease)
            found = link.lookup(self.space, keys, first, 0.0, 5.0, found.ticket, trace, tenant)
        if found.lease:
            link.release(found.lease, 0)
        done = link.reserve(self.space, [Reservation(keys, [b"\1" * chunks], 0, found.epoch, tenant)])[0]
        if done.reservation:
            link.commit(done.reservation, 0)
        return found.chunks


def traffic(
    engine: Engine,
    rounds: int = 3,
    documents: int = 6,
    chunks: int = 12,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Documents of growing length, over and over; the engine has the first two chunks of each second one."""
    for turn in range(rounds):
        for document in range(documents):
            engine.request(document, chunks + turn, first=2 * (document % 2) if turn else 0)
            after()
