"""Tenants: what each holds is booked, a quota bounds it at its own cost only, and there may be any number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import ConfigError, RequestRefused
from kvkeep.identity import tenant_of
from kvkeep.keeper import tenants
from kvkeep.keeper.fetch import Fetches
from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.policy import POLICIES
from kvkeep.keeper.tenants import Tenants, first_to_go
from kvkeep.terms import GroupSpec
from tests.keeper.test_fetch import Below, everything
from tests.keeper.test_keeper import PAGE, SMALL, chain_keys, opened

A, B = tenant_of("a"), tenant_of("b")
CHUNK = 2 * PAGE
ROOM = SMALL // CHUNK


def keeper_with(*quotas: str, policy: str = "lru") -> tuple[Keeper, Namespace]:
    keeper = Keeper(SMALL, policy, quotas=quotas)
    keeper.attach("s")
    return keeper, opened(keeper, "one", [GroupSpec(CHUNK, None)])


def save(keeper: Keeper, space: Namespace, chain: int, length: int, tenant: bytes = b"") -> list[bool]:
    """Which chunks of a prompt were admitted."""
    epoch = keeper.lookup("s", space, b"").epoch
    done = keeper.reserve("s", space, chain_keys(chain, length), [[True] * length], 0, epoch, tenant)
    if done.reservation:
        keeper.commit("s", done.reservation, 0)
    keeper.check_integrity()
    return [offset >= 0 for offset in done.offsets[0].tolist()]


def held(keeper: Keeper, space: Namespace, chain: int, length: int) -> int:
    found = keeper.lookup("s", space, chain_keys(chain, length))
    if found.lease:
        keeper.release("s", found.lease, None)
    return found.chunks


def figures(keeper: Keeper, tenant: bytes) -> dict:
    (row,) = [
        row for row in keeper.tenants.report([keeper.tenants.number(tenant)]) if row["tenant"] != "others"
    ]
    return row


@pytest.mark.parametrize("policy", POLICIES)
def test_above_its_quota_a_tenant_s_own_oldest_go_and_nobody_else_s(policy: str) -> None:
    keeper, space = keeper_with(f"{A.hex()}={10 * CHUNK}", policy=policy)
    save(keeper, space, 0, 12)
    save(keeper, space, 2, 8, B)
    for chain in range(4, 16, 2):
        assert save(keeper, space, chain, 5, A) == [True] * 5
        assert figures(keeper, A)["used_bytes"] <= 10 * CHUNK
    assert (held(keeper, space, 0, 12), held(keeper, space, 2, 8)) == (12, 8)
    assert [held(keeper, space, chain, 5) for chain in range(4, 16, 2)] == [0, 0, 0, 0, 5, 5]
    assert figures(keeper, A)["evicted_chunks"] == keeper.counters.evicted_chunks == 20
    assert keeper.arena.available(keeper.arena.size_class(CHUNK)) == ROOM - 30


def test_of_one_prompt_the_tail_goes_first() -> None:
    keeper, space = keeper_with(f"{A.hex()}={10 * CHUNK}")
    save(keeper, space, 0, 10, A)
    save(keeper, space, 2, 3, A)
    assert (held(keeper, space, 0, 10), held(keeper, space, 2, 3)) == (7, 3)


def test_a_prompt_longer_than_the_quota_keeps_its_head() -> None:
    keeper, space = keeper_with(f"default={10 * CHUNK}")
    assert save(keeper, space, 0, 30, A) == [True] * 10 + [False] * 20
    assert figures(keeper, A)["refused_chunks"] == 20
    assert save(keeper, space, 2, 12, B) == [True] * 10 + [False] * 2  # each has a quota of its own
    assert (held(keeper, space, 0, 30), held(keeper, space, 2, 12)) == (10, 10)
    assert all(save(keeper, space, 4, 20))  # and what has no salt has none


def test_where_all_of_a_tenant_s_is_in_use_it_is_refused() -> None:
    keeper, space = keeper_with(f"{A.hex()}={10 * CHUNK}")
    save(keeper, space, 0, 10, A)
    save(keeper, space, 2, 10)
    reading = keeper.lookup("s", space, chain_keys(0, 10))
    assert save(keeper, space, 4, 3, A) == [False] * 3
    assert keeper.counters.evicted_chunks == 0
    keeper.release("s", reading.lease, None)
    assert save(keeper, space, 4, 3, A) == [True] * 3
    assert held(keeper, space, 2, 10) == 10


def test_what_is_reserved_counts_until_it_is_given_back() -> None:
    keeper, space = keeper_with(f"{A.hex()}={10 * CHUNK}")
    writing = keeper.reserve("s", space, chain_keys(0, 10), [[True] * 10], 0, 1, A)
    assert figures(keeper, A)["chunks"] == 10
    assert save(keeper, space, 2, 3, A) == [False] * 3
    keeper.abort("s", writing.reservation)
    assert figures(keeper, A)["used_bytes"] == 0
    assert save(keeper, space, 2, 3, A) == [True] * 3


def test_a_large_quota_gives_up_a_little_more_than_it_must() -> None:
    """Looking for the oldest is a scan of all records: not at each chunk."""
    keeper = Keeper(64 << 20, "lru", quotas=[f"{A.hex()}={1280 * PAGE}"])
    keeper.attach("s")
    space = opened(keeper, "one", [GroupSpec(PAGE, None)])
    for chain in range(0, 256, 2):
        assert all(save(keeper, space, chain, 10, A))
    save(keeper, space, 256, 1, A)
    assert figures(keeper, A)["chunks"] == 1280 - 1280 // 64


def test_one_tenant_s_chunks_are_cleared() -> None:
    keeper, space = keeper_with()
    two = opened(keeper, "two", [GroupSpec(PAGE, None)])
    for at, (where, tenant) in enumerate(((space, A), (space, B), (two, A), (space, b""))):
        save(keeper, where, 2 * at, 4, tenant)
    assert keeper.clear(None, tenant_of("nobody")) == 0
    assert keeper.clear(two, A) == 4
    assert keeper.clear(None, A) == 4
    assert [held(keeper, space, chain, 4) for chain in (0, 2, 6)] == [0, 4, 4]
    assert (figures(keeper, A)["chunks"], figures(keeper, B)["chunks"]) == (0, 4)
    keeper.check_integrity()


def test_what_comes_from_a_tier_counts_for_the_tenant_that_asked() -> None:
    keeper, space = keeper_with(f"{A.hex()}={6 * CHUNK}")
    fetches = Fetches(keeper)
    found = keeper.lookup("s", space, chain_keys(0, 10))
    fetch = fetches.begin("s", space, chain_keys(0, 10), 0, found.epoch, A)
    Below(space, 0, 10, everything([GroupSpec(CHUNK, None)], 10)).determine(fetch)
    for batch in fetches.plan(fetch, lambda needs, chunks: True):
        fetches.landed(batch, np.ones(len(batch.records), np.bool_))
    keeper.check_integrity()
    row = figures(keeper, A)
    assert (row["chunks"], row["fetched_chunks"], row["refused_chunks"]) == (6, 6, 4)


def test_hits_and_misses() -> None:
    books = Tenants()
    books.asked(A, 10, 4)
    books.asked(A, 5, 5)
    books.asked(B, 3, 0)
    books.asked(b"", 100, 100)
    rows = books.report(books.first())
    assert [(row["tenant"], row["asked_chunks"], row["hit_chunks"]) for row in rows] == [
        (A.hex(), 15, 9),
        (B.hex(), 3, 0),
    ]
    assert rows[0]["quota_bytes"] is None


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eight are told apart, and the first three of them keep their numbers."""
    monkeypatch.setattr(tenants, "_MOST", 10)
    monkeypatch.setattr(tenants, "_KEPT", 3)


def test_there_may_be_any_number_of_them(few: None) -> None:
    books = Tenants()
    for number in range(100):
        books.asked(tenant_of(f"t{number}"), 2, 1)
    rows = books.report(books.first(3))
    assert [row["tenant"] for row in rows] == [tenant_of(f"t{n}").hex() for n in range(3)] + ["others"]
    assert [row["asked_chunks"] for row in rows] == [2, 2, 2, 194]
    assert [row["hit_chunks"] for row in rows] == [1, 1, 1, 97]
    assert len(books.report(books.heaviest(2))) == 3
    books.check_integrity(np.zeros(0, np.uint16), np.zeros(0, np.int64))


def test_those_that_hold_something_keep_their_books(few: None) -> None:
    keeper, space = keeper_with(f"default={4 * CHUNK}")
    for number in range(12):
        save(keeper, space, 2 * number, 3, tenant_of(f"t{number}"))
    rows = keeper.tenants.report(keeper.tenants.heaviest(20))
    assert [row["chunks"] for row in rows] == [3] * 8 + [4], "all others share one quota"
    with pytest.raises(RequestRefused, match="not told apart"):
        keeper.clear(None, tenant_of("t11"))
    assert keeper.clear(None, tenant_of("t5")) == 3
    save(keeper, space, 30, 3, tenant_of("new"))  # takes the number of one that holds nothing
    assert figures(keeper, tenant_of("new"))["chunks"] == 3
    assert held(keeper, space, 6, 3) == 3
    keeper.clear(None)
    keeper.check_integrity()


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(0, 30),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_oldest_go(chunks: list[tuple[int, int]], newcomers: int, data: st.DataObject) -> None:
    newcomers = min(newcomers, len(chunks))
    ages, sizes = (np.array(column, np.int64) for column in zip(*chunks, strict=True))
    nbytes, spare = data.draw(st.integers(1, int(sizes.sum()))), data.draw(st.integers(0, 20))
    going = first_to_go(ages, sizes, newcomers, nbytes, spare).tolist()
    assert len(set(going)) == len(going)
    freed = [int(sizes[going[:count]].sum()) for count in range(len(going) + 1)]
    needed = next(count for count, total in enumerate(freed) if total >= nbytes)
    left = [age for at, age in enumerate(ages.tolist()) if at not in going]
    assert not left or max(ages[going].tolist()) <= min(left)
    extra = going[needed:]
    assert all(at < len(chunks) - newcomers for at in extra), "a newcomer goes for nothing"
    assert not extra or freed[-1] <= nbytes + spare


def test_a_salt_has_one_name_and_it_is_no_salt() -> None:
    assert tenant_of(None) == tenant_of("") == b""
    assert tenant_of("acme") == tenant_of("acme") != tenant_of("acme ")
    assert len(tenant_of("\udcff" * 1000)) == 8
    assert b"acme" not in tenant_of("acme")


@pytest.mark.parametrize(
    ("quota", "said"),
    [
        ("acme=1GiB", "no tenant"),
        (A.hex().upper() + "=1GiB", "no tenant"),
        (A.hex(), "not a size"),
        (f"{A.hex()}=much", "not a size"),
        ("default", "not a size"),
        ("=1GiB", "no tenant"),
    ],
)
def test_what_is_no_quota(quota: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Tenants([quota])
