"""The port at which other keepers read this one's chunks (`--peers`); what they say: `tiers/peer_wire.py`.

A thread for each connection, so that a peer that is slow, far or hostile delays no engine: it asks the
event loop, which owns all state, to lease what it sends (`keeper/lend.py`), and sends it from the arena
without a copy. Whatever comes in can end that connection, nothing more; connections are bounded, and so is
what is leased to all of them together.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from kvkeep.errors import ConfigError, ProtocolError, RequestRefused
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.lend import BUSY, OTHER_LENGTH, Lender, Loan
from kvkeep.tiers import peer_wire as wire
from kvkeep.tiers.base import KEY_BYTES
from kvkeep.tiers.peer_nixl import Agent, allow
from kvkeep.tiers.peer_wire import PORT, Channel, State
from kvkeep.tiers.seal import seal
from kvkeep.tiers.url import TierURL
from kvkeep.tls import server_context

__all__ = ["Peers"]

log = logging.getLogger("kvkeep.keeper")

_T = TypeVar("_T")
_MOST_CONNECTIONS = 64
_HELLO_SECONDS = 5.0
_SEND_SECONDS = 10.0  # for one value: what is leased for a peer that does not read comes free again
_IDLE_SECONDS = 600.0
_LOAN_SECONDS = 60.0  # for a peer that reads by NIXL to say that it has
_LOOP_SECONDS = 5.0
_MOST_LOANS = 4
_STATES = {OTHER_LENGTH: State.OTHER_LENGTH, BUSY: State.BUSY}


class Peers:
    """One port. Owns its threads and connections; `post` runs a call on the event loop."""

    def __init__(
        self,
        where: str,
        keeper: Keeper,
        memory: memoryview,
        post: Callable[[Callable[[], None]], object],
    ) -> None:
        """`where`: HOST:PORT, or a PORT of the loopback address, and options as of a URL.

        Raises ConfigError."""
        url = TierURL(f"peers://{where if ':' in where.partition('?')[0] else '127.0.0.1:' + where}")
        self._token = wire.read_token(url.take("token_file", str, None))
        cert, key, ca = (url.take(name, str, None) for name in ("cert", "key", "ca"))
        self._tls = server_context(cert, key, ca) if cert or key or ca else None
        plain = url.take_flag("plain", False)
        self._address = _address(url, bool(self._token) or ca is not None, self._tls is not None or plain)
        self._nixl = url.take_choice("transport", ("tcp", "nixl"), "tcp") == "nixl"
        self._device = url.take("device", str, "lo")
        self._agent: Agent | None = None
        if self._nixl:
            allow(self._device, plain)
        url.finish()
        self._lender = Lender(keeper)
        self._memory = memory
        self._post = post
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._greeted: set[Channel] = set()
        self._counts = Counter[str]()
        self._closed = False

    def start(self) -> None:
        """Listen. Raises ConfigError where the address cannot be had."""
        host, port = self._address
        if self._nixl:
            self._agent = Agent(self._memory, self._device)
            log.info("NIXL serves the whole arena on %s to whoever reaches it there", self._device)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=16)
        except OSError as error:
            raise ConfigError(f"--peers: cannot listen on {host}:{port}: {error.strerror}") from error
        self._address = (host, int(self._listener.getsockname()[1]))
        threading.Thread(target=self._accept, name="kvkeep-peers", daemon=True).start()
        how = ("with TLS" if self._tls else "without TLS") + (
            ", for those with the token" if self._token else ""
        )
        log.info("peers may read this keeper at %s:%d, %s", *self._address, how)

    def close(self) -> None:
        """Stop listening, and end all connections; what they were sent is not leased any more soon after."""
        self._closed = True
        if self._listener is not None:
            with contextlib.suppress(OSError):  # an accept that waits is only ended by this
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.shut()

    def figures(self) -> dict[str, object]:
        """What `kvkeep status` shows."""
        with self._lock:
            counts = dict(self._counts)
        return {
            "address": "{}:{}".format(*self._address),
            "connections": len(self._greeted),
            "lent_bytes": self._lender.lent_bytes,
            **{name: counts.get(name, 0) for name in ("asked", "given_chunks", "given_bytes", "dropped")},
        }

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock, address = self._listener.accept()
                if len(self._channels) >= 2 * _MOST_CONNECTIONS:  # those that have yet to say who they are
                    sock.close()
                else:
                    self._begin(sock, str(address[0]))
            except (OSError, RuntimeError) as error:
                if self._closed:
                    return
                if not isinstance(error, ConnectionError):
                    log.warning("--peers: %s", error)
                    time.sleep(0.1)  # out of descriptors or threads: they come free in time

    def _begin(self, sock: socket.socket, who: str) -> None:
        """A thread for a connection, which counts from now on. Raises OSError, RuntimeError."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        channel = Channel(sock, _HELLO_SECONDS)
        with self._lock:
            self._channels.add(channel)
        try:
            threading.Thread(target=self._serve, args=(channel, who), name="kvkeep-peer", daemon=True).start()
        except RuntimeError:
            self._leave(channel)
            raise

    def _serve(self, channel: Channel, who: str) -> None:
        loans = dict[int, Loan]()
        try:
            channel.secure(self._tls, _HELLO_SECONDS)
            wire.welcome(channel, self._token, room=len(self._greeted) < _MOST_CONNECTIONS)
            with self._lock:
                self._greeted.add(channel)
            while not self._closed:
                channel.wait(_LOAN_SECONDS if loans else _IDLE_SECONDS)
                request = channel.request()
                channel.wait(_SEND_SECONDS)
                self._answer(channel, request, loans)
        except (ProtocolError, RequestRefused, ssl.SSLError) as error:
            self._add(dropped=1)
            log.warning("dropped a peer at %(peer)s: %(error)s", {"peer": who, "error": error})
        except OSError as error:
            log.debug("a peer at %s went away: %s", who, error)
        finally:
            for loan in loans.values():
                self._give_back(loan, 0)
            self._leave(channel)

    def _leave(self, channel: Channel) -> None:
        with self._lock:
            self._channels.discard(channel)
            self._greeted.discard(channel)
        channel.close()

    def _answer(self, channel: Channel, request: wire.Request, loans: dict[int, Loan]) -> None:
        match request:
            case wire.Have():
                _check(request.keys)
                self._add(asked=len(request.keys) // KEY_BYTES)
                channel.send(wire.Held(self._on_loop(lambda: self._lender.held(request.keys))))
            case wire.Take():
                self._take(channel, request)
            case wire.Back():
                if (loan := loans.pop(request.loan, None)) is not None:
                    self._give_back(loan, len(loan.offsets))
            case wire.Meet() if self._agent is not None:
                channel.send(wire.Met(self._agent.metadata))
            case wire.Lend() if self._agent is not None:
                if len(loans) >= _MOST_LOANS:
                    raise ProtocolError(f"more than {_MOST_LOANS} loans at once")
                self._lend_out(channel, request, self._agent, loans)
            case _:
                channel.send(
                    wire.Sorry("it has no NIXL: serve with --peers '…?transport=nixl', or read over TCP")
                )

    def _take(self, channel: Channel, request: wire.Take) -> None:
        """Send what is held of what was asked for, each value sealed just before it goes."""
        loan = self._lend(request.keys, request.lengths)
        sealed = 0
        try:
            channel.send(wire.Given(_states(loan)))
            for value in self._sealed(request, loan):
                sealed += 1
                channel.write(value)
                self._add(given_chunks=1, given_bytes=len(value))
        finally:
            self._give_back(loan, sealed)

    def _lend_out(self, channel: Channel, request: wire.Lend, agent: Agent, loans: dict[int, Loan]) -> None:
        """Say where what is held lies, and keep it there until it is given back."""
        loan = self._lend(request.keys, request.lengths)
        if loan.lease:
            loans[loan.lease] = loan
        for value in self._sealed(request, loan):
            self._add(given_chunks=1, given_bytes=len(value))
        addresses = [agent.address(offset) for offset in loan.offsets if offset >= 0]
        channel.send(wire.Lent(loan.lease, _states(loan), addresses))

    def _sealed(self, request: wire.Take | wire.Lend, loan: Loan) -> Iterator[memoryview]:
        """The values of a loan, in order, each with its seal."""
        for place, (offset, length) in enumerate(zip(loan.offsets, request.lengths, strict=True)):
            if offset >= 0:
                value = self._memory[offset : offset + length]
                if not loan.sealed[place]:
                    seal(request.keys[place * KEY_BYTES : (place + 1) * KEY_BYTES], value)
                yield value

    def _lend(self, keys: bytes, lengths: Sequence[int]) -> Loan:
        _check(keys)
        if len(lengths) != len(keys) // KEY_BYTES:
            raise ProtocolError("a length is needed for each key")
        return self._on_loop(lambda: self._lender.lend(keys, list(lengths)))

    def _give_back(self, loan: Loan, sealed: int) -> None:
        if loan.lease:
            self._post(lambda: self._lender.back(loan.lease, sealed))

    def _on_loop(self, call: Callable[[], _T]) -> _T:
        """The result of a call on the event loop. Raises OSError where that is too busy, or has ended, in
        which case the call is not made later either, and what the call raises."""
        done: Future[_T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(call())
            except RequestRefused as error:
                done.set_exception(error)
            finally:
                if not done.done():  # a bug, which the loop tells of: the client is dropped
                    done.set_exception(ConnectionAbortedError("an unexpected error"))

        self._post(run)
        try:
            return done.result(_LOOP_SECONDS)
        except FutureTimeout as error:
            if done.cancel():
                raise TimeoutError("this keeper is too busy") from error
            return done.result()

    def _add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


def _check(keys: bytes) -> None:
    if len(keys) % KEY_BYTES:
        raise ProtocolError(f"keys are {KEY_BYTES} bytes each")


def _states(loan: Loan) -> bytes:
    return bytes(
        State.GIVEN if offset >= 0 else _STATES.get(offset, State.MISSING) for offset in loan.offsets
    )


def _address(url: TierURL, closed: bool, safe: bool) -> tuple[str, int]:
    """Where to listen; `closed`: only to those who can show that they may read, `safe`: with TLS, or the
    operator's word that none is needed. Raises ConfigError."""
    host = "127.0.0.1" if url.host in ("", "localhost") else url.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(
            f"--peers takes ADDRESS:PORT, such as 10.0.0.1:{PORT}, not {url.netloc!r}"
        ) from error
    if not address.is_loopback and not closed:
        raise ConfigError(
            f"--peers {url.netloc} is open to other hosts, so it needs a token that both keepers have "
            "(openssl rand -hex 32 > FILE, and ?token_file=FILE), or the CA of those who may read "
            "(ca=, with cert= and key=); or listen on 127.0.0.1"
        )
    if not address.is_loopback and not safe:
        raise ConfigError(
            f"--peers {url.netloc} without TLS: a token keeps strangers out, but whoever can change what "
            "passes on the network can put other KV in its place, and read it; give cert= and key=, or, "
            "where only keepers are on that network, say so: plain=yes"
        )
    return str(address), PORT if url.port is None else url.port
