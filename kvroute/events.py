"""vLLM's KV events, as they come over ZMQ: three frames, `[topic, sequence number, batch]`.

The sequence number is 8 bytes, big endian; the batch is msgpack, `[time, [event, …], rank]`. An event is a
map with `type` (vLLM 0.32) or an array with its name first (before), so each is looked at on its own: one
that is malformed, or of a kind that is not known, is dropped and counted, and the others hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

__all__ = ["END_SEQUENCE", "Batch", "BlockHash", "Cleared", "Decoder", "Event", "Removed", "Stored", "pack"]

END_SEQUENCE = (-1).to_bytes(8, "big", signed=True)
"""Sequence number that ends a replay."""

BlockHash = int | bytes
"""An engine's own name of a block; means nothing to anyone else, and changes with its version."""


class Stored(msgspec.Struct, tag="BlockStored", gc=False, omit_defaults=True):
    """Blocks that an engine now holds, each following the one before it, the first following `parent`.

    `token_ids` has `block_size` ids per block, or none where the blocks are known from an earlier event
    (of another medium). `extra_keys`: per block what else it is keyed by, or None.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", gc=False, omit_defaults=True):
    """Blocks that an engine no longer holds on a medium."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """An engine holds nothing any more."""


Event = Stored | Removed | Cleared


class _StoredRow(Stored, tag="BlockStored", array_like=True, gc=False):
    pass


class _RemovedRow(Removed, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _ClearedRow(Cleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _Frame(msgspec.Struct, array_like=True, gc=False):
    time: float
    events: list[msgspec.Raw]
    rank: int | None = None


class Batch(NamedTuple):
    """One message of an engine's rank. `sequence` grows by one from message to message, rank by rank."""

    topic: str
    sequence: int
    events: list[Event]
    rank: int = 0


class Decoder:
    """Decodes messages; counts what it had to drop. Never raises on anything that came from outside."""

    def __init__(self) -> None:
        self.bad_messages = 0
        self.bad_events = 0
        self._frame = msgspec.msgpack.Decoder(_Frame)
        self._maps = msgspec.msgpack.Decoder(Event)
        self._rows = msgspec.msgpack.Decoder(_StoredRow | _RemovedRow | _ClearedRow)

    def decode(self, frames: Sequence[bytes]) -> Batch | None:
        """The message in `frames`; None, and counted, where it is none."""
        if len(frames) != 3 or len(frames[1]) != 8:
            self.bad_messages += 1
            return None
        try:
            frame = self._frame.decode(frames[2])
        except (msgspec.DecodeError, RecursionError):
            self.bad_messages += 1
            return None
        if not 0 <= (rank := frame.rank or 0) < 1024:
            self.bad_messages += 1
            return None
        events = [event for raw in frame.events if (event := self._event(raw)) is not None]
        self.bad_events += len(frame.events) - len(events)
        return Batch(frames[0].decode("utf-8", "replace"), int.from_bytes(frames[1], "big"), events, rank)

    def _event(self, raw: msgspec.Raw) -> Event | None:
        first = memoryview(raw)[0]
        row = first & 0xF0 == 0x90 or first in (0xDC, 0xDD)  # how msgpack begins an array
        try:
            event: Event = (self._rows if row else self._maps).decode(raw)
        except (msgspec.DecodeError, RecursionError):
            return None
        return event


def pack(topic: str, sequence: int, time: float, events: Sequence[Event], rank: int = 0) -> list[bytes]:
    """The frames of a message, events as maps: what an engine would send."""
    frame = msgspec.msgpack.encode([time, list(events), rank])
    return [topic.encode(), sequence.to_bytes(8, "big"), frame]
