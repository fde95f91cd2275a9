"""A blocking connection to a keeper, for an engine's scheduler, its workers, and the CLI.

Every wait is bounded. Any failure of the connection raises KeeperUnavailable and closes it: the
caller goes on without the cache and opens a new one when `Connection.open` succeeds again.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvkeep.errors import KeeperUnavailable, ProtocolError, RequestRefused
from kvkeep.pages import map_shared
from kvkeep.presence import PresenceView
from kvkeep.terms import Found, GroupSpec, Reserved
from kvkeep.wire import messages as msg

__all__ = ["Connection", "first_ticket"]

_R = TypeVar("_R", bound=msg.Reply)
_HELLO_TIMEOUT, _CLEAR_TIMEOUT = 2.0, 30.0
_GRACE = 0.05  # seconds for an answer whose time was over before anybody waited for it


class Connection:
    """One connection of one session. Used by one thread at a time."""

    def __init__(
        self,
        sock: socket.socket,
        path: str,
        welcome: msg.Welcome,
        arena_fd: int | None,
        presence: PresenceView | None,
        timeout: float,
    ) -> None:
        self._sock = sock
        self.path = path
        self._timeout = timeout
        self._arena_fd = arena_fd
        self._presence = presence
        self._early = deque[msg.Reserved]()  # answers that nobody has waited for yet
        self.keeper = welcome.keeper
        """Identity of the keeper process; another one after a restart."""
        self.arena_bytes = welcome.arena_bytes

    @classmethod
    def open(
        cls, path: str, session: str, *, arena: bool = False, presence: bool = False, timeout: float = 1.0
    ) -> Connection:
        """Connect and say hello.

        `session` names the engine instance: leases and reservations live as long as any of its
        connections, and a little longer. `arena`: to map it; `presence`: for `absent`. `timeout` bounds
        each later call, in seconds. Raises KeeperUnavailable, or RequestRefused where the keeper does not
        want us (its message says why).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            reply, fds = _greet(sock, path, msg.Hello(msg.VERSION, session, arena, presence))
        except (OSError, ProtocolError) as error:
            sock.close()
            raise KeeperUnavailable(f"no keeper answers at {path}: {error}") from error
        with contextlib.ExitStack() as unused:
            unused.callback(sock.close)
            for fd in fds:
                unused.callback(os.close, fd)
            if isinstance(reply, msg.Refused):
                raise RequestRefused(reply.reason)
            if not isinstance(reply, msg.Welcome) or len(fds) != arena + presence:
                raise KeeperUnavailable("its memory did not come: this process may be out of descriptors")
            try:
                view = PresenceView(fds[-1]) if presence else None
            except (OSError, ValueError) as error:
                raise KeeperUnavailable(f"what it holds cannot be seen: {error}") from error
            unused.pop_all()
        if presence:
            os.close(fds[-1])
        return cls(sock, path, reply, fds[0] if arena else None, view, timeout)

    @property
    def closed(self) -> bool:
        """Whether this connection has ended, by us or by a failure."""
        return self._sock.fileno() < 0

    @property
    def ended(self) -> bool:
        """Whether it is closed, by us or by the keeper: a look without a question. Not during a call."""
        if self.closed:
            return True
        try:
            self._sock.setblocking(False)
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection; with a session's last one its claims end."""
        self._sock.close()
        self._presence = None
        if self._arena_fd is not None:
            os.close(self._arena_fd)
            self._arena_fd = None

    @property
    def arena_fd(self) -> int:
        """The arena's descriptor, until `close`."""
        if self._arena_fd is None:
            raise RequestRefused("this connection was opened without the arena")
        return self._arena_fd

    def map_arena(self) -> memoryview:
        """The arena, shared with the keeper. The caller owns the mapping; it outlives the keeper."""
        return map_shared(self.arena_fd, self.arena_bytes)

    def open_namespace(
        self,
        fingerprint: bytes,
        label: str,
        groups: Sequence[tuple[int, int | None]],
        parts: int,
        readers: int,
        chunk_tokens: int = 0,
    ) -> int:
        """Handle of a namespace; `groups`: (bytes per chunk, window in chunks or None) each."""
        specs = [GroupSpec(*group) for group in groups]
        request = msg.OpenNamespace(fingerprint, label[:512], specs, parts, readers, chunk_tokens)
        return self._call(request, msg.Namespace).namespace

    def lookup(
        self,
        namespace: int,
        keys: bytes,
        first: int = 0,
        recompute: float = 0.0,
        patience: float = 0.0,
        ticket: int = 0,
        trace: str = "",
        tenant: bytes = b"",
    ) -> Found:
        """Lease the longest usable run of chunks first, first+1, …; 16 bytes per key, from chunk 0.

        `recompute`: seconds that the engine takes to compute a chunk (0: not known; -1: memory only).
        `patience`: seconds that its request may wait to hear whether tiers have anything (0: no ticket).
        `ticket`: of an earlier lookup, whose fetch this one settles. `trace`: see `messages.Lookup`.
        `tenant`: `identity.tenant_of` its cache_salt.
        """
        request = msg.Lookup(namespace, keys, first, recompute, patience, ticket, trace, tenant)
        reply = self._call(request, msg.Found)
        offsets = [np.frombuffer(row, "<i8") for row in reply.offsets]
        return Found(reply.lease, reply.chunks, reply.epoch, offsets, reply.ticket)

    def absent(self, names: npt.NDArray[np.uint64]) -> bool:
        """Whether certainly none of these chunks is held, by the keys of their group (`identity.group_keys`),
        without a question. False where that cannot be told."""
        return self._presence is not None and self._presence.absent(names)

    def missed(self, namespace: int, items: list[msg.Miss]) -> None:
        """Requests that need not be looked up, since `absent` said so, are counted all the same."""
        self._send(msg.Missed(namespace, items))

    def poll(self, tickets: list[int]) -> bytes:
        """Per ticket: 0 while tiers are asked, 1 while they are read, 2 when all has landed that will."""
        return self._call(msg.Poll(tickets), msg.Progress).stages

    def forget(self, ticket: int) -> None:
        """Nobody waits for this ticket any more."""
        self._send(msg.Forget(ticket))

    def reserve(self, namespace: int, items: list[msg.Reservation]) -> list[Reserved]:
        """Reserve slots for chunks to be written; one result per item."""
        return _reserved(self._call(msg.Reserve(namespace, items), msg.Reserved))

    def begin_reserve(self, namespace: int, items: list[msg.Reservation], ticket: int) -> float:
        """The same without waiting. `reserved` has the answer, here and on the session's other connections
        that map the arena. `ticket`: not 0, and no other's; see `first_ticket`. Returns when the keeper's
        time for it is over, by time.monotonic."""
        self._send(msg.Reserve(namespace, items, ticket))
        return time.monotonic() + self._timeout

    def reserved(self, ticket: int, until: float = math.inf) -> list[Reserved]:
        """What was reserved by a ticket; what comes before it is passed over. `until`: what `begin_reserve`
        returned; however many wait one after another, they share that time. Raises RequestRefused too."""
        deadline = min(time.monotonic() + self._timeout, max(until, time.monotonic() + _GRACE))
        while True:
            reply = self._early.popleft() if self._early else self._receive(deadline)
            if not isinstance(reply, msg.Reserved):
                self.close()
                raise KeeperUnavailable(f"the keeper sent {type(reply).__name__} where nobody had asked")
            if reply.ticket == ticket:
                break
            if time.monotonic() > deadline:  # others' may come without end
                self.close()
                raise KeeperUnavailable("no answer from the keeper: only those of others")
        if reply.refusal:
            raise RequestRefused(reply.refusal)
        return _reserved(reply)

    def commit(self, reservation: int, part: int) -> None:
        """This rank has written its part."""
        self._send(msg.Commit(reservation, part))

    def abort(self, reservation: int) -> None:
        """No rank will write to this reservation."""
        self._send(msg.Abort(reservation))

    def release(self, lease: int, rank: int | None = None) -> None:
        """This rank has read its lease; None gives back the whole lease."""
        self._send(msg.Release(lease, rank))

    def changes(self, namespace: int, keys: bytes, after: int | None = None) -> msg.Changed:
        """What the chunks of `keys` (16 bytes each, made by `identity.group_keys`) are now, and what has
        come and gone since change number `after`. No use of them, unlike a lookup."""
        return self._call(msg.Changes(namespace, keys, after), msg.Changed)

    def clear(self, namespace: int | None = None, tenant: bytes = b"") -> int:
        """Forget what is held (of a namespace, of a tenant); returns the number of chunks. It may take longer
        than other calls, and is given 30 s at least."""
        return self._call(msg.Clear(namespace, tenant), msg.Cleared, _CLEAR_TIMEOUT).chunks

    def status(self, tenant: bytes = b"") -> dict[str, object]:
        """The keeper's figures; `tenant`: one to be among those shown."""
        return self._call(msg.Status(tenant), msg.StatusReply).figures

    def _call(self, request: msg.Request, expected: type[_R], at_least: float = 0.0) -> _R:
        self._send(request)
        deadline = time.monotonic() + max(self._timeout, at_least)
        while isinstance(reply := self._receive(deadline), msg.Reserved) and reply.ticket:
            self._early.append(reply)
        if isinstance(reply, expected):
            return reply
        if isinstance(reply, msg.Refused):
            raise RequestRefused(reply.reason)
        self.close()
        raise KeeperUnavailable(f"the keeper answered {type(request).__name__} with {type(reply).__name__}")

    def _send(self, request: msg.Request) -> None:
        if self.closed:
            raise KeeperUnavailable("the connection to the keeper is closed")
        try:
            self._sock.settimeout(self._timeout)
            self._sock.sendall(msg.encode(request))
        except OSError as error:
            self.close()
            raise KeeperUnavailable(f"the keeper went away: {error}") from error

    def _receive(self, deadline: float) -> msg.Reply:
        try:
            length = msg.frame_length(self._read(4, deadline))
            return msg.decode_reply(self._read(length, deadline))
        except (OSError, ProtocolError) as error:
            # A late answer would be taken for the next one's: the connection is of no more use.
            self.close()
            raise KeeperUnavailable(f"no answer from the keeper: {error}") from error

    def _read(self, count: int, deadline: float) -> memoryview:
        view = memoryview(bytearray(count))
        filled = 0
        while filled < count:
            self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
            got = self._sock.recv_into(view[filled:])
            if not got:
                raise ConnectionResetError("it closed the connection")
            filled += got
        return view


def first_ticket() -> int:
    """Where one engine begins to count its tickets: two whose sessions have one name are not to meet."""
    return secrets.randbits(61)


def _reserved(reply: msg.Reserved) -> list[Reserved]:
    return [
        Reserved(number, [np.frombuffer(row, "<i8") for row in rows], epoch)
        for number, rows, epoch in reply.items
    ]


def _greet(sock: socket.socket, path: str, hello: msg.Hello) -> tuple[msg.Reply, list[int]]:
    """Connect and exchange hello and welcome; descriptors come with the first bytes."""
    sock.settimeout(_HELLO_TIMEOUT)
    sock.connect(path)
    _, owner, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if owner not in (os.getuid(), 0):  # it would be given prompts' KV, and give us its own
        raise ProtocolError(f"the keeper at {path} belongs to user {owner}, you are {os.getuid()}")
    with contextlib.suppress(BrokenPipeError):  # refused already: what there is to read says why
        sock.sendall(msg.encode(hello))
    first, fds, _, _ = socket.recv_fds(sock, 4096, 2)
    body = bytearray(first)
    while len(body) < msg.HEADER.size or len(body) < msg.HEADER.size + msg.frame_length(body[:4]):
        more = sock.recv(4096)
        if not more:
            raise ConnectionResetError("it closed the connection")
        body += more
    return msg.decode_reply(bytes(body[msg.HEADER.size :])), fds
