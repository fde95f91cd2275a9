"""Loads of whole requests on one rank, beside the engine's steps: each request waits for its own.

One thread of ours does them, one after the other: on a CPU it copies, on a GPU it waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from kvkeep.engines.vllm.joined import Joined
from kvkeep.engines.vllm.metadata import Copies, Rank
from kvkeep.errors import KeeperUnavailable

__all__ = ["Apart"]


class Apart:
    """All of one rank that are under way. The engine's thread calls it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "kvkeep-loads")
        self._under_way: dict[str, tuple[Future[float], Copies] | None] = {}

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
            for lease in copies.claims:
                joined.tell(rank, lambda link, lease=lease: link.release(lease, reader))  # type: ignore[misc]
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
        """Forget one that has ended: its seconds and what was copied; None where it was refused. Raises what
        went wrong."""
        load = self._under_way.pop(name)
        return None if load is None else (load[0].result(), load[1])
