"""Follows engines' KV events over ZMQ, and keeps the index right when some are lost.

Each engine numbers its messages. Where a number is missing, the engine's replay socket is asked for it; what
it cannot give any more is a hole: what the engine held before is then not known, and is cleared. A replay
begins with the last message that was taken: if it is not the same, the engine was started anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.asyncio
from xxhash import xxh3_128_digest
from zmq.utils.monitor import recv_monitor_message

from kvkeep.errors import ConfigError
from kvroute.events import END_SEQUENCE, Batch, Decoder
from kvroute.index import Index
from kvroute.snapshot import Part

__all__ = ["Counters", "Source", "Subscriber", "say_why"]

log = logging.getLogger("kvroute.subscribe")

_QUEUE = 20_000  # messages that wait for us, per engine; ZMQ drops what is more, and we ask for it again
_MOST_BYTES = 64 << 20
_TURN = 0.001  # seconds for messages before others have a turn
_REPLAYS = 20  # a long replay may overflow the sender's queue, and is then asked for again from there


class Source(NamedTuple):
    """Where an engine's events come from; addresses as ZMQ writes them, tcp://host:port.

    `ranks`: of data parallelism; the ports of each are one above those of the rank before. `node`: engines
    with the same share a keeper.
    """

    events: str
    replay: str | None = None
    topic: str = ""
    ranks: int = 1
    node: str | None = None


@dataclass
class Counters:
    """What has happened, over all engines."""

    messages: int = 0
    gaps: int = 0
    replayed: int = 0
    resets: int = 0
    restarts: int = 0
    restored: int = 0


@dataclass
class _Feed:
    """How far one rank of an engine has been followed. `last`: digest of the message before `next`."""

    engine: str
    rank: int = 0
    replay: str | None = None
    next: int = 0
    live: int = -1
    last: bytes | None = None
    saved: list[bytes] = field(default_factory=list)  # parts of a snapshot that may still be true
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Subscriber:
    """Follows engines, on the event loop that owns the index. `replay_wait`: seconds without an answer after
    which a replay is given up."""

    def __init__(self, index: Index, *, replay_wait: float = 3.0) -> None:
        self.counters = Counters()
        self.connected: set[str] = set()  # engines, at least by one of their ranks' events
        self.saved: dict[tuple[str, int], list[bytes]] = {}
        """Of a snapshot with the index's seed, by engine and rank; each is held back until the rank's replay
        has shown that it goes on from there."""
        self.decoder = Decoder()
        self._index, self._replay_wait = index, replay_wait
        self._feeds: dict[str, list[_Feed]] = {}
        self._context = zmq.asyncio.Context(io_threads=1)
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    def follow(self, engine: str, source: Source) -> None:
        """Follow an engine until `leave`. Raises ConfigError on an address that is none."""
        self.leave(engine)
        self._index.place(engine, source.node)
        for rank in range(source.ranks):
            feed = _Feed(engine, rank, source.replay and _of_rank(source.replay, rank))
            if (saved := self.saved.pop((engine, rank), None)) and feed.replay:
                part = _decode(saved[0])
                feed.next, feed.last, feed.saved = part.next, part.last, saved
            self._feeds.setdefault(engine, []).append(feed)
            try:
                self._follow_rank(feed, _of_rank(source.events, rank), source.topic)
            except ConfigError:
                self.leave(engine)
                raise

    def _follow_rank(self, feed: _Feed, events: str, topic: str) -> None:
        sub = self._subscribed(topic)
        what = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor = sub.get_monitor_socket(what)  # before there is one to miss
        try:
            sub.connect(events)
            if feed.replay is not None:
                with self._context.socket(zmq.DEALER) as tried:
                    tried.connect(feed.replay)
        except zmq.ZMQError as error:
            _close(sub, monitor)
            wrong = f"{events} and {feed.replay} are no addresses of events and their replay"
            raise ConfigError(f"{wrong} ({error}): write tcp://HOST:PORT") from error
        task = self._keep(feed.engine, self._follow(feed, sub, monitor))
        task.add_done_callback(lambda _: _close(sub, monitor))  # also where it was ended before it began

    def leave(self, engine: str) -> None:
        """Follow it no more, and forget what it held."""
        for task in self._tasks.pop(engine, []):
            task.cancel()
        self._feeds.pop(engine, None)
        self.connected.discard(engine)
        self._index.place(engine, None)
        self._index.forget(engine)

    async def parts(self) -> list[bytes]:
        """A snapshot of all that can be asked what has happened since; takes turns with all else."""
        found = list[bytes]()
        for feed in [feed for feeds in self._feeds.values() for feed in feeds if feed.replay]:
            found += feed.saved
            if feed.last is not None and not feed.saved:
                for part in self._index.parts(feed.engine, feed.rank, feed.next, feed.last):
                    found.append(msgspec.msgpack.encode(part))
                    await asyncio.sleep(0)
        return found

    def _keep(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"following {name}")
        task.add_done_callback(say_why)
        self._tasks.setdefault(name, []).append(task)
        return task

    def listen(self, address: str, engine_of: Callable[[str], str | None], topic: str = "") -> str:
        """Let engines connect to us; `engine_of` says by a message's topic whose it is, None: nobody's.

        Returns the address, with the port that was chosen. There is no replay here: a gap clears the engine.
        """
        sub = self._subscribed(topic)
        try:
            sub.bind(address)
        except zmq.ZMQError as error:
            sub.close(0)
            raise ConfigError(f"cannot listen for events on {address}: {error}") from error
        self._keep(address, self._collect(sub, engine_of))
        return str(sub.getsockopt_string(zmq.LAST_ENDPOINT))

    async def close(self) -> None:
        """Follow nobody any more."""
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def _subscribed(self, topic: str) -> zmq.asyncio.Socket:
        sub = self._context.socket(zmq.SUB)
        sub.setsockopt(zmq.IPV6, 1)
        sub.setsockopt(zmq.RCVHWM, _QUEUE)
        sub.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        sub.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        sub.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        sub.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)  # while our queue is full, none is heard
        sub.setsockopt_string(zmq.SUBSCRIBE, topic)
        return sub

    async def _follow(self, feed: _Feed, sub: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        watching = asyncio.create_task(self._watch(feed, monitor), name=f"watching {feed.engine}")
        watching.add_done_callback(say_why)
        try:
            async for batch, digest in self._messages(sub):
                async with feed.lock:
                    await self._take(feed, batch, digest)
        finally:
            watching.cancel()

    async def _watch(self, feed: _Feed, monitor: zmq.asyncio.Socket) -> None:
        """After each connection: what was said while there was none?"""
        while True:
            event = await recv_monitor_message(monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self.connected.discard(feed.engine)
                continue
            self.connected.add(feed.engine)
            async with feed.lock:
                await self._catch_up(feed)

    async def _collect(self, sub: zmq.asyncio.Socket, engine_of: Callable[[str], str | None]) -> None:
        feeds = dict[tuple[str, int], _Feed]()
        try:
            async for batch, digest in self._messages(sub):
                if (engine := engine_of(batch.topic)) is not None:
                    feed = feeds.setdefault((engine, batch.rank), _Feed(engine, batch.rank))
                    await self._take(feed, batch, digest)
        finally:
            sub.close(0)

    async def _messages(self, sub: zmq.asyncio.Socket) -> AsyncIterator[tuple[Batch, bytes]]:
        clock = asyncio.get_running_loop().time
        while True:
            until = clock() + _TURN
            while clock() < until:
                frames: list[bytes] = await sub.recv_multipart()
                self.counters.messages += 1
                if (batch := self.decoder.decode(frames)) is not None:
                    yield batch, xxh3_128_digest(frames[2])
            await asyncio.sleep(0)

    async def _take(self, feed: _Feed, batch: Batch, digest: bytes) -> None:
        """A message that was just published."""
        if batch.sequence <= feed.live:
            self._begin_anew(feed)
        feed.live = batch.sequence
        if batch.sequence > feed.next or feed.saved:
            self.counters.gaps += feed.last is not None and not feed.saved
            await self._catch_up(feed)
        if feed.saved:  # still not shown to be true
            feed.next, feed.last, feed.saved = 0, None, []
        if batch.sequence > feed.next and feed.last is not None:
            self._reset(feed)
        if batch.sequence >= feed.next:
            self._apply(feed, batch, digest)

    def _apply(self, feed: _Feed, batch: Batch, digest: bytes) -> None:
        self._index.apply(feed.engine, batch.events, feed.rank)
        feed.next, feed.last = batch.sequence + 1, digest

    def _reset(self, feed: _Feed) -> None:
        self.counters.resets += 1
        feed.saved = []
        self._index.clear(feed.engine, feed.rank)
        log.info("events of %s are lost: what it held is not known any more", feed.engine)

    def _begin_anew(self, feed: _Feed) -> None:
        self.counters.restarts += 1
        self._index.forget(feed.engine, feed.rank)
        feed.next, feed.live, feed.last, feed.saved = 0, -1, None, []
        log.info("%s was started anew: it holds nothing yet", feed.engine)

    async def _catch_up(self, feed: _Feed) -> None:
        """Ask for all that was published after what we have, as far as it can still be had."""
        for _ in range(_REPLAYS):
            before = feed.next, feed.last
            if not await self._replay(feed) or (feed.next, feed.last) == before:
                return

    async def _replay(self, feed: _Feed) -> bool:
        """Take one replay; whether it must be asked again, from where we are then."""
        first = True
        async for batch, digest in self._replayed(feed):
            if batch is None:
                if first and feed.last is not None:  # it has nothing so late: its count began again
                    self._begin_anew(feed)
                    return True
                return False
            if first and feed.last is not None and batch.sequence < feed.next:
                if (batch.sequence, digest) != (feed.next - 1, feed.last):
                    self._begin_anew(feed)
                    return True
                await self._restore(feed)
            elif first and feed.last is not None:  # it does not reach back so far
                self._reset(feed)
                self._apply(feed, batch, digest)
            elif batch.sequence > feed.next and feed.last is not None:  # its queue was full here
                return True
            elif batch.sequence >= feed.next:
                self._apply(feed, batch, digest)
            first = False
            self.counters.replayed += 1
        return False

    async def _restore(self, feed: _Feed) -> None:
        """What the snapshot says was so, and what came after follows now."""
        for part in map(_decode, feed.saved):
            self._index.restore(part)
            self.counters.restored += len(part.names) - part.media.count(0)
            await asyncio.sleep(0)
        feed.saved = []

    async def _replayed(self, feed: _Feed) -> AsyncIterator[tuple[Batch | None, bytes]]:
        """What an engine has kept, from our last message on; (None, b"") at its end, where it answers."""
        if feed.replay is None:
            return
        start = max(0, feed.next - 1)
        ask = self._context.socket(zmq.DEALER)
        ask.setsockopt(zmq.IPV6, 1)
        ask.setsockopt(zmq.RCVHWM, 0)
        ask.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        try:
            ask.connect(feed.replay)
            await ask.send_multipart([b"", start.to_bytes(8, "big")])
            clock = asyncio.get_running_loop().time
            while await ask.poll(int(1000 * self._replay_wait)):
                until = clock() + _TURN
                while clock() < until:
                    frames: list[Any] = await ask.recv_multipart()
                    if len(frames) < 3:
                        return
                    if frames[-2] == END_SEQUENCE:
                        yield None, b""
                        return
                    if (batch := self.decoder.decode([b"", *frames[-2:]])) is not None:
                        yield batch, xxh3_128_digest(frames[-1])
                    if not int(ask.get(zmq.EVENTS)) & zmq.POLLIN:
                        break
                await asyncio.sleep(0)
        except zmq.ZMQError as error:
            log.warning("no replay from %s: %s", feed.replay, error)
        finally:
            ask.close(0)


_decode = msgspec.msgpack.Decoder(Part).decode


def say_why(task: asyncio.Task[None]) -> None:
    """For a task that goes on until it is cancelled: where it ends before, say so."""
    if not task.cancelled() and (error := task.exception()):
        log.error("%s has ended: %s", task.get_name(), error, exc_info=error)


def _of_rank(address: str, rank: int) -> str:
    """As vLLM's `offset_endpoint_port`."""
    base, _, port = address.rpartition(":")
    return f"{base}:{int(port) + rank}" if rank and base.startswith("tcp") and port.isdecimal() else address


def _close(sub: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
    sub.disable_monitor()
    monitor.close(0)
    sub.close(0)
