"""The fastest plain client of a Redis server: what the redis tier is compared with.

A few sockets, each with a thread, values straight from and into memory that is there already, a few commands
on their way at once; no pool, no errors, no options, no checksums. Reads what it wrote, and compares it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvbench.memory import Bed
from kvbench.raw import Raw
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.url import TierURL

__all__ = ["WAYS", "RedisSockets"]

WAYS = (1, 2, 4, 8)
"""Numbers of sockets to try: which is fastest depends on the server, and on the cores beside it."""
_AHEAD = 4  # commands: more were no faster
_OK = b"+OK\r\n"


class RedisSockets(Raw):
    """Verbs move the bed's chunks over `ways` sockets, and return the seconds that it took.

    They raise OSError, or TierUnavailable where the server answers otherwise than it should.
    """

    def __init__(self, url: TierURL, bed: Bed, ways: int) -> None:
        """`url`: redis:// or redis+unix://, of one server."""
        self.name = f"{ways} sockets, {_AHEAD} commands ahead, recv_into, sendmsg"
        self._bed, self._socks = bed, [_connect(url) for _ in range(ways)]
        self._threads = ThreadPoolExecutor(ways)
        self._names = [b"kvkeep-raw:%08d" % number for number in range(bed.count)]

    def put(self) -> float:
        return self._each(_set, self._bed.sent)

    def get(self) -> float:
        """Of what was put; compared, which is not timed."""
        self._bed.spoil()
        took = self._each(_get, self._bed.back)
        if not self._bed.whole():
            raise TierUnavailable("other bytes came back")
        return took

    def forget(self) -> None:
        words = b"".join(map(_word, self._names))
        self._socks[0].sendall(b"*%d\r\n$3\r\nDEL\r\n" % (len(self._names) + 1) + words)
        line = self._socks[0].recv(64)
        if line[:1] != b":":
            raise TierUnavailable(f"the server answers {line!r} to DEL")

    def close(self) -> None:
        self.forget()
        self._threads.shutdown()
        for sock in self._socks:
            sock.close()

    def _each(
        self, verb: Callable[[socket.socket, list[bytes], list[memoryview]], None], chunks: list[memoryview]
    ) -> float:
        ways, began = len(self._socks), time.perf_counter()
        shares = [(sock, self._names[way::ways], chunks[way::ways]) for way, sock in enumerate(self._socks)]
        list(self._threads.map(verb, *zip(*shares, strict=True)))
        return time.perf_counter() - began


def _set(sock: socket.socket, names: list[bytes], values: list[memoryview]) -> None:
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        head = b"*3\r\n$3\r\nSET\r\n%s$%d\r\n" % (_word(name), len(value))
        if sock.sendmsg([head, value, b"\r\n"]) != len(head) + len(value) + 2:
            raise TierUnavailable("a blocking socket took only a part")
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
