"""The interface of tiers: places below the arena that keep chunks as sealed values.

A tier moves whole values between the caller's buffers and its medium, in batches, and knows
nothing of what they mean. Verbs block; movers call them from threads of their own, several at
once, so a tier is thread-safe, bounds every wait by its own timeout, and releases the GIL in bulk
operations. A batch fails as a whole only with TierUnavailable; all else is a result per key.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvkeep import identity

__all__ = [
    "KEY_BYTES",
    "Buffer",
    "Capabilities",
    "Check",
    "Got",
    "Key",
    "Listing",
    "Put",
    "Seal",
    "Tier",
    "Usage",
    "key_name",
    "unchecked",
]

Key: TypeAlias = bytes
"""24 bytes: the first 8 of the namespace's fingerprint, then the 16 of the chunk key."""
KEY_BYTES = identity.SPACE_BYTES + identity.KEY_BYTES

Buffer: TypeAlias = memoryview
"""Contiguous bytes (format "B") of the caller's. In the arena they start at a page, and their length is a
multiple of a page; a tier may take advantage of that, and must not rely on it."""


Seal: TypeAlias = Callable[[Key, Buffer], None]
"""Writes the seal of a value into its last bytes."""
Check: TypeAlias = Callable[[Key, Buffer], bool]
"""Whether a value is, bit for bit, what was sealed under its key."""


def unchecked(key: Key, value: Buffer) -> bool:
    """Whatever it is."""
    return True


class Got(enum.Enum):
    """What became of one `get`."""

    HIT = "hit"
    MISS = "miss"
    DAMAGED = "damaged"
    """A value is there, but not one of this length, or (where sealed) not the one that was put."""


class Put(enum.Enum):
    """What became of one `put`."""

    STORED = "stored"
    REFUSED = "refused"
    """No room for it, or larger than the store takes. Not an error: the cache goes on without."""
    LATER = "later"
    """Not now, for a reason that passes by itself and is none for reads: it is to be put again."""


@dataclass(frozen=True)
class Capabilities:
    """What a tier is like; fixed while it is open."""

    shared: bool
    """Other hosts may write to it: a key not put by us may be there."""
    persistent: bool
    """What was put outlives this process."""
    max_value_bytes: int | None = None
    """Longest value; longer ones are REFUSED."""
    concurrency: int = 2
    """Batches that it serves at once without making them slower."""
    readonly: bool = False
    """It takes no values: puts are REFUSED, and nothing is deleted."""
    live: bool = False
    """What it holds is what others compute just now, and asking costs little: who waits asks again soon."""


@dataclass(frozen=True)
class Usage:
    """Figures of the medium; None where it cannot tell."""

    used_bytes: int | None = None
    capacity_bytes: int | None = None
    values: int | None = None


class Tier(ABC):
    """One place. Keys in a batch are distinct; `buffers[i]` belongs to `keys[i]`, and stays the caller's.

    Raises TierUnavailable where the place cannot be reached, does not answer in time, or refuses us.
    Once a verb has returned or raised, it does not touch the caller's buffers any more, but for a `get`
    into attached memory that raises TierStillReads, which says when.
    """

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this tier is like."""

    def attach(self, memory: Buffer) -> None:  # noqa: B027 (most media need nothing)
        """Told once, before the first verb, of the memory that all buffers will lie in (for RDMA)."""

    overlaps = False
    """Whether it calls `seal_value` on each buffer just before it reads it, and `check_value` on each just
    after it filled it (one that fails is DAMAGED): in threads of its own, their cost hides behind I/O."""
    seal_value: Seal = staticmethod(lambda _key, _value: None)
    check_value: Check = staticmethod(unchecked)

    def overlap(self, seal: Seal, check: Check) -> bool:
        """Told once, before the first verb, what to seal and check with. Returns whether it will do so."""
        if self.overlaps:
            self.seal_value, self.check_value = seal, check
        return self.overlaps

    @abstractmethod
    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each key is held. A hint: it may be gone by the time of the `get`."""

    @abstractmethod
    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        """Fill each buffer with the value of its key. The content of a buffer is undefined unless HIT.

        Counts as a use of what was hit, where the tier evicts by itself; earlier keys outlive later ones.
        """

    @abstractmethod
    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """Store each buffer, whole or not at all; replaces what is there. STORED values are readable, and
        as durable as the tier is. Earlier keys outlive later ones where the tier evicts by itself."""

    @abstractmethod
    def delete(self, keys: Sequence[Key]) -> None:
        """Forget values; absent ones are fine."""

    def gone(self) -> list[Key]:
        """Keys of values that this process has removed from the medium since the last call, evicted or
        deleted, as far as it knows; one may have come back since. Raises nothing; called by one thread."""
        return []

    def usage(self) -> Usage:
        """How full it is, where the medium can tell. Called now and then, for people."""
        return Usage()

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and files. Verbs under way end, later ones raise TierUnavailable."""


class Listing(ABC):
    """What a tier may offer besides: going through all that it holds, for `kvkeep fsck`.

    A tier class that can do it inherits this too; without it, fsck says that the medium cannot be listed.
    Errors are those of the verbs.
    """

    @abstractmethod
    def keys(self) -> Iterator[tuple[Key, int]]:
        """Each key with the length of its value, in any order. What comes or goes meanwhile may be missed."""

    @abstractmethod
    def peek(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        """As `get`, but no use of the values: what is evicted next stays as it is."""

    def recount(self, correct: bool) -> Usage:
        """What the values really take, counted one by one; `correct`: the tier's own books say so from now
        on. For a tier that keeps no books: what is there."""
        lengths = [length for _, length in self.keys()]
        return Usage(used_bytes=sum(lengths), values=len(lengths))

    def leftovers(self) -> int:
        """Temporaries that dead writers left. A tier opened with `readonly` only counts them, else it has
        removed them when it was opened."""
        return 0


def key_name(key: Key) -> str:
    """The readable name of a key: namespace/chunk, in hexadecimal."""
    return f"{key[:8].hex()}/{key[8:].hex()}"
