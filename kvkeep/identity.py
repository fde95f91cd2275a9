"""Who a chunk is: namespaces and chunk keys.

A *namespace* is everything that must match for KV bytes to be interchangeable; its fingerprint
is the BLAKE3 digest of a canonical encoding. A *chunk key* is a digest of the fingerprint, the
request's extra keys and every token id up to the chunk's end: equal key, equal bytes. Nothing
here depends on the process (PYTHONHASHSEED, ids, time), so keys agree across hosts and engines.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from blake3 import blake3

__all__ = [
    "KEY_BYTES",
    "SPACE_BYTES",
    "TENANT_BYTES",
    "ChainHasher",
    "encode_extra",
    "file_digest",
    "fingerprint",
    "group_keys",
    "tenant_of",
]

KEY_BYTES = 16
"""Bytes of a chunk key: 128 bits, so 2^64 work for a collision."""

SPACE_BYTES = 8
"""Bytes of the fingerprint with which a chunk's name begins wherever namespaces mix: in tiers, with peers.
The chunk key follows."""

TENANT_BYTES = 8
"""Bytes that name a tenant, for quotas and reports; it is the salt in the keys that keeps tenants apart."""

FORMAT = 1
"""Version of the key derivation; part of every fingerprint."""

_EXTRA_MARK = b"\xff\xff\xff\xff"  # a token id that no prompt can contain: ids are packed as uint31
_SPAN_BYTES = 992  # with the 32 bytes that it starts from, one leaf of BLAKE3's tree
_STRIPE = 1 << 20
_SAMPLE = 4096
_HEADER_LIMIT = 100 << 20  # of a safetensors header, by its own specification


def fingerprint(description: Mapping[str, Any]) -> bytes:
    """Digest (32 bytes) of a namespace description.

    `description` may hold str, int, float, bool, None, lists and dicts with str keys; anything
    else raises TypeError, since it has no canonical encoding.
    """
    _check_names(description)
    text = json.dumps(
        {"kvkeep": FORMAT, **description},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
    )
    return blake3(text.encode()).digest()


def _check_names(value: Any) -> None:
    """Raise TypeError on a name that is no str: JSON would write 1 and "1" alike."""
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("a name in a namespace description is no str")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_names(item)


def group_keys(base: bytes, print_: bytes, group: int) -> npt.NDArray[np.uint64]:
    """Keys of one KV-cache group from the keys of the prompt's chunks.

    `base`: n × 16 bytes as made by `ChainHasher`. Returns uint64 [n, 2]. Each group owns a
    constant that is XORed onto the key, so one walk over the tokens serves all groups.
    """
    tweak = np.frombuffer(blake3(print_ + b"group%d" % group).digest(KEY_BYTES), "<u8")
    keys: npt.NDArray[np.uint64] = np.frombuffer(base, "<u8").reshape(-1, 2) ^ tweak
    return keys


def tenant_of(salt: str | None) -> bytes:
    """What a tenant is called outside its engine: a digest of its `cache_salt`; b"" without one.

    Nobody can read a salt from it, but who guesses the salt can check the guess: vLLM's advice, a long
    random salt, holds here too.
    """
    if not salt:
        return b""
    hasher = blake3(salt.encode("utf-8", "surrogatepass"), derive_key_context="kvkeep tenant of a cache_salt")
    return hasher.digest(TENANT_BYTES)


class ChainHasher:
    """Walks one request's token ids and yields the key of each whole chunk.

    Owned by one request, used by one thread. Feeding is incremental: `extend` takes the tokens
    that follow those already fed; those short of a whole chunk wait for the next call.

    A key is the digest of all that came before. BLAKE3 hashes a long input as a tree, and each digest
    folds the tree again, a third of the time at 128k tokens; so every `_SPAN_BYTES` of token ids the
    hasher starts anew from its own 32-byte digest, which stands for all before it.
    """

    def __init__(self, namespace: bytes, chunk_tokens: int) -> None:
        self._hasher = blake3(namespace)
        self._chunk_tokens = chunk_tokens
        self._span = max(1, _SPAN_BYTES // (4 * chunk_tokens))
        self._keys = bytearray()

    @property
    def chunks(self) -> int:
        """Whole chunks hashed so far."""
        return len(self._keys) // KEY_BYTES

    def keys(self, first: int, last: int) -> bytes:
        """Keys of chunks first … last-1, 16 bytes each."""
        return bytes(self._keys[first * KEY_BYTES : last * KEY_BYTES])

    def extend(self, tokens: Sequence[int], extras: Sequence[bytes | None] | None = None) -> None:
        """Hash the whole chunks in `tokens`, which must start at token `chunks * chunk_tokens`.

        `extras`: one entry per whole chunk, the canonical encoding of its extra keys or None.
        Raises `struct.error` on a token id outside [0, 2^31).
        """
        count = len(tokens) // self._chunk_tokens
        whole = count * self._chunk_tokens
        packed = struct.pack(f"<{whole}i", *(tokens if len(tokens) == whole else tokens[:whole]))
        if count and np.frombuffer(packed, "<i4").min() < 0:
            raise struct.error("negative token id")
        done = 0
        while done < count:
            stop = min(count, done + self._span - self.chunks % self._span)
            self._hash(packed, done, stop, extras)
            done = stop
            if self.chunks % self._span == 0:
                self._hasher = blake3(self._hasher.digest())

    def _hash(self, packed: bytes, first: int, last: int, extras: Sequence[bytes | None] | None) -> None:
        size, out = 4 * self._chunk_tokens, self._keys
        update, digest = self._hasher.update, self._hasher.digest
        if extras is None:
            for at in range(first * size, last * size, size):
                update(packed[at : at + size])
                out += digest(KEY_BYTES)
            return
        for index in range(first, last):
            update(packed[index * size : (index + 1) * size])
            extra = extras[index]
            if extra is not None:
                update(_EXTRA_MARK + struct.pack("<I", len(extra)) + extra)
            out += digest(KEY_BYTES)


def encode_extra(value: Any) -> bytes:
    """Canonical, unambiguous encoding of an engine's extra key.

    Takes None, bool, int, float, str, bytes, and tuples or lists of them. Raises TypeError on
    anything else: what cannot be encoded canonically must not be cached.
    """
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"b1" if value else b"b0"
    if isinstance(value, int):
        return _sized(b"i", str(value).encode())
    if isinstance(value, float):
        return _sized(b"f", value.hex().encode())
    if isinstance(value, str):
        return _sized(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _sized(b"y", value)
    if isinstance(value, list | tuple):
        return _sized(b"t", b"".join(encode_extra(item) for item in value))
    raise TypeError(f"cannot encode an extra key of type {type(value).__name__}")


def _sized(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack("<Q", len(body)) + body


def file_digest(paths: Sequence[Path]) -> str:
    """Identity of weight files by content, without reading all of it.

    Name, size, and 4 KiB of every MiB of each file; of safetensors also 4 KiB at the start of each
    tensor, so a fine-tune, of norms or biases alone too, under an old path is a new identity.
    """
    hasher = blake3()
    for path in sorted(paths, key=lambda item: item.name):
        size = path.stat().st_size
        hasher.update(_sized(b"p", path.name.encode()) + struct.pack("<Q", size))
        with path.open("rb", buffering=0) as file:
            starts = _tensor_starts(file, size) if path.suffix == ".safetensors" else []
            for offset in sorted({*range(0, size, _STRIPE), *starts}):
                file.seek(offset)
                hasher.update(file.read(_SAMPLE))
    return str(hasher.hexdigest())


def _tensor_starts(file: BinaryIO | FileIO, size: int) -> list[int]:
    """Where each tensor of a safetensors file begins (u64 length, JSON header, data); [] if it is not one."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) if length <= _HEADER_LIMIT else {}
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        starts = [8 + length + int(entry["data_offsets"][0]) for entry in entries]
    except (struct.error, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return []
    return starts if all(8 + length <= start <= size for start in starts) else []
