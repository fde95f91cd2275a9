"""A keeper that serves peers, and an engine that saves what a test wants to be held there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from blake3 import blake3

from kvkeep.tiers.base import Buffer, Got, Key, Put, Tier
from kvkeep.tiers.open import open_raw
from kvkeep.tiers.seal import SEAL_BYTES, seal
from kvkeep.tiers.url import TierURL
from kvkeep.tiers.wrap import Wrapper
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation
from tests.tiers.place import Place, Proxy

CHUNK, CHUNKS = (1 << 20) - SEAL_BYTES, 24  # of an Engine
PREFIX = b"namespac"  # of all keys that `keys_of` makes


class Lending:
    """One keeper process with `--peers`; `save` is its engine."""

    def __init__(self, start: Any, *options: str, where: str = "0", **how: Any) -> None:
        self.keeper = start("--peers", where, *options, **how)
        self.port = int(self.figures()["address"].rpartition(":")[2])
        self._link = self.keeper.connect("engine", arena=True)
        self.memory = self._link.map_arena()
        self._spaces: dict[int, tuple[int, bytes]] = {}

    def figures(self) -> dict[str, Any]:
        """What the keeper says of its peers."""
        figures: dict[str, Any] = self.keeper.figures()["peers"]
        return figures

    def save(self, key: Key, value: Buffer) -> int:
        """Hold a value, of whole pages; returns where it lies. Its last SEAL_BYTES are the keeper's."""
        space, tweak = self._space(len(value))
        base = bytes(a ^ b for a, b in zip(key[len(PREFIX) :], tweak, strict=True))
        [done] = self._link.reserve(space, [Reservation(base, [b"\1"], 0, 0)])
        if not done.reservation:
            return -1
        offset = int(done.offsets[0][0])
        self.memory[offset : offset + len(value) - SEAL_BYTES] = value[:-SEAL_BYTES]
        self._link.commit(done.reservation, 0)
        self._link.status()  # answered in turn, so the commit has been heard
        return offset

    def forget(self) -> None:
        """Hold nothing any more."""
        self._link.clear()

    def flip(self, offset: int) -> None:
        """A bit of memory goes wrong."""
        self.memory[offset] ^= 4

    def url(self, port: int | None = None, **options: str) -> TierURL:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return TierURL(f"peer://127.0.0.1:{port or self.port}?{query}".rstrip("?"))

    def _space(self, size: int) -> tuple[int, bytes]:
        """The namespace of values of one size, and what its only group XORs onto keys."""
        if size not in self._spaces:
            print_ = PREFIX + size.to_bytes(24, "big")
            number = self._link.open_namespace(print_, "test", [(size - SEAL_BYTES, None)], 1, 1)
            self._spaces[size] = number, blake3(print_ + b"group0").digest(16)
        return self._spaces[size]


class Engine:
    """An engine that writes and reads real bytes: documents of CHUNKS chunks each."""

    def __init__(self, link: Connection) -> None:
        """`link`: with the arena."""
        self.link = link
        self._memory = self.link.map_arena()
        self._space = self.link.open_namespace(b"p" * 32, "model", [(CHUNK, None)], 1, 1, 16)

    def save(self, document: int) -> None:
        """Prefill it."""
        keys = document_keys(document)
        [done] = self.link.reserve(self._space, [Reservation(keys, [b"\1" * CHUNKS], 0, 0)])
        for at, offset in enumerate(done.offsets[0].tolist()):
            if offset >= 0:
                self._memory[offset : offset + CHUNK] = content(document, at)
        if done.reservation:
            self.link.commit(done.reservation, 0)
        self.link.status()

    def begin(self, document: int) -> int:
        """Look it up, and let its chunks come; a ticket, or 0."""
        return self.link.lookup(self._space, document_keys(document), 0, 0.0, 5.0).ticket

    def ask(self, document: int, wait: float = 5.0) -> int:
        """One request; checks every byte that it is given. Returns how many chunks that were."""
        keys, link = document_keys(document), self.link
        found = link.lookup(self._space, keys, 0, 0.0, wait)
        if found.ticket:
            deadline = time.monotonic() + wait
            while link.poll([found.ticket]) != b"\2" and time.monotonic() < deadline:
                time.sleep(0.005)
            if found.lease:
                link.release(found.lease)
            found = link.lookup(self._space, keys, 0, 0.0, wait, found.ticket)
        if found.lease:
            for at, offset in enumerate(found.offsets[0].tolist()):
                assert self._memory[offset : offset + CHUNK] == content(document, at), "wrong bytes"
            link.release(found.lease)
        return found.chunks

    def tier(self) -> dict[str, Any]:
        """Figures of the keeper's first tier."""
        figures: Any = self.link.status()
        return figures["tiers"][0]


def document_keys(document: int) -> bytes:
    names = (b"%d/%d" % (document, at) for at in range(CHUNKS))
    return b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in names)


def content(document: int, at: int) -> bytes:
    piece = hashlib.sha256(b"%d/%d" % (document, at)).digest()
    return piece * (CHUNK // len(piece)) + piece[: CHUNK % len(piece)]


class Written(Wrapper):
    """A peer tier whose puts go round by the other keeper's engine."""

    def __init__(self, inner: Tier, lending: Lending) -> None:
        super().__init__(inner)
        self.lending = lending

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        for key, buffer in zip(keys, buffers, strict=True):
            seal(key, buffer)
            if self.lending.save(key, buffer) < 0:
                self.lending.forget()
                assert self.lending.save(key, buffer) >= 0
        return [Put.STORED] * len(keys)

    def delete(self, keys: Sequence[Key]) -> None:
        self.lending.forget()


class PeerPlace(Place):
    capacity_option = None  # the other keeper's arena

    def __init__(self, lending: Lending) -> None:
        self.lending = lending
        self.proxy = Proxy(("127.0.0.1", lending.port))

    def open(self, **options: str) -> Tier:
        url = self.lending.url(self.proxy.port, **options)
        tier = open_raw(url)
        url.finish()
        return Written(tier, self.lending)

    def read(self, key: Key) -> bytes | None:
        raise NotImplementedError("looked at through the arena")

    def write(self, key: Key, value: bytes) -> None:
        raise NotImplementedError("written by its engine")

    def used_bytes(self) -> int:
        return int(self.lending.keeper.figures()["used_bytes"])


def garbled(results: Sequence[Got], sent: Sequence[Buffer], back: Sequence[Buffer]) -> bool:
    """Whether anything that is said to be a hit is not what was held."""
    return any(
        got is Got.HIT and not np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
        for got, a, b in zip(results, sent, back, strict=True)
    )
