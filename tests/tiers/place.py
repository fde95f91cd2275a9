"""A real store under test, and a proxy in front of it that misbehaves on demand."""

from __future__ import annotations

import mmap
import random
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.tiers.base import KEY_BYTES, Key, Tier
from kvkeep.tiers.meter import Metered
from kvkeep.tiers.open import open_raw, open_tier
from kvkeep.tiers.url import TierURL

PAGE = 4096


class Place(ABC):
    """One real store. `open` gives a new tier on it; the rest looks at it from behind."""

    proxy: Proxy | None = None
    """In front of the store, where it is reached by TCP."""
    capacity_option: str | None = "capacity"
    """Option that bounds the tier's bytes; None where the store's own bound counts (see `used_bytes`)."""

    def address(self, **options: str) -> str:
        """The URL of a tier on this store, with these options."""
        raise NotImplementedError("it has none, and `open` and `opened` of its own")

    def open(self, **options: str) -> Tier:
        """A raw tier (no wrappers) on this store. Raises ConfigError."""
        return open_at(self.address(**options))

    def opened(self) -> Metered:
        """A tier on this store as a keeper has it: metered, sealed, guarded."""
        return open_tier(self.address()).tier

    @abstractmethod
    def read(self, key: Key) -> bytes | None:
        """The stored value, byte for byte, by other means than the tier."""

    @abstractmethod
    def write(self, key: Key, value: bytes) -> None:
        """Replace the stored value, by other means than the tier."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes that all values take in the store, by other means than the tier."""


def open_at(text: str) -> Tier:
    """The tier of a URL without wrappers. Raises ConfigError, also for options that it does not know."""
    url = TierURL(text)
    tier = open_raw(url)
    try:
        url.finish()
    except ConfigError:
        tier.close()
        raise
    return tier


def query(options: dict[str, str], separator: str = "?") -> str:
    """Options as the end of a URL."""
    words = "&".join(f"{name}={value}" for name, value in options.items())
    return separator + words if words else ""


def keys_of(count: int, seed: int = 0) -> list[Key]:
    """Distinct keys of one namespace."""
    source = random.Random(seed)
    return [b"namespac" + source.randbytes(KEY_BYTES - 8) for _ in range(count)]


def buffers_of(sizes: list[int], seed: int | None = None) -> list[memoryview]:
    """Buffers as the arena has them: page-aligned, in one shared mapping; zeros, or random bytes."""
    step = [-(-size // PAGE) * PAGE for size in sizes]
    memory = memoryview(mmap.mmap(-1, max(PAGE, sum(step))))
    out, at = [], 0
    source = random.Random(seed)
    for size, length in zip(sizes, step, strict=True):
        view = memory[at : at + size]
        if seed is not None:
            block = source.randbytes(min(size, 1 << 20))
            for start in range(0, size, len(block)):
                view[start : start + len(block)] = block[: size - start]
            view[:8] = source.randbytes(8)
        out.append(view)
        at += length
    return out


def wait_until(what: Any, seconds: float) -> Any:
    """What `what` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy:
    """Forwards TCP connections to `target`; can cut them, refuse new ones, or stop the flow of bytes."""

    def __init__(self, target: tuple[str, int], address: str = "127.0.0.1") -> None:
        self._target = target
        self._listener = socket.create_server((address, 0))
        self.port = int(self._listener.getsockname()[1])
        self._flow = threading.Event()
        self._flow.set()
        self._refuse = False
        self._cut_after: int | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, refuse: bool = False) -> None:
        """Reset all connections; with `refuse`, also every new one."""
        self._refuse = refuse
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut_after(self, nbytes: int) -> None:
        """Cut the connection once so many more bytes have come back from the store."""
        self._cut_after = nbytes

    def hang(self) -> None:
        """Keep connections, pass nothing on."""
        self._flow.clear()

    def restore(self) -> None:
        """Work again."""
        self._refuse, self._cut_after = False, None
        self._flow.set()

    def close(self) -> None:
        self.restore()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refuse:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, 5)
            except OSError:
                client.close()
                continue
            self._pairs.append((client, server))
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # no 40 ms of our own making
                self._flow.wait()
                if back and self._cut_after is not None:
                    data, self._cut_after = data[: self._cut_after], self._cut_after - len(data)
                    if self._cut_after <= 0:
                        sink.sendall(data)
                        self._cut_after = None
                        break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def closing(tier: Tier) -> Iterator[Tier]:
    try:
        yield tier
    finally:
        tier.close()
