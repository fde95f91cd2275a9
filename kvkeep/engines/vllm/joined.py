"""A session of the keeper that a rank has joined: its connection, the copy engine over its arena; and loads
of whole requests, each of which waits for its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, cast

from kvkeep.background import Busy
from kvkeep.engines.search import Search
from kvkeep.engines.vllm.metadata import NOWHERE, Copies, Offered, Place, Rank
from kvkeep.errors import KeeperUnavailable, KVKeepError, RequestRefused
from kvkeep.terms import Reserved
from kvkeep.transfer import Transfer
from kvkeep.wire.client import Connection

if TYPE_CHECKING:
    from kvkeep.transfer.cuda import CudaTransfer

__all__ = ["Apart", "Joined", "Joining"]

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
        self.left = False
        """Not that it was lost: a keeper that is gone gives to nobody what was leased to us."""
        self._prepared = False
        self._ending: threading.Thread | None = None
        self._talking, self._closing = threading.Lock(), threading.Lock()

    def prepare(self, busy: Busy) -> None:
        """Once: have the mapping made fast to copy to. Not before the engine has captured its graphs: a call
        to the driver, from whatever thread, may break a capture."""
        if not self._prepared:
            self._prepared = True
            self.transfer.prepare(self.connection.arena_fd, busy)

    @property
    def leaving(self) -> bool:
        """Whether this rank has left: nothing that it saves is to be taken for good any more."""
        return self._ending is not None

    @property
    def closed(self) -> bool:
        """Whether this rank has left, or has lost the keeper."""
        return self._ending is not None or self.connection.closed

    def tell(self, rank: Rank, send: Callable[..., None], claims: Iterable[int], who: int) -> None:
        """Send what needs no answer about each claim."""
        if not self.leaving:
            with self._talk(rank):
                for claim in claims:
                    send(self.connection, claim, who)

    def reserved(self, rank: Rank, offered: Offered) -> list[Reserved]:
        """See `Connection.reserved`. Nothing where it was refused, or the keeper is gone."""
        with contextlib.suppress(RequestRefused), self._talk(rank):
            return self.connection.reserved(offered.ticket, offered.until)
        return []

    @contextlib.contextmanager
    def _talk(self, rank: Rank) -> Iterator[None]:
        """One thread at a time; a keeper that is gone is a session that is left."""
        try:
            with self._talking:
                yield
        except KeeperUnavailable as error:
            self.close()
            log.warning("kvkeep: rank %s lost the keeper at %s: %s", rank, self.connection.path, error)

    def close(self, wait: float = 0.0) -> None:
        """Leave. The claims that protect slots end with the connection, so copies under way end before it,
        on another thread; `wait`: seconds for that."""
        with self._closing:
            if self._ending is None:
                self.left = not self.connection.closed
                last = self.last  # looked at once: it may be the caller, and is not to wait for itself
                self._ending = threading.Thread(None, self._end, "kvkeep-end", (last,), daemon=True)
                if self.device is not None or (last is not None and not last.done()):
                    self._ending.start()
                else:
                    self._end(None)
        if wait and self._ending.is_alive():
            self._ending.join(wait)

    def _end(self, last: futures.Future[float] | None) -> None:
        if self.device is not None:
            self.device.backend.attend()
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


class Apart:
    """All of one rank that are under way. The engine's thread calls it; one of ours copies on a CPU, and
    waits for the device on a GPU. `attend`: see `Backend`."""

    def __init__(self, attend: Callable[[], None] | None = None) -> None:
        self._pool = futures.ThreadPoolExecutor(1, "kvkeep-loads", attend)
        self._under_way: dict[str, tuple[futures.Future[float], Copies] | None] = {}

    def begin(
        self, name: str, joined: Joined, copies: Copies, copy: Callable[[], float], rank: Rank, reader: int
    ) -> None:
        """Have `copy` done for a request; it returns its seconds when the bytes are there."""

        def load() -> float:
            claimed = False
            try:
                seconds = copy()
                claimed = not joined.connection.closed
            finally:
                if not claimed:
                    joined.close()  # so that the lease ends
            if not claimed:  # what was read may have been overwritten
                raise KeeperUnavailable("the connection to the keeper ended during a load")
            joined.tell(rank, Connection.release, copies.claims, reader)
            return seconds

        joined.last = self._pool.submit(load)
        self._under_way[name] = joined.last, copies

    def refuse(self, name: str) -> None:
        """This one cannot be begun: it has ended, and failed."""
        self._under_way[name] = None

    def ended(self) -> list[str]:
        """Requests whose loads have ended, well or not; each until `settle`."""
        return [name for name, load in self._under_way.items() if load is None or load[0].done()]

    def settle(self, name: str) -> tuple[float, Copies] | None:
        """Forget one that has ended: its seconds and what was copied; None where it was refused, or the
        keeper was lost. Raises what else went wrong."""
        load = self._under_way.pop(name)
        if load is None or isinstance(load[0].exception(), KeeperUnavailable):
            return None
        return load[0].result(), load[1]
