"""What the keeper knows of each namespace, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvkeep.identity import SPACE_BYTES
from kvkeep.terms import GroupSpec

__all__ = ["Counters", "Namespace"]


@dataclass
class Counters:
    """What happened so far. Asked and hit chunks count once per prompt position; all others once per
    KV-cache group, as slots do."""

    lookups: int = 0
    asked_chunks: int = 0
    hit_chunks: int = 0
    stored_chunks: int = 0
    stored_bytes: int = 0
    fetched_chunks: int = 0
    refused_chunks: int = 0
    evicted_chunks: int = 0
    aborted_chunks: int = 0


@dataclass(frozen=True)
class Namespace:
    """A namespace that some engine has opened."""

    number: int
    fingerprint: bytes
    label: str
    groups: tuple[GroupSpec, ...]
    parts: int
    """Ranks that write a part of each chunk."""
    readers: int
    """Ranks that read each chunk (more than `parts` where ranks hold the same KV)."""
    chunk_tokens: int = 0
    """Tokens of a chunk, for people; 0: not known."""
    counters: Counters = field(default_factory=Counters)

    @property
    def prefix(self) -> bytes:
        """With which the names of its chunks begin where namespaces mix."""
        return self.fingerprint[:SPACE_BYTES]
