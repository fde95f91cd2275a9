"""Connections by address: as many are kept for the next batches as are in use at once."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from kvkeep.errors import TierUnavailable

__all__ = ["Pool", "PooledSocket"]


class PooledSocket:
    """One socket, which it owns. Used by one thread at a time; only `shut` is for others."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.usable = True
        """Whether another exchange may follow."""

    @property
    def stale(self) -> bool:
        """Whether something is there that nobody asked for; mostly the end of the connection."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def shut(self) -> None:
        """End it, and what another thread does on it, which gets an OSError."""
        self.usable = False
        with contextlib.suppress(OSError):  # it has ended
            # Not TLS's own, which waits, and takes the session from under that thread.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it."""
        self._sock.close()


_At = TypeVar("_At")
_Link = TypeVar("_Link", bound=PooledSocket)


class Pool(Generic[_At, _Link]):
    """Thread-safe; a connection that failed is dropped and never used again."""

    def __init__(self, dial: Callable[[_At], _Link], keep: int = 1, doubts: bool = False) -> None:
        """`dial` raises OSError, or what it likes. With `doubts`, a server that has ended an idle connection
        is an error (OSError): it may have another role now."""
        self._dial, self._doubts = dial, doubts
        self.keep = keep
        """Idle connections that are kept, per address."""
        self._lock = threading.Lock()
        self._idle: dict[_At, list[_Link]] = {}
        self._busy: set[_Link] = set()
        self._closed = False

    @contextlib.contextmanager
    def link(self, address: _At) -> Iterator[_Link]:
        """A connection for one exchange of this thread; kept if that goes well. Raises as `dial` does, and
        TierUnavailable once it is closed."""
        link = self._take(address)
        kept = False
        try:
            yield link
            with self._lock:
                idle = self._idle.setdefault(address, [])
                kept = not self._closed and link.usable and len(idle) < self.keep
                if kept:
                    idle.append(link)
        finally:
            with self._lock:
                self._busy.discard(link)
            if not kept:
                link.close()

    def _take(self, address: _At) -> _Link:
        with self._lock:
            idle = self._idle.get(address)
            link = idle.pop() if idle else None
        if link is not None and link.stale:
            link.close()
            self.flush(address)
            link = None
            if self._doubts:
                raise ConnectionResetError("the server ended an idle connection")
        link = link or self._dial(address)
        with self._lock:
            if not self._closed:
                self._busy.add(link)
                return link
        link.close()
        raise TierUnavailable("the tier is closed")

    def flush(self, address: _At | None = None) -> None:
        """Dial anew from now on: servers may have other roles, and names stand for other servers."""
        with self._lock:
            links = [link for at, idle in self._idle.items() if address in (None, at) for link in idle]
            self._idle = {at: idle for at, idle in self._idle.items() if address not in (None, at)}
        for link in links:
            link.close()

    def close(self) -> None:
        """No more connections; those in use end with an OSError where they are used."""
        with self._lock:
            self._closed = True
            for link in self._busy:
                link.shut()
        self.flush()
