"""A publisher of KV events as vLLM's is: PUB, a ROUTER that replays a bounded buffer, faults on demand."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

import zmq

from kvroute.events import END_SEQUENCE, Event, pack


class Publisher:
    """One engine's. Nothing happens by itself: `publish` sends, `serve` answers replay requests."""

    def __init__(
        self, buffer: int = 10_000, port: int = 0, replay_port: int = 0, topic: str = "", rank: int = 0
    ) -> None:
        self._context = zmq.Context()
        self.pub = self._bound(zmq.PUB, f"tcp://127.0.0.1:{port}")
        self.router = self._bound(zmq.ROUTER, f"tcp://127.0.0.1:{replay_port}")
        self.buffer: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=buffer)
        self.topic, self.rank, self.sequence, self.asked = topic, rank, 0, 0
        self.skip: set[int] = set()
        """Messages that a replay leaves out, once each: what an overflow of its queue does."""

    @property
    def events(self) -> str:
        return self.pub.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay(self) -> str:
        return self.router.getsockopt_string(zmq.LAST_ENDPOINT)

    def publish(self, *events: Event, lost: bool = False) -> None:
        """Send one message, or have it lost on the way."""
        frames = pack(self.topic, self.sequence, 1.0 + self.sequence, list(events), self.rank)
        if not lost:
            self.pub.send_multipart(frames)
        self.buffer.append((self.sequence, frames[2]))
        self.sequence += 1

    def serve(self) -> None:
        """Answer what was asked for so far."""
        while self.router.poll(0):
            client, empty, start = self.router.recv_multipart()
            self.asked += 1
            for sequence, payload in self.buffer:
                if sequence in self.skip:
                    self.skip.discard(sequence)
                elif sequence >= int.from_bytes(start, "big"):
                    frames = (client, empty, self.topic.encode(), sequence.to_bytes(8, "big"), payload)
                    self.router.send_multipart(frames)
            self.router.send_multipart((client, empty, b"", END_SEQUENCE, b""))

    def drop_connections(self) -> None:
        """The network is gone."""
        self.pub.close(0)

    def accept_connections(self, address: str) -> None:
        """And is back."""
        self.pub = self._bound(zmq.PUB, address)

    def _bound(self, kind: int, address: str) -> zmq.Socket[bytes]:
        """A socket there; an earlier one may take a moment to be gone."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)
        for _ in range(500):
            with contextlib.suppress(zmq.ZMQError):
                socket.bind(address)
                return socket
            time.sleep(0.01)
        raise AssertionError(f"{address} stays in use")

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextlib.contextmanager
def publisher(**more: int | str) -> Iterator[Publisher]:
    one = Publisher(**more)
    try:
        yield one
    finally:
        one.close()
