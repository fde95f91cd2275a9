"""The order in which policies put engines."""

import numpy as np
import pytest

from kvroute.backends import Backend, Engine
from kvroute.events import Stored
from kvroute.index import Index
from kvroute.policy import PLAIN, Ask, Choice, Expected, Kv, Policy


def backends(count: int) -> list[Backend]:
    return [Backend(Engine(f"10.0.0.{number}:8000", ""), up=True) for number in range(count)]


def names(choices: list) -> list[str]:
    return [choice.backend.name[7:].partition(":")[0] for choice in choices]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100_000, count, np.uint32)


class Kvs:
    """A kv policy over three engines, the first of which holds `held` tokens of a prompt on a medium."""

    def __init__(self, held: int = 0, medium: str = "GPU") -> None:
        self.index, self.clock = Index(), Clock()
        self.expected = Expected(self.clock, lasts=5.0)
        self.engines = backends(3)
        self.prompt = tokens(1600)
        if held:
            name = self.engines[0].name
            ids = self.prompt[:held].tolist()
            self.index.apply(name, [Stored(list(range(held // 16)), None, ids, 16, medium=medium)])
        self.policy = Kv(self.index, self.expected)

    def rank(self, ask: Ask) -> list[Choice]:
        return self.policy.rank(self.policy.look(ask), self.engines)

    def first(self, ask: Ask | None = None) -> str:
        return names(self.rank(ask or Ask(b"", tokens=self.prompt)))[0]


def test_round_robin() -> None:
    engines = backends(3)
    for turn, expected in enumerate("012012"):
        chosen = Policy(PLAIN["round-robin"]).rank(Ask(b""), engines)
        assert names(chosen)[0] == expected
        chosen[0].backend.picked = turn + 1


def test_a_hash_moves_only_what_it_must() -> None:
    engines = backends(5)
    keys = [f"session {number}" for number in range(200)]
    before = {key: names(Policy(PLAIN["session"]).rank(Ask(b"", key), engines))[0] for key in keys}
    assert set(before.values()) == set("01234")
    after = {key: names(Policy(PLAIN["session"]).rank(Ask(b"", key), engines[:-1]))[0] for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "4")


def test_without_a_session_the_idlest() -> None:
    engines = backends(3)
    engines[0].waiting, engines[1].streams = 2, 1
    assert names(Policy(PLAIN["session"]).rank(Ask(b""), engines)) == ["2", "1", "0"]


def test_prefix_hash_passes_over_who_is_overloaded() -> None:
    engines, ask = backends(3), Ask(b"x" * 5000)
    first, second, _ = names(Policy(PLAIN["prefix-hash"]).rank(ask, engines))
    assert names(Policy(PLAIN["prefix-hash"]).rank(Ask(b"x" * 4000 + b"y"), engines))[0] == first
    engines[int(first)].streams = 9
    assert names(Policy(PLAIN["prefix-hash"]).rank(ask, engines))[0] == second
    for one in engines:
        one.streams = 9
    assert names(Policy(PLAIN["prefix-hash"]).rank(ask, engines))[0] == first


def test_kv_prefers_who_holds_the_prefix_until_it_has_more_to_do() -> None:
    kv = Kvs(held=1280)
    choice = kv.rank(Ask(b"", tokens=kv.prompt))[0]
    assert (choice.backend, choice.held, choice.missing) == (kv.engines[0], 1280, 320)
    kv.engines[0].waiting_tokens = 1900
    assert kv.first() == "0"
    kv.engines[0].waiting_tokens = 1930
    assert kv.first() == "1"
    kv.engines[1].streams = kv.engines[2].streams = 2
    assert kv.first() == "0"


@pytest.mark.parametrize(("medium", "worth"), [("GPU", 1000), ("CPU", 800), ("STORAGE", 500)])
def test_kv_weighs_tiers(medium: str, worth: int) -> None:
    kv = Kvs(held=1600, medium=medium)
    kv.engines[0].waiting_tokens = 2400 * worth // 1000 - 1
    assert kv.first() == "0"
    kv.engines[0].waiting_tokens += 2
    assert kv.first() == "1"


def test_kv_knows_what_is_on_its_way() -> None:
    kv = Kvs()
    ask = Ask(b"", tokens=kv.prompt)
    kv.engines[0].picked = 1
    assert kv.first(ask) == "1"
    kv.expected.promise(ask, kv.engines[2].name)
    assert kv.first(ask) == "2"
    choice = kv.rank(Ask(b"", tokens=np.append(kv.prompt, kv.prompt)))[0]
    assert (choice.held, choice.missing) == (1600, 1600)
    for other in (ask._replace(salt="tenant"), ask._replace(lora="french"), Ask(b"", tokens=tokens(1600, 1))):
        assert kv.first(other) == "1"
    kv.clock.now += 5.0
    assert kv.first(ask) == "1"


def test_a_promise_that_ends_takes_nothing_from_a_later_one() -> None:
    kv = Kvs()
    ask = Ask(b"", tokens=kv.prompt)
    for _ in range(10):
        kv.expected.promise(ask, kv.engines[2].name)
        kv.clock.now += 1.0
    assert kv.rank(ask)[0].held == 1600
    kv.clock.now += 3.5  # the last was made four and a half seconds ago
    assert kv.rank(ask)[0].held == 1600
    kv.clock.now += 0.5
    assert kv.rank(ask)[0].held == 0


def test_what_an_engine_was_sent_is_forgotten_with_it() -> None:
    kv = Kvs()
    ask = Ask(b"", tokens=kv.prompt)
    for number in range(100):  # pods that come and go
        kv.expected.promise(ask, f"pod {number}")
        kv.expected.forget(f"pod {number}")
    assert kv.expected.lookup(ask) == {}
    kv.expected.promise(ask, "pod 0")
    assert list(kv.expected.lookup(ask)) == ["pod 0"]
    kv.clock.now += 4.0
    kv.expected.promise(ask, "pod 0")
    kv.clock.now += 4.0  # the first promises are over: they were those of others
    assert list(kv.expected.lookup(ask)) == ["pod 0"]


def test_a_prompt_is_looked_up_once_and_ranked_by_the_load_of_the_moment() -> None:
    kv = Kvs(held=1600)
    ask = kv.policy.look(Ask(b"", tokens=kv.prompt))
    kv.index.forget(kv.engines[0].name)
    assert kv.policy.rank(ask, kv.engines)[0].held == 1600
    kv.engines[0].waiting_tokens = 10_000
    assert names(kv.policy.rank(ask, kv.engines))[0] == "1"


def test_kv_keeps_adapters_and_salts_apart_in_promises() -> None:
    kv = Kvs()
    ask = Ask(b"", tokens=kv.prompt, lora="french", salt="tenant")
    kv.expected.promise(ask, kv.engines[2].name)
    assert kv.first(ask) == "2"
    assert kv.first(ask._replace(salt=None)) == "0"
    assert kv.first(ask._replace(lora=None)) == "0"


def test_kv_without_tokens_goes_by_the_text() -> None:
    kv = Kvs(held=1600)
    for text in (b"a", b"b", b"c", b"d"):
        wanted = names(Policy(PLAIN["prefix-hash"]).rank(Ask(text), kv.engines))
        assert names(kv.rank(Ask(text))) == wanted
