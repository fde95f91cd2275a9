"""The keeper's side of one connection: parses frames, calls the keeper, writes answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvkeep import __version__
from kvkeep.errors import ConfigError, ProtocolError, RequestRefused
from kvkeep.identity import TENANT_BYTES
from kvkeep.keeper.fetch import Stage
from kvkeep.keeper.journal import Journal, states
from kvkeep.keeper.movers import Asked
from kvkeep.keeper.namespaces import Answer, Namespace
from kvkeep.observe.watch import Seen
from kvkeep.wire import messages as msg

if TYPE_CHECKING:
    from kvkeep.wire.server import KeeperServer

__all__ = ["ServerConnection"]

log = logging.getLogger("kvkeep.keeper")

_HELLO_DEADLINE = 5.0
# Seconds that a session's claims last beyond its last connection: what a killed engine had submitted to its
# device, and what a thread copies beside the one that gave up the connection, ends within milliseconds.
_REST = 5.0
_MAX_NAMESPACES = 65536
_MAX_BACKLOG = 256 << 20  # bytes of unread answers at which a client is taken for dead
# What others may have to wait for: in chunks of all groups together, and in items of a Reserve times groups.
_MAX_CHUNKS, _MAX_ROWS = 1 << 20, 1 << 14


class ServerConnection(asyncio.Protocol):
    """One client: parses frames, calls the keeper, writes answers. Bad bytes end it, nothing else."""

    def __init__(self, server: KeeperServer) -> None:
        self._server = server
        self._keeper = server.keeper
        self._session: str | None = None
        self._writes = False  # to the arena, which it was given
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", peer)
        if uid not in (os.getuid(), 0):
            self._server.errors["user"] += 1
            about = {"user": uid, "own": os.getuid()}
            log.warning("refused a connection of user %(user)d: this keeper serves user %(own)d", about)
            self._refuse(f"this keeper belongs to user {os.getuid()}, you are {uid}")
            return
        self._deadline = asyncio.get_running_loop().call_later(_HELLO_DEADLINE, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._server.connections.discard(self)
        self._transport = None
        if self._session is not None:
            self._ended(self._session)

    def close(self) -> None:
        """Drop the client. Its claims last until it has closed its end of the socket too: until then it may
        be writing to the arena."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        self._buffer.clear()
        if self._session is not None:
            session, self._session = self._session, None
            sock = transport.get_extra_info("socket")
            fd = os.dup(sock.fileno())
            with contextlib.suppress(OSError):  # it has gone already
                sock.shutdown(socket.SHUT_WR)
            asyncio.get_running_loop().add_reader(fd, self._await_end, fd, session)
        transport.abort()

    def _await_end(self, fd: int, session: str) -> None:
        try:
            if os.read(fd, 1 << 16):
                return  # what it had sent before it heard
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        self._ended(session)

    def _ended(self, session: str) -> None:
        rest = _REST if self._keeper.claims.held(session) else 0.0
        asyncio.get_running_loop().call_later(rest, self._detach, session)

    def _detach(self, session: str) -> None:
        self._keeper.detach(session)
        if self._server.movers is not None and not self._keeper.claims.alive(session):
            for ticket in self._server.movers.fetches.session_ended(session):
                self._gave_up(ticket)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            self._parse()
        except ProtocolError as error:
            self._server.errors["protocol"] += 1
            log.warning("dropped a client: %(error)s", {"error": error, "session": self._session})
            self._refuse(str(error))
        except Exception:
            self.close()  # as asyncio does, but with its claims
            raise

    def _parse(self) -> None:
        start, buffer = 0, self._buffer
        while self._transport is not None and len(buffer) - start >= msg.HEADER.size:
            length = msg.frame_length(buffer[start : start + msg.HEADER.size])
            end = start + msg.HEADER.size + length
            if len(buffer) < end:
                break
            self._handle(msg.decode_request(bytes(buffer[start + msg.HEADER.size : end])))
            start = end
        del buffer[:start]

    def _handle(self, request: msg.Request) -> None:
        if self._session is None:
            self._hello(request)
            return
        try:
            reply = self._answer(self._session, request)
        except (RequestRefused, ConfigError) as error:
            self._server.errors["refused"] += 1
            one_way = isinstance(request, msg.Commit | msg.Abort | msg.Release | msg.Forget | msg.Missed)
            if one_way:
                log.debug("ignored %s: %s", type(request).__name__, error)
            reply = None if one_way else msg.Refused(str(error))
        if reply is not None:
            self._write(reply)

    def _answer(self, session: str, request: msg.Request) -> msg.Reply | None:
        keeper = self._keeper
        match request:
            case msg.Lookup():
                return self._lookup(session, request)
            case msg.Missed():
                self._missed(session, request)
            case msg.Poll():
                return msg.Progress(bytes(self._stage(session, ticket) for ticket in request.tickets))
            case msg.Forget():
                if self._server.movers and self._server.movers.fetches.forget(session, request.ticket):
                    self._gave_up(request.ticket)
            case msg.Reserve() if request.ticket:
                self._reserve_for_all(session, request)
            case msg.Reserve():
                return self._reserve(session, request)
            case msg.Commit():
                keeper.commit(session, request.reservation, request.part)
                if self._server.movers is not None:
                    self._server.movers.kick()
            case msg.Release():
                keeper.release(session, request.lease, request.rank)
                if self._server.watch is not None:
                    self._server.watch.released(request.lease, read=request.rank is not None)
            case msg.Abort():
                keeper.abort(session, request.reservation)
            case msg.OpenNamespace():
                return self._open(request)
            case msg.Changes():
                return self._changes(request)
            case msg.Clear():
                space = None if request.namespace is None else self._space(request.namespace)
                return msg.Cleared(keeper.clear(space, _tenant(request.tenant)))
            case msg.Status():
                return msg.StatusReply(self._server.figures(_tenant(request.tenant)))
            case msg.Hello():
                raise ProtocolError("a second hello")
        return None

    def _lookup(self, session: str, request: msg.Lookup) -> msg.Found:
        began = time.perf_counter()
        space, keys, movers = self._space(request.namespace), _keys(request.keys), self._server.movers
        tenant = _tenant(request.tenant)
        _check_size(len(keys) // 16 * len(space.groups))
        asked = max(0, len(keys) // 16 - request.first)
        waited = movers.fetches.forget(session, request.ticket) if movers and request.ticket else None
        epoch = 0 if waited is None else waited.epoch
        found = self._keeper.lookup(session, space, keys, request.first, epoch)
        ticket = 0
        if movers is not None:
            if not request.ticket and found.chunks < asked:
                terms = (request.recompute, request.patience, tenant)
                ticket = movers.fetch(Asked(session, space, keys, request.first, *terms), found)
            movers.kick()
        tiers = Counter[int]() if waited is None else waited.given(found)
        answer = Answer(min(request.first, len(keys) // 16), asked, found.chunks, tiers)
        if not ticket:  # else this request asks again
            self._keeper.answered(space, tenant, answer)
        if self._server.recorder is not None and waited is None:
            self._server.recorder.looked_up(space.number, keys, request.first, found.epoch)
        if self._server.watch is not None:
            settles = 0 if waited is None else waited.ticket
            seen = Seen(session, space, keys, answer, settles, ticket, found.lease, request.trace)
            # Noted once the answer is out: the engine waits for that.
            took = time.perf_counter() - began
            asyncio.get_running_loop().call_soon(self._server.watch.looked_up, seen, took)
        return msg.Found(
            found.lease, found.chunks, found.epoch, [_int64(row) for row in found.offsets], ticket
        )

    def _missed(self, session: str, request: msg.Missed) -> None:
        space = self._space(request.namespace)
        _check_size(0, len(request.items))
        for item in request.items:
            local = min(item.first, item.chunks)
            answer = Answer(local, item.chunks - local, 0, Counter())
            for counters in (self._keeper.counters, space.counters):
                counters.lookups += 1
            self._keeper.answered(space, _tenant(item.tenant), answer)
            if self._server.watch is not None:
                self._server.watch.missed(session, space, answer)

    def _gave_up(self, ticket: int) -> None:
        if self._server.watch is not None:
            self._server.watch.gave_up(ticket)

    def _stage(self, session: str, ticket: int) -> Stage:
        movers = self._server.movers
        return Stage.DONE if movers is None else movers.fetches.stage(session, ticket)

    def _reserve(self, session: str, request: msg.Reserve) -> msg.Reserved:
        space = self._space(request.namespace)
        out: list[tuple[int, list[bytes], int]] = []
        chunks = sum(len(item.keys) for item in request.items) // 16
        _check_size(chunks * len(space.groups), len(request.items) * len(space.groups))
        for item in request.items:
            count = len(_keys(item.keys)) // 16
            if len(item.wanted) != len(space.groups) or any(len(row) != count for row in item.wanted):
                raise ProtocolError("a reservation needs one byte per chunk and group")
            _tenant(item.tenant)
        for item in request.items:
            wanted = [np.frombuffer(row, np.uint8) != 0 for row in item.wanted]
            try:
                done = self._keeper.reserve(
                    session, space, item.keys, wanted, item.first, item.epoch, item.tenant
                )
            except RequestRefused:
                for number in filter(None, (number for number, *_ in out)):
                    self._keeper.abort(session, number)  # the client will never learn of it
                raise
            if self._server.recorder is not None:
                self._server.recorder.saved(item.epoch, item.first, item.keys)
            out.append((done.reservation, [_int64(row) for row in done.offsets], done.epoch))
        return msg.Reserved(out, request.ticket)

    def _reserve_for_all(self, session: str, request: msg.Reserve) -> None:
        """Answer the session's writers too: each waits for it where it will need it."""
        try:
            reply = self._reserve(session, request)
        except (RequestRefused, ConfigError) as error:
            self._server.errors["refused"] += 1
            reply = msg.Reserved([], request.ticket, str(error))
        frame = msg.encode(reply)
        for one in list(self._server.connections):
            if one is self or (one._writes and one._session == session):
                one._raw_write(frame)

    def _changes(self, request: msg.Changes) -> msg.Changed:
        space, keys, keeper = self._space(request.namespace), _keys(request.keys), self._keeper
        now = states(keeper.chunks, np.frombuffer(keys, "<u8").reshape(-1, 2)).tobytes()
        if request.after is None:
            return msg.Changed(0, True, b"", b"", now)
        if keeper.journal is None:
            keeper.journal = Journal(keeper.chunks)
        told = keeper.journal.since(request.after, space)
        return msg.Changed(told.last, told.complete, told.keys.tobytes(), told.states.tobytes(), now)

    def _open(self, request: msg.OpenNamespace) -> msg.Namespace:
        if not self._keeper.knows(request.fingerprint) and len(self._keeper.namespaces) >= _MAX_NAMESPACES:
            raise RequestRefused(f"more than {_MAX_NAMESPACES} namespaces: restart this keeper")
        space = self._keeper.open_namespace(*msgspec.structs.astuple(request))
        if self._server.recorder is not None:
            nbytes = sum(group.slot_bytes for group in request.groups)
            self._server.recorder.opened(space.number, request.chunk_tokens, nbytes)
        return msg.Namespace(space.number)

    def _space(self, number: int) -> Namespace:
        if number >= len(self._keeper.namespaces):
            raise RequestRefused(f"no namespace {number} is open here")
        return self._keeper.namespaces[number]

    def _hello(self, request: msg.Request) -> None:
        if not isinstance(request, msg.Hello):
            raise ProtocolError("the first message must be a hello")
        if request.version != msg.VERSION:
            raise ProtocolError(
                f"client speaks protocol {request.version}, this keeper ({__version__}) {msg.VERSION}: "
                "install the same kvkeep on both sides"
            )
        if request.session.startswith("~"):
            raise ProtocolError("sessions whose names begin with ~ are the keeper's own")
        self._cancel_deadline()
        self._session, self._writes = request.session, request.arena
        self._keeper.attach(request.session)
        self._server.opened(self)
        welcome = msg.encode(msg.Welcome(msg.VERSION, self._server.identity, self._keeper.arena.nbytes))
        shared = [self._server.arena_fd] * request.arena + [self._server.presence.fd] * request.presence
        if shared:
            self._send_fds(welcome, shared)
        else:
            self._raw_write(welcome)

    def _send_fds(self, frame: bytes, fds: list[int]) -> None:
        # asyncio cannot pass descriptors; nothing is queued yet, so the frame can go out directly.
        assert self._transport is not None
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as raw:
            try:
                sent = socket.send_fds(raw, [frame], fds)
            except OSError:
                self.close()
                return
        if sent < len(frame):
            self.close()

    def _write(self, reply: msg.Reply) -> None:
        self._raw_write(msg.encode(reply))

    def _raw_write(self, frame: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > _MAX_BACKLOG:
            self._server.errors["unread"] += 1
            about = {"session": self._session}
            log.warning("dropped a client that does not read its answers: %(session)s", about)
            self.close()

    def _refuse(self, reason: str) -> None:
        if self._transport is not None:
            self._transport.write(msg.encode(msg.Refused(reason[:1000])))
        self.close()

    def _too_late(self) -> None:
        self._server.errors["silent"] += 1
        log.warning("dropped a client that did not say hello within %g s", _HELLO_DEADLINE)
        self.close()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _keys(blob: bytes) -> bytes:
    if len(blob) % 16:
        raise ProtocolError("keys are 16 bytes each")
    return blob


def _check_size(chunks: int, rows: int = 0) -> None:
    if chunks > _MAX_CHUNKS or rows > _MAX_ROWS:
        raise RequestRefused(
            f"{chunks} chunks of all groups in {rows} rows: a request may name {_MAX_CHUNKS} in {_MAX_ROWS}"
        )


def _tenant(name: bytes) -> bytes:
    if len(name) not in (0, TENANT_BYTES):
        raise ProtocolError(f"a tenant has {TENANT_BYTES} bytes, or none")
    return name


def _int64(row: np.ndarray) -> bytes:
    return np.ascontiguousarray(row, "<i8").tobytes()
