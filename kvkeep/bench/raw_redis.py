"""The fastest plain client of a Redis server: what the redis tier is compared with.

One socket, values straight from and into memory that is there already, a few commands on their way at
once; no pool, no errors, no options, no checksums. Reads what it wrote, and compares it.
"""

from __future__ import annotations

import mmap
import socket
import time

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.url import TierURL

__all__ = ["raw_redis"]

_AHEAD = 4  # commands: more were no faster
_OK = b"+OK\r\n"


def raw_redis(url: str, chunk_bytes: int, count: int) -> tuple[float, float]:
    """GB/s (1e9 bytes) of SET and of GET of `count` values, on the server of a redis:// or redis+unix:// URL.

    Raises OSError, or TierUnavailable where the server answers otherwise than it should.
    """
    sock = _connect(TierURL(url))
    names = [b"kvkeep-raw:%08d" % i for i in range(count)]
    sent, back = _memory(chunk_bytes, count, 7), _memory(chunk_bytes, count, 0)
    try:
        began = time.perf_counter()
        _set(sock, names, sent)
        put = time.perf_counter() - began
        began = time.perf_counter()
        _get(sock, names, back)
        get = time.perf_counter() - began
        sock.sendall(b"*%d\r\n$3\r\nDEL\r\n" % (count + 1) + b"".join(map(_word, names)))
        _expect(sock, b":%d\r\n" % count)
    finally:
        sock.close()
    if any(a != b for a, b in zip(sent, back, strict=True)):
        raise TierUnavailable("other bytes came back")
    return chunk_bytes * count / put / 1e9, chunk_bytes * count / get / 1e9


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
