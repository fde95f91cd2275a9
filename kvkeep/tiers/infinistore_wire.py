"""InfiniStore's TCP protocol, version 0.2: headers, two small flatbuffers, one connection.

Not through its own client, which cannot be called in a process that must live on: where a read fails it
follows a null pointer, it takes over SIGSEGV and its like, and waits without end for a missing key.

A request is `0xdeadbeef, op, length of the body` and the body; an answer begins with a code.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Buffer
from kvkeep.tiers.pool import PooledSocket

__all__ = ["FULL", "LONGEST", "MISSING", "OK", "Link"]

OK: Final = 200
MISSING: Final = 404
FULL: Final = 507
LONGEST = (1 << 31) - 1
"""Bytes of the longest value: its length is a signed 32-bit number."""

_HEAD = struct.Struct("<IcI")
_MAGIC = 0xDEADBEEF
_PAIR = struct.Struct("<II")
_EXIST_AHEAD = 64  # questions at once: small answers, which the server writes before it reads on
_DRAIN_SECONDS = 60.0
_SCRATCH = 1 << 20


class Link(PooledSocket):
    """One connection. All verbs raise OSError (TimeoutError among it), after which it is of no use."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        super().__init__(socket.create_connection((host, port), timeout))
        self._timeout = timeout
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._due: int | None = 0  # bytes of a value that are still to come; None: as many as will be said

    def exist(self, names: Sequence[bytes]) -> list[bool]:
        """Whether each is there."""
        found: list[bool] = []
        for at in range(0, len(names), _EXIST_AHEAD):
            some = names[at : at + _EXIST_AHEAD]
            self._send(b"".join(_HEAD.pack(_MAGIC, b"C", len(name)) + name for name in some))
            for _ in some:
                code, absent = _PAIR.unpack(self._answer(_PAIR.size))
                self._expect(code)
                found.append(not absent)
        return found

    def put(self, name: bytes, value: Buffer) -> int:
        """Store a value; OK or FULL. Afterwards the connection is of no use if it was FULL."""
        self._send(_payload(b"P", name, len(value)))
        try:
            self._send(value)
        except OSError:
            if self._code_if_any() == FULL:  # it does not read the value then
                return FULL
            raise
        code = self._code()
        if code != FULL:
            self._expect(code)
        return code

    def put_small(self, name: bytes, value: bytes) -> int:
        """As `put`, in one segment: the server never has a part of it."""
        self._send(_payload(b"P", name, len(value)) + value)
        code = self._code()
        if code != FULL:
            self._expect(code)
        return code

    def get(self, name: bytes, buffer: Buffer) -> int:
        """Receive a value; returns its length, or -1 where there is none. Nothing is received into a buffer
        of another length."""
        self._send(_payload(b"G", name, 0))
        self._due = None
        length = self._length()
        if length == len(buffer):
            self._receive(buffer)
        else:
            self._skip()
        return length

    def delete(self, names: Sequence[bytes]) -> None:
        """Forget these; absent ones are fine."""
        body = _names(names)
        self._send(_HEAD.pack(_MAGIC, b"X", len(body)) + body)
        self._expect(_PAIR.unpack(self._answer(_PAIR.size))[0])

    def close(self) -> None:
        """Close it. The server dies of clients that leave while it sends them a value, so one that is slow
        is first listened to for a while, on a thread."""
        if self._due != 0:
            threading.Thread(target=self._drain, name="kvkeep-infinistore-drain", daemon=True).start()
        else:
            self._sock.close()

    def _drain(self) -> None:
        self._timeout = _DRAIN_SECONDS
        try:
            if self._due is None:
                self._length()
            self._skip()
        except (OSError, TierUnavailable):
            pass  # it had its chance
        finally:
            self._sock.close()

    def _length(self) -> int:
        code = self._code()
        self._due = 0
        if code == MISSING:
            return -1
        self._expect(code)
        # The server's kernel keeps the value back until these few bytes are acknowledged, ours waits 40 ms.
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._due = int.from_bytes(self._answer(4), "little")
        return self._due

    def _skip(self) -> None:
        scratch = memoryview(bytearray(_SCRATCH))
        while self._due:
            self._receive(scratch[: min(self._due, _SCRATCH)])

    def _send(self, data: bytes | Buffer) -> None:
        self._sock.settimeout(self._timeout)  # of all of it
        self._sock.sendall(data)

    def _receive(self, target: Buffer) -> None:
        deadline, at = time.monotonic() + self._timeout, 0
        while at < len(target):
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            count = self._sock.recv_into(target[at:])
            if not count:
                self._due = 0
                raise ConnectionResetError("the server closed the connection")
            at += count
            if self._due:
                self._due -= min(count, self._due)

    def _answer(self, count: int) -> bytes:
        data = bytearray(count)
        self._receive(memoryview(data))
        return bytes(data)

    def _code(self) -> int:
        return int.from_bytes(self._answer(4), "little")

    def _code_if_any(self) -> int:
        try:
            return self._code()
        except OSError:
            return 0

    @staticmethod
    def _expect(code: int) -> None:
        if code != OK:
            raise TierUnavailable(f"infinistore: the server answers {code}")


def _payload(verb: bytes, name: bytes, length: int) -> bytes:
    """A request about one value: a table of its name, its length and the verb."""
    table = struct.pack("<I5H2xiIib3xI", 16, 10, 16, 4, 8, 12, 12, 12, length, verb[0], len(name))
    body = table + name + bytes(4 - len(name) % 4)
    return _HEAD.pack(_MAGIC, b"L", len(body)) + body


def _names(names: Sequence[bytes]) -> bytes:
    """A table of one field, a vector of strings."""
    count = len(names)
    head = struct.pack("<I3H2xiII", 12, 6, 8, 4, 8, 4, count)
    at, offsets, strings = 4 * count, list[int](), list[bytes]()
    for place, name in enumerate(names):
        offsets.append(at - 4 * place)  # from where the offset itself lies
        strings.append(struct.pack("<I", len(name)) + name + bytes(4 - len(name) % 4))
        at += len(strings[-1])
    return head + struct.pack(f"<{count}I", *offsets) + b"".join(strings)
