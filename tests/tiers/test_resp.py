"""A server that answers anything at all: never a crash, a hang, or a byte in the wrong place."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("redis", reason="needs redis-py: pip install 'kvkeep[redis]'")

from redis.exceptions import ResponseError

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Got, Put
from kvkeep.tiers.resp import OutOfStep, Reader, Refusal, Request, command, exchange
from tests.tiers.place import PAGE, buffers_of, closing, keys_of, open_at
from tests.tiers.redis_server import patiently

Answer = Callable[[list[bytes]], bytes | None]


class Fake:
    """Speaks enough Redis to be opened; then gives the bytes of `answer`; None ends the connection."""

    def __init__(self) -> None:
        self.answer: Answer = lambda words: b":0\r\n"
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}?timeout=200ms"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as file, contextlib.suppress(OSError, ValueError):
            while head := file.readline():
                words = []
                for _ in range(int(head[1:])):
                    words.append(file.read(int(file.readline()[1:]) + 2)[:-2])
                reply = b"-ERR unknown\r\n" if words[0] in (b"CLIENT", b"CONFIG") else self.answer(words)
                if reply is None:
                    return
                sock.sendall(reply)


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    yield fake
    fake.close()


def frame(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


VALUE = bytes(range(256)) * 16
NONSENSE = [
    b"",
    b"x",
    b"\r\n",
    b"\0" * 5000,
    b"$" * 5000,
    b"$4096",
    b"$4096\r\n",
    b"$4096\r\n" + VALUE[:100],
    b"$4096\r\n" + VALUE,
    b"$4096\r\n" + VALUE + b"xx",
    b"$-2\r\n",
    b"$+5\r\nabcde\r\n",
    b"$\r\n\r\n",
    b"$4_0_9_6\r\n" + VALUE,
    b"$ 4096\r\n" + VALUE,
    b"$600000000\r\n",
    b"$99999999999999999999999999\r\n",
    b"$1099511627776\r\nabc",
    b"*3\r\n:1\r\n",
    b"*1000000000\r\n",
    b"+OK",
    b"+NO\r\n",
    b":12a\r\n",
    b":\r\n",
    b"!3\r\nabc\r\n",
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x0a",
    b"-" + b"E" * 5000 + b"\r\n",
    "-ERR \udcff\r\n".encode("utf-8", "surrogatepass"),
    b"-\r\n",
    b"-MOVED\r\n",
    b"-MOVED 3999 nowhere\r\n",
    b"-ASK 3999 127.0.0.1:99999\r\n",
    b"-ASK\r\n",
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-NOAUTH Authentication required.\r\n",
    b"-CLUSTERDOWN The cluster is down\r\n",
]


@pytest.mark.parametrize("reply", NONSENSE, ids=lambda reply: repr(reply[:20]))
def test_nonsense_makes_the_tier_unavailable_and_is_forgotten(fake: Fake, reply: bytes) -> None:
    with closing(open_at(fake.url)) as tier:
        keys, sent, back = keys_of(2), buffers_of([PAGE] * 2, 1), buffers_of([3 * PAGE] * 2)
        inner = [buffer[PAGE : 2 * PAGE] for buffer in back]
        for verb in (
            lambda: tier.get(keys, inner),
            lambda: tier.put(keys, sent),
            lambda: tier.contains(keys),
            lambda: list(tier.keys()),
        ):
            fake.answer = lambda _: reply
            began = time.monotonic()
            with pytest.raises(TierUnavailable):
                verb()
            assert time.monotonic() - began < 2
            for buffer in back:
                assert not any(buffer[:PAGE])
                assert not any(buffer[2 * PAGE :])
            # What the connection still had to say is not taken for the next reply.
            fake.answer = lambda _: frame(VALUE)
            assert patiently(lambda: tier.get(keys, inner)) == [Got.HIT] * 2
            assert all(buffer == VALUE for buffer in inner)
        fake.answer = lambda _: reply
        assert tier.usage().used_bytes is None


@pytest.mark.parametrize("reply", NONSENSE, ids=lambda reply: repr(reply[:20]))
def test_nonsense_at_the_start_is_a_config_error(fake: Fake, reply: bytes) -> None:
    fake.answer = lambda _: reply
    for options in ("", "&sentinel=kv", "&cluster=yes"):
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1"):
            open_at(fake.url + options)
        assert time.monotonic() - began < 2
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1"):
        open_at(fake.url.replace("redis://", "redis://:password@"))


def test_a_server_that_drips_is_given_up(fake: Fake) -> None:
    """A byte now and then is not progress: a reply has its time, however it comes."""
    with closing(open_at(fake.url)) as tier:
        sockets: list[socket.socket] = []

        def drip(listener: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sockets.append(sock)
                    threading.Thread(target=drop, args=(sock,), daemon=True).start()

        def drop(sock: socket.socket) -> None:
            with contextlib.suppress(OSError):
                for byte in b"$4096\r\n" + VALUE:
                    sock.sendall(bytes([byte]))
                    time.sleep(0.02)

        fake.close()
        port = int(re.search(r":(\d+)\?", fake.url)[1])
        tier._pool.flush()
        with socket.create_server(("127.0.0.1", port)) as listener:
            threading.Thread(target=drip, args=(listener,), daemon=True).start()
            began = time.monotonic()
            with pytest.raises(TierUnavailable):
                tier.get(keys_of(1), buffers_of([PAGE]))
            assert time.monotonic() - began < 1.5
            listener.shutdown(socket.SHUT_RDWR)
        for sock in sockets:
            sock.close()


def test_errors_mean_what_they_say(fake: Fake) -> None:
    keys, sent = keys_of(1), buffers_of([PAGE], 1)
    with closing(open_at(fake.url)) as tier:
        for error, put in ((b"OOM no", Put.REFUSED), (b"MISCONF disk", Put.REFUSED), (b"ERR so", None)):
            fake.answer = lambda _, error=error: b"-%s\r\n" % error
            if put is None:
                with pytest.raises(TierUnavailable, match="ERR so"):
                    tier.put(keys, sent)
            else:
                assert tier.put(keys, sent) == [put]
            with pytest.raises(TierUnavailable, match=error.decode()):
                tier.get(keys, sent)
        before = fake.connections
        for again in (b"LOADING Redis is loading", b"READONLY You can't write", b"NOAUTH"):
            replies = [b"-%s\r\n" % again, b"+OK\r\n"]
            fake.answer = lambda _, replies=replies: replies.pop(0)
            if again == b"NOAUTH":
                with pytest.raises(TierUnavailable, match="NOAUTH"):
                    tier.put(keys, sent)
            else:  # tried once more, over a new connection: the name may stand for another server now
                assert tier.put(keys, sent) == [Put.STORED]
        assert fake.connections == before + 2


def test_a_pipelined_reply_that_is_missing_loses_only_the_batch(fake: Fake) -> None:
    with closing(open_at(fake.url)) as tier:
        keys, back = keys_of(40), buffers_of([PAGE] * 40)
        served = iter(range(25))
        fake.answer = lambda _: frame(VALUE) if next(served, None) is not None else None
        with pytest.raises(TierUnavailable, match=r"closed the connection|reset"):
            tier.get(keys, back)
        fake.answer = lambda _: frame(VALUE)
        assert tier.get(keys, back) == [Got.HIT] * 40


# The reader by itself, over any cut of any bytes

replies = st.one_of(
    st.binary(max_size=300).map(frame),
    st.just(b"$-1\r\n"),
    st.sampled_from([b"-WRONGTYPE no\r\n", b"-ERR x\r\n"]),
    st.just(frame(b"v" * 200)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(replies, min_size=1, max_size=8), st.binary(max_size=30), st.data())
def test_values_are_right_however_they_arrive(stream: list[bytes], tail: bytes, data: st.DataObject) -> None:
    whole = b"".join(stream) + tail
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    with connected() as (reader, far):
        writer = threading.Thread(target=write, args=(far, whole, cuts))
        writer.start()
        for reply in stream:
            room = bytearray(600)
            reader.start()
            got = reader.value(memoryview(room)[200:400])
            if reply == b"$-1\r\n":
                assert got is Got.MISS
            elif reply[:1] == b"-":
                assert got == Refusal(reply[1:-2].decode())
            elif reply == frame(reply[-202:-2]):
                assert got is Got.HIT
                assert room[200:400] == reply[-202:-2]
            else:
                assert got is Got.DAMAGED
                assert not any(room[200:400])
            assert not any(room[:200])
            assert not any(room[400:])
        writer.join()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_reply_or_an_error(junk: bytes, value: bool) -> None:
    with connected() as (reader, far):
        far.sendall(junk)
        far.shutdown(socket.SHUT_WR)
        room = bytearray(100)
        with contextlib.suppress(OSError, OutOfStep):
            for _ in range(50):
                reader.start()
                reply = reader.value(memoryview(room)[20:80]) if value else reader.read_response()
                assert value or isinstance(reply, bytes | int | list | ResponseError | None)
        assert not any(room[:20])
        assert not any(room[80:])


def test_a_batch_of_replies_that_each_come_just_in_time_ends(fake: Fake) -> None:
    answered, pause = [], threading.Event()

    def slowly(words: list[bytes]) -> bytes:
        if words[0] == b"GET":
            pause.wait(0.15)
            answered.append(words)
            return frame(bytes(PAGE))
        return b":0\r\n"

    with closing(open_at(fake.url)) as tier:
        fake.answer = slowly
        with pytest.raises(TierUnavailable, match="too slow"):
            tier.get(keys_of(40), buffers_of([PAGE] * 40))
    assert 2 <= len(answered) <= 8


def test_a_window_is_bounded_and_moves() -> None:
    """No more than some MiB are asked for at once, and never none."""
    with connected() as (reader, far):
        asked, done = [], []

        def request(n: int) -> Request:
            asked.append(n)
            return Request([command(b"GET", b"%d" % n)], (3 << 20) if n < 10 else 1)

        def read(n: int) -> None:
            done.append(len(asked))
            assert reader.status() == n

        def serve() -> None:
            file = far.makefile("rb")
            for n in range(200):
                assert file.read(len(command(b"GET", b"%d" % n)))
                far.sendall(b":%d\r\n" % n)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        exchange(reader, 200, request, read)
        thread.join(5)
        assert asked == list(range(200))
        assert done[0] == 3
        assert all(n < ahead <= n + 64 for n, ahead in enumerate(done))
        assert done[-1] == 200
        assert len(set(done)) < 20  # small ones are sent together


@contextlib.contextmanager
def connected() -> Iterator[tuple[Reader, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(2)
        reader = Reader(2)
        reader.on_connect(type("Connection", (), {"_sock": near}))
        yield reader, far


def write(sock: socket.socket, whole: bytes, cuts: list[int]) -> None:
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        sock.sendall(whole[begin:end])
        time.sleep(0.0002)
