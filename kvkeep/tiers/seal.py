"""The seal of every value below the arena: what it is, and a checksum, in its last 56 bytes.

It lies in the slot itself, behind the KV, so that a value is one piece of memory for every medium:
no second buffer, no copy. A value that does not carry its own key and length under the right
checksum is DAMAGED, whoever wrote it, and is deleted; nothing of it is served.

| bytes | content                                                         |
|-------|-----------------------------------------------------------------|
| 8     | `kvkeep`, 0, format version                                     |
| 24    | the key                                                         |
| 8     | length of the whole value, little-endian                        |
| 16    | XXH3-128 of all that lies before this field                     |
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence

import xxhash

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Buffer, Check, Got, Key, Put, Seal, Tier
from kvkeep.tiers.wrap import Wrapper

__all__ = ["SEAL_BYTES", "Sealed", "check_seal", "seal"]

MAGIC = b"kvkeep\x00\x01"
_HEAD = struct.Struct("<8s24sQ")
_SUM_BYTES = 16
SEAL_BYTES = _HEAD.size + _SUM_BYTES
"""Bytes at the end of every value that are the seal's, not the caller's."""


def seal(key: Key, value: Buffer) -> None:
    """Write the seal into the last bytes of `value`."""
    _HEAD.pack_into(value, len(value) - SEAL_BYTES, MAGIC, key, len(value))
    value[-_SUM_BYTES:] = xxhash.xxh3_128_digest(value[:-_SUM_BYTES])


def check_seal(key: Key, value: Buffer) -> bool:
    """Whether `value` is what was sealed under `key`, bit for bit."""
    if len(value) < SEAL_BYTES:
        return False
    head = _HEAD.unpack_from(value, len(value) - SEAL_BYTES)
    if head != (MAGIC, key, len(value)):  # cheap, and refuses foreign values before the sum is made
        return False
    return bool(xxhash.xxh3_128_digest(value[:-_SUM_BYTES]) == value[-_SUM_BYTES:])


class Sealed(Wrapper):
    """Seals what goes down, and lets nothing up that is not as it was sealed; a tier that can do both in
    its own threads does them there (`Tier.overlap`)."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self._overlapped = inner.overlap(seal, check_seal)

    def overlap(self, seal: Seal, check: Check) -> bool:
        return False  # what lies in here carries our seal already

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        results = self.inner.get(keys, buffers)
        for place, (key, buffer, result) in enumerate(zip(keys, buffers, results, strict=True)):
            if result is Got.HIT and not self._overlapped and not check_seal(key, buffer):
                results[place] = Got.DAMAGED
        damaged = [key for key, result in zip(keys, results, strict=True) if result is Got.DAMAGED]
        if damaged:
            with contextlib.suppress(TierUnavailable):  # what was good is good all the same
                self.inner.delete(damaged)
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the tier's; the last SEAL_BYTES of each buffer are overwritten."""
        if not self._overlapped:
            for key, buffer in zip(keys, buffers, strict=True):
                seal(key, buffer)
        return self.inner.put(keys, buffers)
