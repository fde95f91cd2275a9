"""Claims on chunks: leases of readers, reservations of writers, and the sessions that hold them.

Both are promises made to the ranks of an engine: they end when every rank has reported, when
the engine takes the whole back, or when the last connection of its session has closed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvkeep.errors import RequestRefused
from kvkeep.keeper.index import Records

__all__ = ["Claim", "ClaimKind", "Claims", "Session"]


class ClaimKind(enum.Enum):
    """What a claim allows: reading leased chunks, or writing reserved ones."""

    LEASE = "lease"
    RESERVATION = "reservation"


@dataclass(eq=False)
class Claim:
    """One promise about `records`; `waiting` has a bit for each rank that has yet to report."""

    number: int
    kind: ClaimKind
    session: str
    records: Records
    waiting: int


@dataclass(eq=False)
class Session:
    """One engine's presence: its connections, and the claims that live as long as any of them."""

    name: str
    connections: int = 0
    claims: set[int] = field(default_factory=set)


class Claims:
    """All open claims and sessions. One owner, no locks."""

    def __init__(self) -> None:
        self._open: dict[int, Claim] = {}
        self._sessions: dict[str, Session] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, number: int) -> bool:
        return number in self._open

    def count(self, kind: ClaimKind) -> int:
        """Open claims of one kind."""
        return sum(claim.kind is kind for claim in self._open.values())

    @property
    def sessions(self) -> int:
        """Sessions with at least one connection."""
        return sum(not name.startswith("~") for name in self._sessions)  # not the movers

    def alive(self, session: str) -> bool:
        """Whether the session has a connection."""
        return session in self._sessions

    def held(self, session: str) -> bool:
        """Whether a session that has a connection has claims."""
        return bool(self._sessions[session].claims)

    def attach(self, session: str) -> None:
        """Count one more connection of a session, which begins with its first."""
        self._sessions.setdefault(session, Session(session)).connections += 1

    def detach(self, session: str) -> list[Claim]:
        """Count one connection less; with the last one, returns the claims that end with it."""
        entry = self._sessions[session]
        entry.connections -= 1
        if entry.connections:
            return []
        del self._sessions[session]
        return [self._open.pop(number) for number in sorted(entry.claims)]

    def open(self, kind: ClaimKind, session: str, records: Records, ranks: int) -> int:
        """Begin a claim that ends when `ranks` ranks have reported; returns its number."""
        claim = Claim(self._next, kind, session, records, (1 << ranks) - 1)
        self._next += 1
        self._open[claim.number] = claim
        self._sessions[session].claims.add(claim.number)
        return claim.number

    def report(self, kind: ClaimKind, session: str, number: int, rank: int | None) -> Claim | None:
        """One rank (None: all of them) is done; returns the claim if that ended it.

        Raises RequestRefused for a claim that is not this session's, not of this kind, or over.
        """
        claim = self._open.get(number)
        if claim is None or claim.session != session or claim.kind is not kind:
            raise RequestRefused(f"session {session!r} has no open {kind.value} {number}")
        claim.waiting &= 0 if rank is None else ~(1 << rank)
        if claim.waiting:
            return None
        del self._open[number]
        self._sessions[session].claims.discard(number)
        return claim

    def all(self, kind: ClaimKind) -> list[Claim]:
        """Open claims of one kind, for checks and status."""
        return [claim for claim in self._open.values() if claim.kind is kind]

    def check_integrity(self) -> None:
        """Raise AssertionError unless claims and sessions name each other."""
        listed = [number for session in self._sessions.values() for number in session.claims]
        assert sorted(listed) == sorted(self._open)
        assert all(claim.waiting for claim in self._open.values())
        assert all(session.connections > 0 for session in self._sessions.values())
