"""An engine's tie to a keeper: found, lost, and found again in the background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvkeep.config import EngineConfig
from kvkeep.engines.search import Search
from kvkeep.errors import KeeperUnavailable, KVKeepError
from kvkeep.wire.client import Connection
from kvkeep.wire.launch import embedded_socket, ensure_keeper

__all__ = ["Identity", "Link", "Opened", "connect", "session_name"]


def session_name(engine_id: str, epoch: int) -> str:
    """One engine's session with one keeper; all its processes use the same."""
    return f"{engine_id}:{epoch}"


def connect(config: EngineConfig, engine_id: str, epoch: int, *, arena: bool) -> Connection:
    """Connect to the configured keeper, or to the private one, which is started if need be.

    Raises KVKeepError: KeeperUnavailable also where this process is out of descriptors or memory.
    """
    socket = config.socket or embedded_socket(engine_id)
    session = session_name(engine_id, epoch)
    try:
        if config.socket is None:
            ensure_keeper(socket, config)
        return Connection.open(socket, session, arena=arena, presence=not arena, timeout=config.timeout)
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


class Identity(NamedTuple):
    """What `Link` needs to open our namespace anywhere: see `Connection.open_namespace`."""

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
        self._search: Search[Opened] | None = None
        self._over = False

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
        self._identity = self._identity._replace(fingerprint=fingerprint)

    def renew(self, opened: Opened) -> Opened:
        """The same connection in the namespace that is ours now. Raises KVKeepError."""
        if opened.fingerprint == self._identity.fingerprint:
            return opened
        return self._open_on(opened.connection, opened.epoch)

    def _open_on(self, connection: Connection, epoch: int) -> Opened:
        number = connection.open_namespace(*self._identity)
        return Opened(connection, number, epoch, self._identity.fingerprint)

    def reopen(self, epoch: int) -> None:
        """Begin to look for a keeper in the background, unless all is over; `fresh` will tell."""
        if not self._over:
            self._search = Search(lambda: self.open(epoch), lambda found: found.connection.close())

    def fresh(self) -> Opened | None:
        """What the background search has found, once."""
        return None if self._search is None else self._search.take()

    def stop(self) -> None:
        """The engine ends: no search any more; what one found is closed unless `fresh` has given it away."""
        self._over = True
        if self._search is not None:
            self._search.stop()
