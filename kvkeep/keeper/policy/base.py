"""The interface of eviction policies.

A policy orders the chunks of ONE size class and says which to give up; it owns no memory of the
arena and does no I/O. It is told of chunks by their record id: a small integer, dense, used again
after `remove`. Chunks arrive in pieces of a prompt's chain, and a chunk is worth nothing once a
chunk before it is gone, so every policy gives up the tail of a chain before its head.

At a reservation the keeper calls `insert` with the newcomers and, if there is no room for them all,
`victims` with the shortage. Newcomers are evictable like any other chunk: a newcomer that comes back
as a victim is refused admission, which keeps a long prompt from evicting its own head. Then it
calls `remove` with what it did give up.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_Scalar = TypeVar("_Scalar", bound=np.generic)

NO_IDS: Ids = np.empty(0, dtype=np.int64)
NO_IDS.flags.writeable = False


class Policy(ABC):
    """Decides which chunks of one size class to give up.

    Not thread-safe: the keeper's event loop owns it. Arrays passed in stay the caller's and are not
    kept; arrays returned are the caller's. `len(policy)` is the number of chunks it holds, which
    passes `capacity` between an `insert` and the `remove` that makes room for it.
    """

    name: ClassVar[str]

    def __init__(self, capacity: int) -> None:
        """Start empty, for at most `capacity` chunks (1 or more, or ValueError)."""
        if capacity < 1:
            raise ValueError(f"capacity is {capacity} chunks; a policy needs at least 1")
        self.capacity = capacity
        """Chunks that the caller means to hold at most."""

    @abstractmethod
    def __len__(self) -> int:
        """How many chunks are held."""

    @abstractmethod
    def insert(self, ids: Ids, keys: list[int], epoch: int, first: int) -> None:
        """Add chunks that are not held.

        `ids`: shape [n], in chain order. `keys`: n numbers below 2**60 that stand for the content and
        are the same when it comes back under another id. `epoch`: the logical clock of the request, 0
        or more; it need not be the newest one seen. `first`: position of `ids[0]` in its chain.
        """

    @abstractmethod
    def touch(self, ids: Ids, epoch: int, first: int) -> None:
        """Note one hit on a piece of a chain, once a request. Arguments as for `insert`; all are held."""

    @abstractmethod
    def victims(self, count: int, evictable: Flags) -> Ids:
        """Return the `count` chunks to give up, first the one worth least; or none at all.

        `evictable` is indexed by record id and covers every id held. The result has shape [count], or
        [0] when fewer than `count` held chunks are evictable. Nothing observable changes until
        `remove`: asked again at once, it answers the same.
        """

    @abstractmethod
    def remove(self, ids: Ids, evicted: bool) -> None:
        """Forget chunks that are held. `evicted`: given up for room, so a policy that remembers what it
        evicted does; False when the user deleted them or their save was aborted."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not balance. Slow: for tests."""


def grown(array: npt.NDArray[_Scalar], ids: Ids, fill: int) -> npt.NDArray[_Scalar]:
    """Return `array`, or a copy at least twice as long with room for `ids`, filled up with `fill`."""
    size = int(ids.max(initial=-1)) + 1
    if size <= len(array):
        return array
    longer = np.full(max(size, 2 * len(array)), fill, dtype=array.dtype)
    longer[: len(array)] = array
    return longer
