"""An engine's tie to a keeper: found, lost, and found again in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvkeep.config import EngineConfig
from kvkeep.errors import KeeperUnavailable, KVKeepError
from kvkeep.wire.client import Connection
from kvkeep.wire.launch import embedded_socket, ensure_keeper

__all__ = ["Identity", "Link", "Opened", "connect", "session_name"]

log = logging.getLogger("kvkeep.engines")

_RETRY_FIRST, _RETRY_MOST = 0.5, 10.0


def session_name(engine_id: str, epoch: int) -> str:
    """One engine's session with one keeper; all its processes use the same."""
    return f"{engine_id}:{epoch}"


def connect(
    config: EngineConfig, engine_id: str, epoch: int, *, arena: bool, device: bool = False
) -> Connection:
    """Connect to the configured keeper, or to the private one, which is started if need be.

    Raises KVKeepError: KeeperUnavailable also where this process is out of descriptors or memory.
    """
    socket = config.socket or embedded_socket(engine_id)
    session = session_name(engine_id, epoch)
    try:
        if config.socket is None:
            ensure_keeper(socket, config)
        return Connection.open(socket, session, arena=arena, device=device, timeout=config.timeout)
    except OSError as error:
        raise KeeperUnavailable(f"no keeper can be asked at {socket}: {error}") from error


@dataclass(frozen=True)
class Opened:
    """A connection with our namespace open on it."""

    connection: Connection
    namespace: int
    epoch: int
    fingerprint: bytes
    """Of the namespace."""


@dataclass(frozen=True)
class Identity:
    """What `Link` needs to open our namespace anywhere."""

    fingerprint: bytes
    label: str
    groups: Sequence[tuple[int, int | None]]
    parts: int
    readers: int
    chunk_tokens: int


class Link:
    """Opens the namespace at start, and again in a thread of its own each time it was lost.

    The engine calls `fresh` once a step or request: it costs an attribute read, never a wait.
    `arena`: whether this side copies too, and needs the arena's descriptor.
    """

    def __init__(
        self, config: EngineConfig, engine_id: str, identity: Identity, *, arena: bool = False
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self._identity = identity
        self._arena = arena
        self._opened: Opened | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of what was found, against the end of the search

    def open(self, epoch: int) -> Opened:
        """Connect now. Raises KVKeepError."""
        connection = connect(self._config, self._engine_id, epoch, arena=self._arena)
        try:
            return self._open_on(connection, epoch)
        except KVKeepError:
            connection.close()
            raise

    def rename(self, fingerprint: bytes) -> None:
        """Work in another namespace of the same geometry with whatever is opened from here on."""
        self._identity = replace(self._identity, fingerprint=fingerprint)

    def renew(self, opened: Opened) -> Opened:
        """The same connection in the namespace that is ours now. Raises KVKeepError."""
        if opened.fingerprint == self._identity.fingerprint:
            return opened
        return self._open_on(opened.connection, opened.epoch)

    def _open_on(self, connection: Connection, epoch: int) -> Opened:
        who = self._identity
        number = connection.open_namespace(
            who.fingerprint, who.label, who.groups, who.parts, who.readers, who.chunk_tokens
        )
        return Opened(connection, number, epoch, who.fingerprint)

    def reopen(self, epoch: int) -> None:
        """Begin to look for a keeper in the background; `fresh` will tell."""
        threading.Thread(target=self._search, args=(epoch,), name="kvkeep-reconnect", daemon=True).start()

    def fresh(self) -> Opened | None:
        """What the background search has found, once."""
        if self._opened is None:
            return None
        opened, self._opened = self._opened, None
        return opened

    def stop(self) -> None:
        """End a search; what it found is closed unless `fresh` has given it away."""
        with self._lock:
            self._stop.set()
            if (found := self.fresh()) is not None:
                found.connection.close()

    def _search(self, epoch: int) -> None:
        wait = _RETRY_FIRST
        while not self._stop.wait(wait):
            wait = min(2 * wait, _RETRY_MOST)
            if self._try(epoch):
                return

    def _try(self, epoch: int) -> bool:
        """Whether the search is over: a keeper was found, or it does not want us."""
        try:
            found = self.open(epoch)
        except KeeperUnavailable:
            return False
        except KVKeepError as error:
            log.warning("the keeper refuses this engine, which goes on without it: %s", error)
            return True
        with self._lock:
            if self._stop.is_set():
                found.connection.close()
            else:
                self._opened = found
        return True
