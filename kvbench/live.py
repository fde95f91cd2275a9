"""A trace through a real keeper process, as the engine adapter calls it, with one-page chunks and no engine.

It is what `kvkeep bench simulate` is held against: `live_hits` and `kvbench.replay` count the same thing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from blake3 import blake3

from kvbench.trace import Trace
from kvkeep.identity import KEY_BYTES, fingerprint
from kvkeep.terms import Found
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

__all__ = ["CHUNK_BYTES", "Live", "live_replay"]

CHUNK_BYTES = 4000
"""With the seal of values below memory it still fits a page."""
_PATIENCE = 1e6


class Live(NamedTuple):
    """What a keeper gave: blocks that requests got, and the keeper's own figures afterwards."""

    hits: int
    figures: dict[str, Any]


def live_replay(
    connection: Connection, trace: Trace, request_done: Callable[[], object] = lambda: None
) -> Live:
    """Replay all requests, one after the other; the next one comes once tiers have what they shall get."""
    print_ = fingerprint({"bench": "simulate", "block_tokens": trace.block_tokens})
    space = connection.open_namespace(
        print_, "bench simulate", [(CHUNK_BYTES, None)], 1, 1, trace.block_tokens
    )
    keys = b"".join(blake3(b"block %d" % block).digest(KEY_BYTES) for block in range(trace.unique))
    hits = 0
    for chain, asked, local in zip(trace.chains, trace.asked, trace.local, strict=True):
        names = b"".join(keys[KEY_BYTES * block : KEY_BYTES * (block + 1)] for block in chain.tolist())
        found = _look_up(connection, space, names[: KEY_BYTES * asked], local)
        hits += found.chunks
        first = local + found.chunks if found.chunks else 0
        rest = names[KEY_BYTES * first :]
        reserved = connection.reserve(
            space, [Reservation(rest, [b"\1" * (len(rest) // KEY_BYTES)], first, found.epoch)]
        )[0]
        if found.lease:
            connection.release(found.lease, 0)
        if reserved.reservation:
            connection.commit(reserved.reservation, 0)
        _settle(connection)
        request_done()
    return Live(hits, connection.status())


def _look_up(connection: Connection, space: int, keys: bytes, local: int) -> Found:
    found = connection.lookup(space, keys, local, patience=_PATIENCE)
    if not found.ticket:
        return found
    while connection.poll([found.ticket]) != b"\2":
        time.sleep(0.0002)
    settled = connection.lookup(space, keys, local, patience=_PATIENCE, ticket=found.ticket)
    if found.lease:
        connection.release(found.lease)
    return settled


def _settle(connection: Connection) -> None:
    """Wait until no tier has anything to be written."""
    while any(tier["waiting_chunks"] for tier in connection.status()["tiers"]):  # type: ignore[attr-defined]
        time.sleep(0.0002)
