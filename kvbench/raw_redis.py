"""The fastest plain client of a Redis server: what the redis tier is compared with.

One socket, values straight from and into memory that is there already, a few commands on their way at
once; no pool, no errors, no options, no checksums. Reads what it wrote, and compares it.
"""

from __future__ import annotations

import mmap
import socket
import time

from kvbench.raw import Raw
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.url import TierURL

__all__ = ["RedisSocket"]

_AHEAD = 4  # commands: more were no faster
_OK = b"+OK\r\n"


class RedisSocket(Raw):
    """Verbs move `count` values of `chunk_bytes` bytes, and return the seconds that it took.

    They raise OSError, or TierUnavailable where the server answers otherwise than it should.
    """

    name = f"one socket, {_AHEAD} commands ahead, recv_into, sendall"

    def __init__(self, url: TierURL, chunk_bytes: int, count: int) -> None:
        """`url`: redis:// or redis+unix://, of one server."""
        self._sock = _connect(url)
        self._names = [b"kvkeep-raw:%08d" % i for i in range(count)]
        self._sent, self._back = _memory(chunk_bytes, count, 7), _memory(chunk_bytes, count, 0)

    def put(self) -> float:
        began = time.perf_counter()
        _set(self._sock, self._names, self._sent)
        return time.perf_counter() - began

    def get(self) -> float:
        """Of what was put; compared, which is not timed."""
        for buffer in self._back:
            buffer[:8] = bytes(8)
        began = time.perf_counter()
        _get(self._sock, self._names, self._back)
        took = time.perf_counter() - began
        if self._sent != self._back:
            raise TierUnavailable("other bytes came back")
        return took

    def forget(self) -> None:
        words = b"".join(map(_word, self._names))
        self._sock.sendall(b"*%d\r\n$3\r\nDEL\r\n" % (len(self._names) + 1) + words)
        line = self._sock.recv(64)
        if line[:1] != b":":
            raise TierUnavailable(f"the server answers {line!r} to DEL")

    def close(self) -> None:
        self.forget()
        self._sock.close()


def _set(sock: socket.socket, names: list[bytes], values: list[memoryview]) -> None:
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        sock.sendall(b"*3\r\n$3\r\nSET\r\n%s$%d\r\n" % (_word(name), len(value)))
        sock.sendall(value)
        sock.sendall(b"\r\n")
        if i >= _AHEAD:
            _expect(sock, _OK)
    for _ in range(min(_AHEAD, len(names))):
        _expect(sock, _OK)


def _get(sock: socket.socket, names: list[bytes], buffers: list[memoryview]) -> None:
    requests = [b"*2\r\n$3\r\nGET\r\n" + _word(name) for name in names]
    sock.sendall(b"".join(requests[:_AHEAD]))
    for i, buffer in enumerate(buffers):
        _expect(sock, b"$%d\r\n" % len(buffer))
        done = 0
        while done < len(buffer):
            done += sock.recv_into(buffer[done:]) or _lost()
        if i + _AHEAD < len(requests):
            sock.sendall(requests[i + _AHEAD])
        _expect(sock, b"\r\n")


def _expect(sock: socket.socket, what: bytes) -> None:
    got = sock.recv(len(what), socket.MSG_WAITALL)
    if got != what:
        raise TierUnavailable(f"the server answers {got!r}, not {what!r}")


def _lost() -> int:
    raise ConnectionResetError("the server closed the connection")


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


def _memory(chunk_bytes: int, count: int, fill: int) -> list[memoryview]:
    """Buffers in one mapping whose pages are all there, each with a number of its own in it."""
    memory = memoryview(mmap.mmap(-1, chunk_bytes * count))
    for at in range(0, len(memory), 512):
        memory[at] = fill
    for i in range(count if fill else 0):
        memory[i * chunk_bytes : i * chunk_bytes + 8] = i.to_bytes(8, "little")
    return [memory[i * chunk_bytes : (i + 1) * chunk_bytes] for i in range(count)]


def _connect(url: TierURL) -> socket.socket:
    if url.scheme == "redis+unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(url.path)
    else:
        sock = socket.create_connection((url.host, url.port or 6379))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if url.password:
        words = [b"AUTH", *([url.user.encode()] if url.user else []), url.password.encode()]
        sock.sendall(b"*%d\r\n" % len(words) + b"".join(map(_word, words)))
        _expect(sock, _OK)
    return sock
