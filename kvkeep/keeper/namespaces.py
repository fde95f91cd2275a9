"""What the keeper knows of each namespace, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.identity import SPACE_BYTES
from kvkeep.terms import GroupSpec

__all__ = ["Answer", "Counters", "Namespace"]


class Answer(NamedTuple):
    """What came of one request, in chunks: each counts once, in however many KV-cache groups."""

    local: int
    """That its engine had."""
    asked: int
    """Beyond those."""
    found: int
    """Of those asked for."""
    tiers: Counter[int]
    """Of those found, the ones that tiers gave while the request waited. The others were in memory."""


@dataclass
class Counters:
    """What happened so far. Lookups are as they come, chunks of answers as `Answer` has them; all others
    count once per KV-cache group, as slots do."""

    lookups: int = 0
    local_chunks: int = 0
    asked_chunks: int = 0
    hit_chunks: int = 0
    tier_chunks: Counter[int] = field(default_factory=Counter)
    """Of hits, those that each tier gave."""
    stored_chunks: int = 0
    stored_bytes: int = 0
    fetched_chunks: int = 0
    refused_chunks: int = 0
    evicted_chunks: int = 0
    aborted_chunks: int = 0

    def add(self, answer: Answer) -> None:
        """A request has its answer."""
        self.local_chunks += answer.local
        self.asked_chunks += answer.asked
        self.hit_chunks += answer.found
        self.tier_chunks.update(answer.tiers)


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
