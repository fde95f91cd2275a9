"""A session of the keeper that a rank has joined: its connection, and the copy engine over its arena."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent import futures
from typing import TYPE_CHECKING, cast

from kvkeep.engines.search import Search
from kvkeep.engines.vllm.metadata import NOWHERE, Place, Rank
from kvkeep.errors import KeeperUnavailable, KVKeepError
from kvkeep.transfer import Transfer
from kvkeep.wire.client import Connection

if TYPE_CHECKING:
    from kvkeep.transfer.cuda import CudaTransfer

__all__ = ["Joined", "Joining"]

log = logging.getLogger("kvkeep.vllm")


class Joined:
    """One session of one rank. The engine's thread calls it, and those that wait for copies `tell`."""

    def __init__(self, epoch: int, connection: Connection, transfer: Transfer) -> None:
        self.epoch = epoch
        self.place: Place = (connection.keeper, epoch)
        self.connection = connection
        self.transfer = transfer
        self.device = cast("CudaTransfer", transfer) if transfer.name == "cuda" else None
        self.last: futures.Future[float] | None = None
        """The last load of a whole request that was begun; with its end all of them have ended."""
        self._ending: threading.Thread | None = None
        self._talking = threading.Lock()

    @property
    def leaving(self) -> bool:
        """Whether this rank has left: nothing that it saves is to be taken for good any more."""
        return self._ending is not None

    @property
    def closed(self) -> bool:
        """Whether this rank has left, or has lost the keeper."""
        return self._ending is not None or self.connection.closed

    def tell(self, rank: Rank, send: Callable[[Connection], None]) -> None:
        """Send what needs no answer; a keeper that is gone is a session that is left."""
        if self.leaving:
            return
        try:
            with self._talking:
                send(self.connection)
        except KeeperUnavailable as error:
            self.close()
            log.warning("kvkeep: rank %s lost the keeper at %s: %s", rank, self.connection.path, error)

    def close(self, wait: float = 0.0) -> None:
        """Leave. The claims that protect slots end with the connection, so copies under way end before it,
        on another thread; `wait`: seconds for that."""
        if self._ending is None:
            last = self.last  # looked at once: it may be the caller, and is not to wait for itself
            self._ending = threading.Thread(target=self._end, args=(last,), name="kvkeep-end", daemon=True)
            if self.device is not None or (last is not None and not last.done()):
                self._ending.start()
            else:
                self._end(None)
        if wait and self._ending.is_alive():
            self._ending.join(wait)

    def _end(self, last: futures.Future[float] | None) -> None:
        if last is not None:
            futures.wait([last])
        try:
            self.transfer.close()
        finally:  # a device that is broken holds no claim
            with self._talking:
                self.connection.close()


class Joining:
    """Joins later sessions in the background, until one is in, or another is asked for. The engine's thread.

    `join(keeper, epoch)` raises KVKeepError or OSError, also where another keeper is there.
    """

    def __init__(self, join: Callable[[str, int], Joined]) -> None:
        self._join = join
        self._wanted = NOWHERE
        self._search: Search[Joined] | None = None
        self._told = ""

    def begin(self, place: Place) -> None:
        """Join this one from here on, and no other."""
        if self._wanted != place:
            self.stop()
            self._wanted = place
            self._search = Search(lambda: self._try(place), lambda found: found.close(), at_once=True)

    def take(self, place: Place) -> Joined | None:
        """The session, once, when it was joined; it is the caller's."""
        return self._search.take() if self._search is not None and self._wanted == place else None

    def stop(self) -> None:
        """Join none any more; what nobody has taken is left."""
        self._wanted = NOWHERE
        if self._search is not None:
            self._search.stop()

    def _try(self, place: Place) -> Joined:
        try:
            return self._join(*place)
        except (KVKeepError, OSError) as error:
            if str(error) != self._told:  # else the log has it
                self._told = str(error)
                log.warning("kvkeep: session %d cannot be joined yet: %s", place[1], error)
            raise KeeperUnavailable(str(error)) from error
