"""RESP2 over one connection, with bulk values straight from and to the caller's memory.

redis-py dials, does TLS and shakes hands. It reads through `Reader`, its `parser_class`, which reads
values into given buffers besides, and believes nothing that a server says: every reply is bounded in
bytes and in time, and what is not RESP2 is OutOfStep, after which the connection is of no use.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from redis.exceptions import ResponseError

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Buffer, Got

__all__ = ["MAX_VALUE_BYTES", "OutOfStep", "Reader", "Refusal", "Request", "command", "exchange"]

MAX_VALUE_BYTES = 512 << 20
"""Longest value of a server with default settings (its proto-max-bulk-len)."""
_BUFFER_BYTES = 4096
_SPARE_BYTES = 64 << 10  # what nobody asked for is read into this much memory
_MAX_TEXT, _MAX_ITEMS, _MAX_DEPTH = 1 << 20, 1 << 17, 4  # of replies other than values: INFO, CLUSTER SLOTS
_WINDOW_REQUESTS, _WINDOW_BYTES = 64, 8 << 20  # on their way at once, over all connections of a batch
_BATCH_TIMEOUTS = 4.0  # one batch may take so many times the timeout of a reply
_SEND_BYTES = 64 << 10  # small requests are sent together
_CRLF, _SLOW = b"\r\n", "the server is too slow"

Part: TypeAlias = bytes | Buffer


class OutOfStep(TierUnavailable):
    """What the server sent is not a reply to what it was asked."""


class Refusal(NamedTuple):
    """An error that the server gave for one request; the connection is in step."""

    text: str

    @property
    def code(self) -> str:
        """Its first word: MOVED, OOM, WRONGTYPE, …"""
        return self.text.partition(" ")[0]


class Request(NamedTuple):
    """One command, ready to be sent."""

    parts: list[Part]
    weight: int
    """Bytes of the request or of its reply, the larger."""


def command(*words: bytes) -> bytes:
    """A command of short words as RESP."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Reader:
    """Parser of one redis-py connection, and more. Each reply is read within `timeout` seconds.

    Raises OSError where the connection is lost or too slow, OutOfStep where what comes is no reply.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._deadline = timeout, 0.0
        self._sock: Any = None  # a socket.socket or an ssl.SSLSocket, of the connection
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0

    # What redis-py asks of a parser

    def adopt(self, **_: Any) -> Reader:
        """Itself: what redis-py calls as if it were the parser's class."""
        return self

    def on_connect(self, connection: Any) -> None:
        self._sock, self._begin, self._end = connection._sock, 0, 0  # as its own parsers do
        if not isinstance(self._sock, ssl.SSLSocket):  # whose library takes such a timeout for "try again"
            # The kernel's timeouts: with Python's each call is two, and a value takes many.
            span = struct.pack("ll", *divmod(int(self._timeout * 1e6) or 1, 10**6))
            self._sock.settimeout(None)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._sock.setsockopt(socket.SOL_SOCKET, option, span)

    def on_disconnect(self) -> None:
        self._sock = None

    def can_read(self, timeout: float = 0.0) -> bool:
        """Whether a byte, or the connection's end, is there to be read."""
        if self._sock is None or self._begin < self._end:
            return True
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def read_response(self, *_: Any, **__: Any) -> Any:
        """A whole reply: bytes, int, None, a list, or a ResponseError."""
        self.start()
        found = self._reply(_MAX_DEPTH)
        return ResponseError(found.text) if isinstance(found, Refusal) else found

    # What the tier asks

    def start(self, until: float = math.inf) -> None:
        """The next reply's time begins now; it ends at `until` at the latest."""
        self._deadline = min(time.monotonic() + self._timeout, until)

    def batch(self) -> float:
        """When a batch that begins now has taken too long."""
        return time.monotonic() + _BATCH_TIMEOUTS * self._timeout

    def send(self, parts: list[Part]) -> None:
        """Send all parts, without copying them where the wire is not encrypted."""
        if isinstance(self._sock, ssl.SSLSocket):
            for part in parts:
                self._sock.sendall(part)
            return
        deadline = time.monotonic() + self._timeout
        with _in_time():
            sent = self._sock.sendmsg(parts)
            for part in parts:
                while sent < len(part):  # it was cut short by a signal, or by the timeout
                    if time.monotonic() > deadline:
                        raise TimeoutError(_SLOW)
                    sent += self._sock.send(memoryview(part)[sent:])
                sent -= len(part)

    def status(self) -> int | Refusal:
        """A reply that is OK (1), a number, or an error."""
        line = self._line()
        if line == b"+OK":
            return 1
        if line[:1] == b":":
            return _number(line)
        return _refusal(line)

    def value(self, buffer: Buffer) -> Got | Refusal:
        """A reply that is a value: into `buffer`, if it is as long; nothing outside it is written."""
        # Only as much as the head of the value that is hoped for: the value itself then goes
        # straight to its place, all of it, and at the alignment that the buffer has.
        line = self._line(3 + len(str(len(buffer))))
        if line == b"$-1":
            return Got.MISS
        if line[:1] != b"$":
            return _refusal(line)
        length = _number(line)
        if length > MAX_VALUE_BYTES:
            raise OutOfStep(f"the server announces a value of {length} bytes")
        if length == len(buffer):
            self._fill(buffer, ends=True)
        else:
            self._skip(length)
        if self._take(2) != _CRLF:
            raise OutOfStep("a value does not end where it should")
        return Got.HIT if length == len(buffer) else Got.DAMAGED

    def _reply(self, depth: int) -> Any:
        line = self._line()
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b":":
            return _number(line)
        if line in (b"$-1", b"*-1"):
            return None
        if kind == b"$":
            length = _number(line)
            if length > _MAX_TEXT:
                raise OutOfStep(f"the server announces a text of {length} bytes")
            text = self._take(length + 2)
            if text[-2:] != _CRLF:
                raise OutOfStep("a text does not end where it should")
            return text[:-2]
        if kind == b"*":
            items = _number(line)
            if items > _MAX_ITEMS or depth == 0:
                raise OutOfStep(f"the server announces a list of {items} items")
            return [self._reply(depth - 1) for _ in range(items)]
        return _refusal(line)

    def _line(self, most: int = _BUFFER_BYTES) -> bytes:
        """The next line without its end; reads at most so many bytes ahead, if they hold a line."""
        while (at := self._buffer.find(_CRLF, self._begin, self._end)) < 0:
            have = self._end - self._begin
            if have == _BUFFER_BYTES:
                raise OutOfStep("the server sends a line that does not end")
            self._view[:have] = bytes(self._view[self._begin : self._end])
            self._begin, self._end = 0, have
            stop = most if have < most else _BUFFER_BYTES
            self._end += self._receive(self._view[have:stop])
        line, self._begin = bytes(self._view[self._begin : at]), at + 2
        return line

    def _take(self, count: int) -> bytes:
        """The next bytes, as a copy."""
        if self._end - self._begin >= count:
            taken, self._begin = bytes(self._view[self._begin : self._begin + count]), self._begin + count
            return taken
        out = bytearray(count)
        self._fill(memoryview(out))
        return bytes(out)

    def _fill(self, target: Buffer, ends: bool = False) -> None:
        """The next bytes into all of `target`; of a value (`ends`) the line's end behind it as well."""
        done = min(self._end - self._begin, len(target))
        target[:done] = self._view[self._begin : self._begin + done]
        self._begin += done
        if done < len(target):
            self._begin = self._end = 0
        end = None if isinstance(self._sock, ssl.SSLSocket) else self._view[: 2 * ends]
        while done < len(target):
            done += self._receive(target[done:], end)
        self._end += done - len(target)

    def _skip(self, count: int) -> None:
        spare = memoryview(bytearray(min(count, _SPARE_BYTES)))
        while count:
            self._fill(spare[: min(count, len(spare))])
            count -= min(count, len(spare))

    def _receive(self, target: Buffer, end: Buffer | None = None) -> int:
        """Some bytes into `target`; with `end`, as many as come in time, those behind `target` into it."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(_SLOW)
        with _in_time():
            if end is None:
                count = int(self._sock.recv_into(target))
            else:  # one call for a value, without a turn at the interpreter for each piece of it
                count = int(self._sock.recvmsg_into([target, end], 0, socket.MSG_WAITALL)[0])
        if count == 0:
            raise ConnectionResetError("the server closed the connection")
        return count


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:  # the kernel's timeout
        raise TimeoutError(_SLOW) from error


def exchange(
    reader: Reader, count: int, request: Callable[[int], Request], read: Callable[[int], None], ways: int = 1
) -> None:
    """Send `count` requests, each made just before it goes, and call `read` for the reply to each, in order.
    `ways`: connections that share this batch, and its window.

    Requests go ahead of replies, so that neither side waits for the other, but only so many: a server
    keeps replies that nobody takes in its own memory, and evicts values for them.
    """
    weights: list[int] = []
    ahead, window, until = 0, _WINDOW_BYTES // ways, reader.batch()
    for done in range(count):
        parts: list[Part] = []
        low = len(weights) - done <= _WINDOW_REQUESTS // 2 and ahead <= window // 2
        while low and len(weights) < min(count, done + _WINDOW_REQUESTS) and ahead < window:
            made = request(len(weights))
            parts += made.parts
            weights.append(made.weight)
            ahead += made.weight
            if sum(map(len, parts)) >= _SEND_BYTES:  # the server works on it while the next one is made
                reader.send(parts)
                parts = []
        if parts:
            reader.send(parts)
        reader.start(until)
        read(done)
        ahead -= weights[done]


def _number(line: bytes) -> int:
    if not (line[1:].isdigit() and len(line) <= 20):
        raise OutOfStep(f"not a number: {line[:40]!r}")
    return int(line[1:])


def _refusal(line: bytes) -> Refusal:
    if line[:1] != b"-":
        raise OutOfStep(f"not the reply that was asked for: {line[:40]!r}")
    return Refusal(line[1:].decode(errors="replace"))
