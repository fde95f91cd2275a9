"""The keeper's socket: one event loop owns all state, a connection is a frame parser.

The arena is a memfd that only the connections of our own user are handed; when the last process
that maps it is gone, so is it: nothing in /dev/shm, no port, nothing to clean up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from kvkeep import __version__, pages
from kvkeep.background import GiveWay
from kvkeep.config import KeeperConfig
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.leases import ClaimKind
from kvkeep.keeper.movers import Movers
from kvkeep.observe.watch import Watch
from kvkeep.presence import Presence
from kvkeep.tiers.open import open_tiers
from kvkeep.tiers.seal import SEAL_BYTES
from kvkeep.wire.connection import ServerConnection
from kvkeep.wire.listen import listen
from kvkeep.wire.peers import Peers
from kvkeep.wire.record import Recorder

__all__ = ["KeeperServer"]

log = logging.getLogger("kvkeep.keeper")

_NEWEST_SHOWN = 16  # of the namespaces that hold nothing: a reset makes a new one each time
_TENANTS_SHOWN = 16
_PREFAULT_STEP = 4 << 20
_HUGE_TRIES = 16  # in vain, one after the other: the kernel has no room, and looks for it long


class KeeperServer:
    """Serves one keeper on one unix socket until `stop` or, if told so, until nobody is left."""

    def __init__(self, config: KeeperConfig) -> None:
        self.config = config
        tiers = open_tiers(config.tiers)
        sealed = bool(tiers) or config.peers is not None
        trailer = SEAL_BYTES if sealed else 0
        self.keeper = Keeper(config.memory, config.policy, trailer, config.tenant_quotas)
        self.identity = uuid.uuid4().hex
        self.started = time.time()
        self.prefaulted, self.huge = 0, self.keeper.arena.nbytes if config.huge_pages else 0
        """Bytes of the arena that are allocated, and how many of them the kernel made huge pages of."""
        self.errors: Counter[str] = Counter()
        """Clients dropped and requests refused, by kind."""
        self.watch: Watch | None = None
        """Told of every lookup, where somebody looks on."""
        self.ready = False
        """Whether clients are served: not before the socket is there, nor while what is held is drained."""
        self.connections: set[ServerConnection] = set()
        self._had_client = False
        self._stopping = asyncio.Event()
        self.arena_fd = pages.create(self.keeper.arena.nbytes, config.huge_pages)
        self._memory = pages.map_shared(self.arena_fd, self.keeper.arena.nbytes) if sealed else None
        self.presence = Presence(config.memory, not (tiers or config.record or config.traces))
        self.keeper.chunks.presence = self.presence
        self.movers, self.peers = None, None
        if self._memory is not None and config.peers is not None:
            self.peers = Peers(config.peers, self.keeper, self._memory, self._post)
        if self._memory is not None and tiers:
            self.movers = Movers(self.keeper, tiers, self._memory, self._post)
        self.recorder: Recorder | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Bind, serve, and clean up. Raises ConfigError where the socket cannot be had."""
        path = Path(self.config.socket)
        listener = listen(path)
        inode = path.stat().st_ino
        threading.Thread(target=self._prefault, name="kvkeep-prefault", daemon=True).start()
        loop = self._loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: ServerConnection(self), sock=listener, start_serving=False
        )
        try:
            if self.config.record is not None:
                self.recorder = Recorder(self.config.record)
                self.recorder.start()
            if self.peers is not None:
                self.peers.start()
            if self.movers is not None:
                self.movers.start()
            await server.start_serving()
            self.ready = True
            ready()
            await self._until_done()
        finally:
            self.ready = False
            if self.movers is not None:
                self.movers.reading = False
            if self.peers is not None:
                self.peers.close()
            server.close()
            for connection in list(self.connections):
                connection.close()
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == inode:  # a successor may have bound the path already
                    path.unlink()
            if self.recorder is not None:
                self.recorder.close()
            if self.movers is not None:
                await self._drain(self.movers)

    def stop(self) -> None:
        """Ask `run` to return. From the event loop's thread."""
        self._stopping.set()

    def opened(self, connection: ServerConnection) -> None:
        """A connection has said hello."""
        self.connections.add(connection)
        self._had_client = True

    def figures(self, tenant: bytes = b"") -> dict[str, object]:
        """What `kvkeep status` shows; `tenant`: one to be shown besides those that hold most."""
        keeper = self.keeper
        chunks, used = keeper.usage()
        return {
            "version": __version__,
            "keeper": self.identity,
            "pid": os.getpid(),
            "socket": self.config.socket,
            "uptime_s": round(time.time() - self.started, 1),
            "policy": self.config.policy,
            "memory_bytes": keeper.arena.nbytes,
            "prefaulted_bytes": self.prefaulted,
            "huge_page_bytes": self.huge,
            "used_bytes": int(used.sum()),
            "chunks": len(keeper.chunks),
            "index_bytes": keeper.chunks.nbytes,
            "leases": keeper.claims.count(ClaimKind.LEASE),
            "reservations": keeper.claims.count(ClaimKind.RESERVATION),
            "sessions": keeper.claims.sessions,
            "connections": len(self.connections),
            "protocol_errors": self.errors["protocol"] + self.errors["silent"],
            "counters": vars(keeper.counters),
            "recorded": None if self.recorder is None else self.recorder.figures(),
            "tiers": [] if self.movers is None else self.movers.figures(),
            "tenants": keeper.tenants.report(keeper.tenants.heaviest(_TENANTS_SHOWN, tenant)),
            "peers": None if self.peers is None else self.peers.figures(),
            "namespaces": [
                {
                    "namespace": space.number,
                    "fingerprint": space.fingerprint.hex(),
                    "label": space.label,
                    "chunk_tokens": space.chunk_tokens,
                    "chunks": held,
                    "used_bytes": nbytes,
                    **vars(space.counters),
                }
                for space, held, nbytes in zip(keeper.namespaces, chunks.tolist(), used.tolist(), strict=True)
                if held or space.number >= len(keeper.namespaces) - _NEWEST_SHOWN
            ],
        }

    def _post(self, call: Callable[[], None]) -> None:
        """Run a call on the event loop; from the movers' threads."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            assert self._loop is not None
            self._loop.call_soon_threadsafe(call)

    async def _drain(self, movers: Movers) -> None:
        """Write what was committed and is not below yet, for as long as the operator allows."""
        deadline, told = time.monotonic() + self.config.drain, 0.0
        while movers.unwritten and time.monotonic() < deadline:
            if time.monotonic() - told > 1.0:
                told = time.monotonic()
                about = {"chunks": movers.unwritten}
                log.info("writing %(chunks)d chunks to the tiers before the end", about)
            movers.tick()
            await asyncio.sleep(0.02)
        if movers.unwritten:
            left = {"chunks": movers.unwritten, "drain": self.config.drain}
            log.warning("ended with %(chunks)d chunks unwritten: give --drain more than %(drain)g s", left)
        movers.close()

    async def _until_done(self) -> None:
        idle_since = time.monotonic()
        while not self._stopping.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 0.5)
            if self.movers is not None:
                self.movers.tick()
            if self.connections:
                idle_since = time.monotonic()
            patience = self.config.linger if self._had_client else max(60.0, self.config.linger)
            if self.config.linger and time.monotonic() - idle_since > patience:
                log.info("no engine is left: this embedded keeper ends")
                return

    def _prefault(self) -> None:
        """Allocate the arena's pages ahead of use: touching fresh memory is ten times slower."""
        total, give_way = self.keeper.arena.nbytes, GiveWay()
        memory = pages.map_shared(self.arena_fd, total) if self._memory is None else self._memory
        place, failed = pages.address(memory), 0
        while self.config.prefault and self.prefaulted < total and not self._stopping.is_set():
            step = min(_PREFAULT_STEP, total - self.prefaulted)
            try:
                huge = failed < _HUGE_TRIES
                made = pages.allocate(self.arena_fd, place, self.prefaulted, step, huge)
            except OSError as error:
                log.warning(
                    "only %.1f of %.1f GiB of the arena could be prepared ahead (%s): give --memory less",
                    self.prefaulted / 2**30,
                    total / 2**30,
                    error.strerror,
                )
                return
            self.huge, failed = self.huge + made, 0 if made else failed + 1
            if self._memory is not None:  # movers use it
                pages.populate(place + self.prefaulted, step)
            self.prefaulted += step
            give_way()
