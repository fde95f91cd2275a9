"""What is remembered of lookups: right, and no more of it after many."""

import gc
import tracemalloc
from collections import Counter

import numpy as np

from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Answer
from kvkeep.observe.watch import Seen, Watch
from kvkeep.terms import GroupSpec
from tests.observe.traffic import keys_of

PAGE = 4096


class Asker:
    """An engine that looks up and saves, in this process, and a watch on its keeper."""

    def __init__(self, *groups: GroupSpec, tiers: tuple[str, ...] = ("fast", "slow")) -> None:
        self.now = 1000.0
        self.keeper = Keeper(256 * PAGE, "lru")
        self.keeper.attach("engine:1")
        spec = groups or (GroupSpec(PAGE, None),)
        self.space = self.keeper.open_namespace(bytes(32), "m", spec, 1, 1, 16)
        self.watch = Watch(self.keeper, tiers, clock=lambda: self.now)

    def ask(
        self,
        keys: bytes,
        first: int = 0,
        settles: int = 0,
        ticket: int = 0,
        tiers: Counter[int] | None = None,
    ) -> None:
        found = self.keeper.lookup("engine:1", self.space, keys, first)
        if found.lease:
            self.keeper.release("engine:1", found.lease, None)
        answer = Answer(first, len(keys) // 16 - first, found.chunks, tiers or Counter())
        if not ticket:
            self.keeper.answered(self.space, b"", answer)
        self.watch.looked_up(Seen("engine:1", self.space, keys, answer, settles, ticket, 0, ""), 1e-4)

    def save(self, keys: bytes) -> None:
        wanted = [[True] * (len(keys) // 16)] * len(self.space.groups)
        done = self.keeper.reserve("engine:1", self.space, keys, wanted, 0, 0)
        if done.reservation:
            self.keeper.commit("engine:1", done.reservation, 0)


def test_a_request_that_waited_for_tiers_is_one_line() -> None:
    one = Asker()
    one.save(keys_of(1, 4))
    one.ask(keys_of(1, 10), first=1, ticket=7)
    (line,) = one.watch.requests()
    assert (line["state"], line["local"], line["memory"], line["tiers"]) == ("waits", 1, 3, {})
    assert one.watch.prefixes() == []
    for number in range(200, 350):  # many others while it waits
        one.ask(keys_of(number, 1))
    one.save(keys_of(1, 8))  # as if it had come from below
    one.ask(keys_of(1, 10), first=1, settles=7, tiers=Counter({0: 3, 1: 1}))
    assert len(one.watch.requests()) == 100
    assert one.keeper.counters.tier_chunks == {0: 3, 1: 1}
    (prefix,) = one.watch.prefixes()
    assert (prefix["chunks"], prefix["tokens"], prefix["uses"]) == (8, 128, 1)


def test_where_a_requests_chunks_came_from() -> None:
    one = Asker()
    one.save(keys_of(1, 8))
    one.ask(keys_of(1, 10), first=1, ticket=7)
    one.ask(keys_of(1, 10), first=1, settles=7, tiers=Counter({0: 3, 1: 1}))
    (line,) = one.watch.requests()
    assert (line["state"], line["chunks"], line["local"], line["memory"]) == ("", 10, 1, 3)
    assert line["tiers"] == {"fast": 3, "slow": 1}


def test_a_request_that_gives_up_waits_no_more() -> None:
    one = Asker()
    one.ask(keys_of(1, 3), ticket=99)
    one.watch.gave_up(98)
    assert [line["state"] for line in one.watch.requests()] == ["waits"]
    one.watch.gave_up(99)
    assert [line["state"] for line in one.watch.requests()] == ["gave up"]


def test_a_request_for_which_nobody_asked_is_a_line_too() -> None:
    one = Asker()
    one.watch.missed("engine:1", one.space, Answer(1, 2, 0, Counter()))
    (line,) = one.watch.requests()
    assert (line["state"], line["chunks"], line["local"], line["memory"]) == ("", 3, 1, 0)
    assert one.watch.seconds.sum == 0, "no lookup took any time"


def test_a_prefix_that_the_engine_had_is_not_found_here() -> None:
    one = Asker()
    one.save(keys_of(1, 5))
    one.ask(keys_of(1, 5), first=5)
    assert one.watch.prefixes() == []
    one.ask(keys_of(1, 5), first=4)
    assert [prefix["chunks"] for prefix in one.watch.prefixes()] == [5]


def test_engines_have_readable_names() -> None:
    one = Asker()
    for session in (
        "llama-a:3",
        "6f9619ff-8b86-d011-b42d-00cf4fc964ff_dp1:0",
        f"transformers-{'ab' * 16}-77:1",
    ):
        one.watch.looked_up(
            Seen(session, one.space, keys_of(1, 1), Answer(0, 1, 0, Counter()), 0, 0, 0, ""), 1e-4
        )
    names = [line["engine"] for line in reversed(one.watch.requests())]
    assert names == ["llama-a", "6f9619ff_dp1", "transformers-abababab-77"]


def test_bytes_of_a_prefix_with_a_sliding_window() -> None:
    one = Asker(GroupSpec(PAGE, None), GroupSpec(2 * PAGE, 3))
    one.save(keys_of(1, 10))
    one.ask(keys_of(1, 10))
    assert one.watch.prefixes()[0]["bytes"] == 10 * PAGE + 3 * 2 * PAGE


def test_history() -> None:
    one = Asker()
    one.watch.sample()
    one.save(keys_of(1, 4))
    one.ask(keys_of(1, 5))
    one.now += 15
    one.watch.sample()
    assert [tuple(sample) for sample in one.watch.history] == [
        (1000.0, 0, 0, 0, 0),
        (1015.0, 5, 4, 0, 4 * PAGE),
    ]


def test_what_is_heavy_stays_while_much_passes() -> None:
    one = Asker()
    one.save(keys_of(0, 8))
    for number in range(1, 2000):
        one.save(keys_of(number, 1))
        one.ask(keys_of(number, 1))
        if number % 10 == 0:
            one.ask(keys_of(0, 8))
    first = one.watch.prefixes()[0]
    assert (first["chunks"], first["uses"]) == (8, 199)


def test_many_lookups_leave_no_growth_in_memory() -> None:
    """`benchmarks/watched.py soak` does this with a million of them, on a whole keeper."""
    one, random = Asker(), np.random.default_rng(1)
    one.save(keys_of(0, 9))
    answer = Answer(0, 10, 9, Counter({0: 1}))

    def some(count: int) -> int:
        for number in range(count):
            seen = Seen("engine:1", one.space, random.bytes(160), answer, 0, number % 5, 0, "")
            one.watch.looked_up(seen, 1e-4)
            one.watch.looked_up(seen._replace(settles=number % 5, ticket=0), 1e-4)
            if number % 32 == 0:
                one.watch.sample()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = some(10_240)  # a multiple of 128: the table of prefixes is as full afterwards as before
        after = some(10_240)
    finally:
        tracemalloc.stop()
    assert after - before < 10_240, "a byte that stays of each lookup"
