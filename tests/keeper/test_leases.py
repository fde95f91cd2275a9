"""Claims end once: with the last rank's word, the engine's, or the session's last connection."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.errors import RequestRefused
from kvkeep.keeper.leases import ClaimKind, Claims

RECORDS = np.arange(3)


def claims_with(*sessions: str) -> Claims:
    claims = Claims()
    for session in sessions:
        claims.attach(session)
    return claims


@given(ranks=st.integers(1, 70), data=st.data())
def test_a_claim_ends_with_the_last_rank(ranks: int, data: st.DataObject) -> None:
    claims = claims_with("s")
    number = claims.open(ClaimKind.LEASE, "s", RECORDS, ranks)
    order = data.draw(st.permutations(range(ranks)))
    for rank in order[:-1]:
        assert claims.report(ClaimKind.LEASE, "s", number, rank) is None
        assert claims.report(ClaimKind.LEASE, "s", number, rank) is None, "saying it twice changes nothing"
        assert claims.report(ClaimKind.LEASE, "s", number, ranks) is None, "nor does a rank that is not there"
        claims.check_integrity()
    ended = claims.report(ClaimKind.LEASE, "s", number, order[-1])
    assert ended is not None
    assert ended.records is RECORDS
    assert len(claims) == 0
    claims.check_integrity()
    with pytest.raises(RequestRefused):
        claims.report(ClaimKind.LEASE, "s", number, None)


def test_the_engine_can_end_it_for_all_ranks() -> None:
    claims = claims_with("s")
    number = claims.open(ClaimKind.RESERVATION, "s", RECORDS, 8)
    assert claims.report(ClaimKind.RESERVATION, "s", number, 3) is None
    ended = claims.report(ClaimKind.RESERVATION, "s", number, None)
    assert ended is not None
    assert ended.number == number


@pytest.mark.parametrize(
    ("kind", "session", "offset"),
    [(ClaimKind.RESERVATION, "s", 0), (ClaimKind.LEASE, "t", 0), (ClaimKind.LEASE, "s", 1)],
)
def test_nobody_ends_what_is_not_theirs(kind: ClaimKind, session: str, offset: int) -> None:
    claims = claims_with("s", "t")
    number = claims.open(ClaimKind.LEASE, "s", RECORDS, 1)
    with pytest.raises(RequestRefused, match="no open"):
        claims.report(kind, session, number + offset, None)
    assert claims.count(ClaimKind.LEASE) == 1
    claims.check_integrity()


def test_a_session_ends_with_its_last_connection() -> None:
    claims = claims_with("s", "s", "t")
    numbers = [claims.open(kind, "s", RECORDS, 2) for kind in ClaimKind]
    claims.open(ClaimKind.LEASE, "t", RECORDS, 2)
    assert claims.sessions == 2
    assert claims.detach("s") == []
    assert len(claims) == 3
    assert [claim.number for claim in claims.detach("s")] == numbers
    assert (len(claims), claims.sessions) == (1, 1)
    assert claims.count(ClaimKind.LEASE) == len(claims.all(ClaimKind.LEASE)) == 1
    assert claims.all(ClaimKind.RESERVATION) == []
    claims.check_integrity()


def test_a_number_is_never_used_again() -> None:
    claims = claims_with("s")
    seen = set()
    for _ in range(3):
        number = claims.open(ClaimKind.LEASE, "s", RECORDS, 1)
        assert number > 0, "0 means no claim on the wire"
        assert number not in seen
        seen.add(number)
        claims.report(ClaimKind.LEASE, "s", number, 0)
    claims.detach("s")
    claims.attach("s")
    assert claims.open(ClaimKind.LEASE, "s", RECORDS, 1) not in seen
