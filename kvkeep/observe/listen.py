"""Connections of the HTTP side: so many at once, and with TLS only once they have greeted."""

from __future__ import annotations

import asyncio
import ssl

from aiohttp import web

__all__ = ["Door"]

_MOST_CONNECTIONS = 64
_HANDSHAKE_WAIT = 5.0


class Door:
    """Takes connections for an aiohttp server. A TLS handshake counts as a connection, and is waited for
    five seconds: aiohttp itself knows nothing of it."""

    def __init__(self, server: web.Server, tls: ssl.SSLContext | None) -> None:
        self._server, self._tls = server, tls
        self._greeting: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> asyncio.Server:
        """Listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        # As many are accepted at once, before the first of them is counted.
        return await loop.create_server(self._connected, host, port, backlog=8)

    def close(self) -> None:
        """Break off the handshakes."""
        for task in self._greeting:
            task.cancel()

    def _connected(self) -> asyncio.Protocol:
        if len(self._server.connections) + len(self._greeting) >= _MOST_CONNECTIONS:
            return _Full()
        return self._server() if self._tls is None else _Greeting(self)

    def greet(self, early: _Greeting, transport: asyncio.Transport) -> None:
        """Begin a handshake; what comes right behind it goes to aiohttp."""
        task = asyncio.create_task(self._greet(early, transport))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _greet(self, early: _Greeting, transport: asyncio.Transport) -> None:
        assert self._tls is not None
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(
                transport, early, self._tls, server_side=True, ssl_handshake_timeout=_HANDSHAKE_WAIT
            )
        except OSError:  # no TLS, no common version, a certificate that is not trusted, or nothing at all
            transport.abort()
            return
        if secure is None or early.gone:
            return
        handler = self._server()
        secure.set_protocol(handler)
        handler.connection_made(secure)
        if early.data:
            handler.data_received(early.data)


class _Greeting(asyncio.Protocol):
    """A connection until its handshake is done."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.data, self.gone = b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # what it says is for TLS, which is set up in the next turn of the loop
        self._door.greet(self, transport)

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True


class _Full(asyncio.Protocol):
    """Hangs up: more connections would take descriptors that engines need."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
