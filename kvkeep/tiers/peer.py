"""Chunks in the memory of another host's keeper, read from it: `peer://host:port`.

The other keeper serves them with `--peers` (`wire/peers.py`). It is asked and read, never written to: what
it holds is what its engines save. Values come straight into the caller's memory, over a few TCP connections
or, with `transport=nixl`, by NIXL.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from kvkeep.errors import ConfigError, ProtocolError, TierUnavailable
from kvkeep.tiers import peer_wire as wire
from kvkeep.tiers.base import Buffer, Capabilities, Got, Key, Put, Tier
from kvkeep.tiers.landing import groups
from kvkeep.tiers.peer_batch import BUSY, Batch, Reads
from kvkeep.tiers.peer_nixl import Agent, allow
from kvkeep.tiers.peer_wire import PORT, Channel
from kvkeep.tiers.pool import Pool
from kvkeep.tiers.threads import Threads
from kvkeep.tiers.url import TierURL
from kvkeep.tls import client_context

__all__ = ["Address", "PeerTier", "open_peer"]

log = logging.getLogger("kvkeep.tiers")

_GROUP = 8 << 20  # bytes of one request: what the other keeper leases at a time
_READ = 16 << 20  # the same where NIXL reads: more at a time
_AHEAD = 2  # requests on their way: while one is answered the other one is there already
_CONNECT_SECONDS = 1.0  # a host that is gone does not refuse: it says nothing
_GREET_SECONDS = 2.0  # at the start, which a peer that hangs must not hold up
_QUESTIONS = 2  # connections besides, so that no question waits behind values


class Address(NamedTuple):
    """A peer, and how to speak to it."""

    host: str
    port: int
    token: bytes = b""
    tls: ssl.SSLContext | None = None

    def connect(self, timeout: float) -> Channel:
        """A new connection, to be greeted. Raises OSError."""
        address, soon = (self.host, self.port), min(timeout, _CONNECT_SECONDS)
        sock: socket.socket = socket.create_connection(address, soon)
        sock.settimeout(timeout)
        try:
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_hostname=self.host)
        except OSError:
            sock.close()
            raise
        return Channel(sock, timeout)

    def dial(self, timeout: float) -> Channel:
        """A new connection, greeted. Raises OSError, or Refused with what to do."""
        channel = self.connect(timeout)
        try:
            wire.greet(channel, self.token)
        except (OSError, ProtocolError):
            channel.close()
            raise
        return channel


class _Seats(NamedTuple):
    """Connections that threads take turns with, and how many more of them may be in use."""

    pool: Pool[Address, Channel]
    free: threading.Semaphore


class PeerTier(Tier):
    """One peer, over `connections` connections. Owns them and its threads; dials when it needs one."""

    def __init__(self, address: Address, timeout: float, connections: int, device: str | None = None) -> None:
        """`device`: of the network, over which NIXL reads; None: values come over the connections."""
        self._address, self._timeout, self._device = address, timeout, device
        self._agent: Agent | None = None
        self._met: tuple[Channel, str] | None = None
        self._threads = Threads(connections, "kvkeep-peer")
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="kvkeep-peer-check")
        self._width = connections
        self._questions, self._values = (
            _Seats(Pool(lambda to: to.connect(timeout), count), threading.Semaphore(count))
            for count in (_QUESTIONS, connections)
        )

    capabilities = Capabilities(shared=True, persistent=False, readonly=True, live=True)
    overlaps = True

    def attach(self, memory: Buffer) -> None:
        """Register it with NIXL, where that is to be used; it must stay mapped."""
        if self._device is not None:
            try:
                self._agent = Agent(memory, self._device)
            except ConfigError as error:
                log.warning("%s; the peer is read over TCP", error)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        held = bytearray()
        if not keys:
            return []
        with self._channel(self._questions) as channel:
            for at in range(0, len(keys), wire.MOST_KEYS):
                some = keys[at : at + wire.MOST_KEYS]
                channel.send(wire.Have(b"".join(some)))
                found = channel.reply(wire.Held).held
                if len(found) != len(some):
                    raise ProtocolError(f"{len(found)} answers to {len(some)} questions")
                held += found
        return [bool(byte) for byte in held]

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        """As the interface says; a value that the peer has no leave to lend just now is a MISS."""
        results: list[Got | int] = [BUSY] * len(keys)
        agent = self._agent
        nixl = agent is not None and all(map(agent.has, buffers))
        left = list(range(len(keys)))
        while left:
            self._round(left, Batch(keys, buffers, results, self.check_value, nixl))
            busy = [place for place in left if results[place] == BUSY]
            if len(busy) == len(left):
                break
            left = busy
        return [result if isinstance(result, Got) else Got.MISS for result in results]

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """All REFUSED: a peer's engines save what it holds."""
        return [Put.REFUSED] * len(keys)

    def delete(self, keys: Sequence[Key]) -> None:
        """Nothing: what is damaged on the way is whole over there."""

    def close(self) -> None:
        for seats in (self._questions, self._values):
            seats.pool.close()
        self._threads.close(wait_for_it=False)
        self._checks.shutdown(wait=False)

    def _round(self, left: list[int], batch: Batch) -> None:
        """Ask for what is left, in several requests on several connections at a time."""
        group = _READ if batch.nixl else _GROUP
        runs = [left[run.start : run.stop] for run in groups([batch.buffers[place] for place in left], group)]
        parts = [run[at : at + wire.MOST_KEYS] for run in runs for at in range(0, len(run), wire.MOST_KEYS)]
        waiting = iter(parts)  # next() of it is atomic: each goes to one thread
        failed = threading.Event()

        def work(_: int) -> None:
            try:
                with self._channel(self._values) as channel:
                    self._converse(channel, waiting, failed, batch)
            except TierUnavailable:
                failed.set()
                raise

        self._threads.each(range(min(1 if batch.nixl else self._width, len(parts))), work)

    def _converse(
        self, channel: Channel, waiting: Iterator[list[int]], failed: threading.Event, batch: Batch
    ) -> None:
        """Ask for one part after the other, and for the next one before this one has come."""
        reads = self._reads(channel, batch) if batch.nixl else None
        asked: deque[list[int]] = deque()
        more = True
        try:
            while more or asked:
                while more and len(asked) < _AHEAD:
                    part = None if failed.is_set() else next(waiting, None)
                    more = part is not None
                    if part is not None:
                        channel.send(batch.request(part))
                        asked.append(part)
                if asked and reads is not None:
                    reads.begin(asked.popleft())
                elif asked:
                    self._receive(channel, asked.popleft(), batch)
            if reads is not None:
                reads.end(0)
        finally:
            if reads is not None:
                reads.close()

    def _receive(self, channel: Channel, part: list[int], batch: Batch) -> None:
        for place in batch.given(part, channel.reply(wire.Given).states):
            channel.fill(batch.buffers[place])
            batch.came([place])

    def _reads(self, channel: Channel, batch: Batch) -> Reads:
        """For a batch over a connection, of which there is one; NIXL gets to know the agent behind it."""
        assert self._agent is not None
        if self._met is not None and self._met[0] is not channel:
            self._agent.leave(self._met[1])  # the connection broke, and NIXL's may have too
            self._met = None
        if self._met is None:
            channel.send(wire.Meet())
            self._met = channel, self._agent.meet(channel.reply(wire.Met).metadata)
        return Reads(self._agent, self._met[1], channel, batch, self._checks)

    @contextmanager
    def _channel(self, seats: _Seats) -> Iterator[Channel]:
        """A connection for one exchange; kept if that goes well. Raises TierUnavailable."""
        if not seats.free.acquire(timeout=self._timeout):
            raise TierUnavailable("peer: all connections are in use")
        try:
            with seats.pool.link(self._address) as channel:
                if not channel.agreed:  # here, where `close` ends it
                    wire.greet(channel, self._address.token)
                yield channel
        except (OSError, ProtocolError) as error:
            raise TierUnavailable(f"peer: {_why(error)}") from error
        finally:
            seats.free.release()


_CUT = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
"""What TLS makes of a connection that ends: no wrong certificate."""


def _why(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


def open_peer(url: TierURL) -> PeerTier:
    """A tier from `peer://host:port?…`; see docs/tiers-peer.md. Raises ConfigError on what a retry does not
    mend. A peer that does not answer is waited for: of two keepers, one is the first to start."""
    timeout = url.take_timeout(5.0)
    nixl = url.take_choice("transport", ("tcp", "nixl"), "tcp") == "nixl"
    device = url.take("device", str, "lo")
    connections = 1 if nixl else url.take_count("connections", 2)
    token = wire.read_token(url.take("token_file", str, None))
    ca, cert, key = (url.take(name, str, None) for name in ("ca", "cert", "key"))
    secure = url.take_flag("tls", ca is not None or cert is not None)
    if not url.host or url.path not in ("", "/") or url.user is not None or len(url.hosts) > 1:
        raise ConfigError(f"{url}: write it as peer://host:{PORT}; the token goes into a file (token_file=)")
    if not secure and (ca or cert or key):
        raise ConfigError(f"{url}: ca, cert and key are for TLS: leave tls=no out")
    tls = client_context(ca, cert, key) if secure else None
    plain = url.take_flag("plain", False)
    if nixl:
        allow(device, plain)
    address = Address(url.host, url.port or PORT, token, tls)
    try:
        address.dial(min(timeout, _GREET_SECONDS)).close()
    except (OSError, ProtocolError) as error:
        if isinstance(error, wire.Refused | ssl.SSLError) and not isinstance(error, _CUT):
            raise ConfigError(f"{url}: {error}") from error
        log.info("%s does not answer yet (%s): it is used once it does", url, _why(error))
    return PeerTier(address, timeout, connections, device if nixl else None)
