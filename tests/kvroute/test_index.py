"""The index against a slow model: per engine and medium, the set of prefixes that are held."""

import itertools
import random
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute.events import Cleared, Event, Removed, Stored
from kvroute.index import Held, Index

BLOCK = 4
MEDIA = ("GPU", "CPU", "STORAGE")


class Fleet:
    """Engines that store and remove blocks of prompts over few tokens, and the events that they send."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], set[tuple[int, ...]]] = {}
        self.names: dict[tuple[str, tuple[int, ...]], int] = {}
        self.nodes: dict[str, str] = {}

    def name(self, engine: str, prefix: tuple[int, ...]) -> int:
        """The engine's own name of the block that ends the prefix."""
        return self.names.setdefault((engine, prefix), len(self.names) + 1000)

    def store(self, engine: str, medium: str, tokens: list[int], start: int, stop: int) -> list[Event]:
        """Blocks start … stop-1 of a prompt; only where those before are held on some medium."""
        blocks = [tuple(tokens[: BLOCK * (i + 1)]) for i in range(len(tokens) // BLOCK)]
        start, stop = min(start, len(blocks)), min(stop, len(blocks))
        known = set().union(*(self.held.get((engine, one), set()) for one in MEDIA))
        while start > 0 and blocks[start - 1] not in known:
            start -= 1
        if start >= stop:
            return []
        # What a GPU computes follows what it has: it need not tell of that again.
        self.held.setdefault((engine, medium), set()).update(blocks[0 if medium == "GPU" else start : stop])
        parent = self.name(engine, blocks[start - 1]) if start else None
        names = [self.name(engine, block) for block in blocks[start:stop]]
        return [Stored(names, parent, tokens[BLOCK * start : BLOCK * stop], BLOCK, medium=medium)]

    def remove(self, engine: str, medium: str, at: int) -> list[Event]:
        held = sorted(self.held.get((engine, medium), ()))
        if not held:
            return []
        block = held[at % len(held)]
        self.held[engine, medium].discard(block)
        return [Removed([self.name(engine, block)], medium)]

    def clear(self, engine: str) -> list[Event]:
        for medium in MEDIA:
            self.held.pop((engine, medium), None)
        return [Cleared()]

    def lookup(self, tokens: list[int]) -> dict[str, Held]:
        found = {}
        for engine in {engine for engine, _ in self.held} | self.nodes.keys():
            reach, known = [], set[tuple[int, ...]]()
            node = [one for one, name in self.nodes.items() if name == self.nodes.get(engine)]
            for medium in MEDIA:
                for one in [engine, *(node if medium != "GPU" else [])]:
                    known |= self.held.get((one, medium), set())
                blocks = (tuple(tokens[: BLOCK * (i + 1)]) for i in range(len(tokens) // BLOCK))
                reach.append(BLOCK * sum(1 for _ in itertools.takewhile(known.__contains__, blocks)))
            if reach[2]:
                found[engine] = Held(reach[0], reach[1] - reach[0], reach[2] - reach[1])
        return found


ENGINES = st.sampled_from(["a", "b", "c"])
PROMPTS = st.lists(st.sampled_from([0, 1]), min_size=0, max_size=7 * BLOCK)
STEPS = st.one_of(
    st.tuples(
        st.just("store"), ENGINES, st.sampled_from(MEDIA), PROMPTS, st.integers(0, 6), st.integers(0, 7)
    ),
    st.tuples(st.just("remove"), ENGINES, st.sampled_from(MEDIA), st.integers(0, 50)),
    st.tuples(st.just("clear"), ENGINES),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=30), st.lists(PROMPTS, min_size=1, max_size=5))
def test_says_what_a_model_says(steps: list[tuple], prompts: list[list[int]]) -> None:
    fleet, index = Fleet(), Index()
    for action, engine, *rest in steps:
        index.apply(engine, getattr(fleet, action)(engine, *rest))
    assert (index.orphans, index.refused) == (0, 0)
    for tokens in [*prompts, *(step[3] for step in steps if step[0] == "store")]:
        assert index.lookup(tokens) == fleet.lookup(tokens)


@pytest.mark.parametrize("nodes", [0, 17])
def test_says_what_a_model_says_while_engines_become_more(nodes: int) -> None:
    """Past 64 and past 128, with blocks held since there were fewer; prompts of several pieces."""
    fleet, index, draw = Fleet(), Index(), random.Random(nodes)
    prompts = [prompt(length, length // 150) for length in (3, 90, 180, 200)]
    for count in (5, 63, 64, 65, 66, 127, 128, 129, 200):
        for number in range(count if count < 70 else 40, count, 1 if count < 70 else 5):
            engine = f"e{number}"
            if nodes:
                fleet.nodes[engine] = f"n{draw.randrange(nodes) ** 2 // nodes}"
                index.place(engine, fleet.nodes[engine])
        for _ in range(40):
            engine, medium = f"e{draw.randrange(count)}", draw.choice(MEDIA)
            events = fleet.remove(engine, "CPU", draw.randrange(1000))
            stop = draw.randrange(1, 210)
            events += fleet.store(engine, medium, draw.choice(prompts), draw.randrange(stop), stop)
            if draw.random() < 0.05:
                events += fleet.clear(engine)
            index.apply(engine, events)
        for tokens in prompts:
            assert index.lookup(tokens) == fleet.lookup(tokens)
    assert (index.orphans, index.refused) == (0, 0)


def prompt(blocks: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100_000) for _ in range(BLOCK * blocks)]


def stored(tokens: list[int], first: int = 0, **more: object) -> Stored:
    """All blocks of a prompt, named from `first` on."""
    more = {"parent_block_hash": None, "block_size": BLOCK, **more}
    return Stored(
        list(range(first, first + len(tokens) // int(more["block_size"]))), token_ids=tokens, **more
    )


def test_a_long_prompt_in_many_pieces() -> None:
    index, tokens = Index(), prompt(1000)
    index.apply("whole", [stored(tokens)])
    index.apply("some", [stored(tokens[: 700 * BLOCK])])
    index.apply("hole", [stored(tokens), Removed([300])])
    found = {name: held.tokens // BLOCK for name, held in index.lookup(tokens).items()}
    assert found == {"whole": 1000, "some": 700, "hole": 300}


def test_many_engines() -> None:
    index, tokens = Index(), prompt(300)
    for number in range(300):
        index.apply(f"e{number}", [stored(tokens[: BLOCK * (number + 1)])])
    assert index.lookup(tokens) == {f"e{n}": Held(BLOCK * (n + 1), 0, 0) for n in range(300)}
    for number in range(0, 300, 2):
        index.forget(f"e{number}")
    index.apply("new", [stored(tokens[:BLOCK])])
    assert index.lookup(tokens) == {
        "new": Held(BLOCK, 0, 0),
        **{f"e{n}": Held(BLOCK * (n + 1), 0, 0) for n in range(1, 300, 2)},
    }


def test_block_sizes_are_told_apart_and_the_longest_counts() -> None:
    index, tokens = Index(), prompt(16)
    index.apply("a", [stored(tokens[: 3 * BLOCK])])
    index.apply("a", [stored(tokens, 100, block_size=8 * BLOCK, medium="CPU")])
    index.apply("b", [stored(tokens, 100, block_size=8 * BLOCK)])
    assert index.lookup(tokens) == {"a": Held(3 * BLOCK, 13 * BLOCK, 0), "b": Held(16 * BLOCK, 0, 0)}
    assert index.lookup(tokens[: 15 * BLOCK])["b"].tokens == 8 * BLOCK


@pytest.mark.parametrize(
    ("medium", "held"),
    [
        (None, Held(4, 0, 0)),
        ("gpu", Held(4, 0, 0)),
        ("CPU_PINNED", Held(0, 4, 0)),
        ("disk", Held(0, 0, 4)),
        ("unheard of", Held(0, 0, 4)),
    ],
)
def test_media(medium: str | None, held: Held) -> None:
    index = Index()
    index.apply("a", [stored(prompt(1), medium=medium)])
    assert index.lookup(prompt(1)) == {"a": held}


def test_lora_salt_and_other_extra_keys_make_other_prefixes() -> None:
    index, tokens = Index(), prompt(2)
    index.apply("lora", [stored(tokens, lora_name="french", extra_keys=[["french"], ["french"]])])
    index.apply("salt", [stored(tokens, extra_keys=[["tenant"], None])])
    index.apply("both", [stored(tokens, lora_name="french", extra_keys=[["french", "tenant"], ["french"]])])
    index.apply("image", [stored(tokens, extra_keys=[None, [["cat.png", 3]]])])
    assert list(index.lookup(tokens)) == ["image"]
    assert index.lookup(tokens)["image"].tokens == BLOCK
    assert list(index.lookup(tokens, lora="french")) == ["lora"]
    assert list(index.lookup(tokens, extra="tenant")) == ["salt"]
    assert list(index.lookup(tokens, "french", ["tenant"])) == ["both"]
    assert index.lookup(tokens, lora="german", extra="tenant") == {}


def test_a_block_without_tokens_is_the_one_that_was_told_before() -> None:
    index, tokens = Index(), prompt(3)
    index.apply("a", [stored(tokens)])
    index.apply("a", [Stored([0, 1, 77], None, [], BLOCK, medium="CPU"), Removed([0, 1, 2])])
    assert index.lookup(tokens) == {"a": Held(0, 2 * BLOCK, 0)}
    assert index.orphans == 1
    # Of a block that the GPU has dropped the name is remembered.
    index.apply("a", [Stored([2], None, [], BLOCK, medium="CPU")])
    assert index.lookup(tokens) == {"a": Held(0, 3 * BLOCK, 0)}


def test_what_follows_an_unknown_block_is_passed_over() -> None:
    index, tokens = Index(), prompt(3)
    index.apply("a", [stored(tokens[:BLOCK]), stored(tokens[2 * BLOCK :], 2, parent_block_hash=1)])
    assert index.lookup(tokens) == {"a": Held(BLOCK, 0, 0)}
    assert index.orphans == 1


def test_after_lost_events_what_is_stored_finds_its_place() -> None:
    index, tokens = Index(), prompt(3)
    index.apply("a", [stored(tokens[: 2 * BLOCK])])
    index.clear("a")
    index.apply("a", [stored(tokens[2 * BLOCK :], 2, parent_block_hash=1)])
    assert index.orphans == 0
    assert index.lookup(tokens) == {"a": Held(3 * BLOCK, 0, 0)}  # so its beginning was held all the time
    index.clear("a")
    index.apply("a", [stored(tokens[2 * BLOCK :], 2, parent_block_hash=1, medium="CPU")])
    assert index.lookup(tokens) == {}  # of a CPU that cannot be said
    window = stored(tokens[2 * BLOCK :], 2, parent_block_hash=1, kv_cache_spec_kind="sliding_window")
    index.apply("b", [stored(tokens, kv_cache_spec_kind="sliding_window"), Removed([0, 1]), window])
    assert index.lookup(tokens) == {}  # nor of a sliding window


def test_of_a_hybrid_model_the_group_that_keeps_all_is_followed() -> None:
    def group(number: int, kind: str) -> Stored:
        return stored(tokens, group_idx=number, kv_cache_spec_kind=kind)

    index, tokens = Index(), prompt(3)
    index.apply("a", [group(0, "sliding_window"), group(1, "full_attention"), group(2, "full_attention")])
    index.apply("a", [Removed([0], group_idx=0), Removed([2], group_idx=2), Removed([1], group_idx=1)])
    assert index.lookup(tokens) == {"a": Held(BLOCK, 0, 0)}
    index.apply("b", [group(0, "sliding_window"), Removed([2], group_idx=0)])
    assert index.lookup(tokens)["b"] == Held(2 * BLOCK, 0, 0)


def contradictions() -> Iterator[Stored]:
    yield stored(prompt(2), block_size=BLOCK + 1)
    yield Stored([1], None, prompt(1), 0)
    yield Stored([1], None, prompt(1), -BLOCK)
    yield Stored([1], None, [-1, 2, 3, 4], BLOCK)
    yield Stored([1], None, [1 << 40, 2, 3, 4], BLOCK)
    yield Stored([1, 2], None, prompt(1), BLOCK)
    yield stored(prompt(2), extra_keys=[["salt"]])
    yield stored(prompt(1), extra_keys=[[{"a": 1}]])


@pytest.mark.parametrize("event", [*contradictions()])
def test_what_contradicts_itself_is_refused(event: Stored) -> None:
    index = Index()
    index.apply("a", [event, stored(prompt(1), 50)])
    assert index.refused == 1
    assert index.lookup(prompt(1)) == {"a": Held(BLOCK, 0, 0)}


def test_block_sizes_are_bounded() -> None:
    index = Index()
    index.apply("a", [stored(prompt(1)[:1] * size, size * 100, block_size=size) for size in range(1, 100)])
    assert index.refused == 99 - 16


def test_blocks_are_bounded_and_the_largest_engine_forgets_its_oldest() -> None:
    index = Index(most_blocks=640)
    index.apply("small", [stored(prompt(100, 1))])
    for number in range(100):
        index.apply("large", [stored(prompt(10, 2 + number), 10 * number)])
    assert index.blocks("small") + index.blocks("large") <= 640
    assert index.forgotten >= 460
    assert index.lookup(prompt(100, 1)) == {"small": Held(100 * BLOCK, 0, 0)}
    assert index.lookup(prompt(10, 2)) == {}
    assert index.lookup(prompt(10, 101)) == {"large": Held(10 * BLOCK, 0, 0)}


@pytest.mark.parametrize("tokens", [[-1] * BLOCK, [1 << 40] * BLOCK, ["a"] * BLOCK])
def test_what_is_no_token_is_an_error(tokens: list) -> None:
    with pytest.raises((OverflowError, TypeError)):
        Index().lookup(tokens)


def calls(do: Callable[[], object]) -> int:
    """How many functions are called, C's as well."""
    count = 0

    def counted(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("lose", ["clear", "forget"])
def test_what_is_lost_counts_no_more_at_once_and_is_swept_by_and_by(lose: str) -> None:
    """Whoever owns the index has more to do: no call may take as long as an engine has blocks."""
    index, tokens = Index(), prompt(5000)
    for name in ("a", "b"):
        index.apply(name, [stored(tokens)])
    assert calls(lambda: getattr(index, lose)("a")) < 100
    assert index.lookup(tokens) == {"b": Held(5000 * BLOCK, 0, 0)}
    assert index.blocks("a") == 0
    index.apply("a", [stored(tokens[: 4 * BLOCK], 9000)])
    assert index.lookup(tokens)["a"] == Held(4 * BLOCK, 0, 0)
    assert calls(lambda: index.apply("b", [])) < 5000
    for _ in range(5000 // 256 + 2):
        index.apply("b", [])
    index.forget("b")
    for _ in range(5000 // 256 + 2):
        index.apply("a", [])
    for table in index._holders._tables:
        assert len(table) == (4 if table else 0)
    index.apply("c", [stored(prompt(1, 7))])
    index.apply("d", [stored(prompt(1, 8))])
    assert len(index._holders.names) == 3  # the places of those that were swept are used again


def test_names_of_what_was_cleared_are_known_while_it_is_swept_and_after() -> None:
    index, tokens = Index(), prompt(2000)
    index.apply("a", [stored(tokens)])
    for sweeps in (0, 3, 20):
        index.clear("a")
        for _ in range(sweeps):
            index.apply("b", [])
        index.apply("a", [stored(tokens[-BLOCK:], 1999, parent_block_hash=1998)])
        assert index.orphans == 0
        assert index.lookup(tokens)["a"] == Held(2000 * BLOCK, 0, 0)


def test_ranks_of_an_engine_hold_each_its_own_and_the_best_counts() -> None:
    index, tokens = Index(), prompt(5)
    index.apply("a", [stored(tokens[: 2 * BLOCK])])
    index.apply("a", [stored(tokens)], rank=3)
    assert index.lookup(tokens) == {"a": Held(5 * BLOCK, 0, 0)}
    assert (index.blocks("a"), index.engines()) == (7, ["a"])
    index.apply("a", [Removed([0])])
    assert index.lookup(tokens) == {"a": Held(5 * BLOCK, 0, 0)}
    index.clear("a", 3)
    assert index.lookup(tokens) == {}
    index.apply("a", [stored(tokens)], rank=3)
    index.forget("a")
    assert (index.lookup(tokens), index.engines()) == ({}, [])


def test_engines_of_a_node_read_what_any_of_them_has_in_its_keeper() -> None:
    index, tokens = Index(), prompt(6)
    for name, node in (("a", "n"), ("b", "n"), ("c", "other"), ("d", "n")):
        index.place(name, node)
    index.apply("a", [stored(tokens[: 4 * BLOCK]), stored(tokens[: 3 * BLOCK], medium="CPU")])
    index.apply("a", [stored(tokens, medium="STORAGE")])
    index.apply("b", [stored(tokens[: 2 * BLOCK])])
    index.apply("c", [stored(tokens[:BLOCK])])
    assert index.lookup(tokens) == {
        "a": Held(4 * BLOCK, 0, 2 * BLOCK),
        "b": Held(2 * BLOCK, BLOCK, 3 * BLOCK),
        "c": Held(BLOCK, 0, 0),
        "d": Held(0, 3 * BLOCK, 3 * BLOCK),  # it has told nothing so far
    }
    index.clear("a")
    assert index.lookup(tokens) == {"b": Held(2 * BLOCK, 0, 0), "c": Held(BLOCK, 0, 0)}
    index.apply("a", [stored(tokens, medium="CPU")])
    index.forget("b", 0)  # started anew, on the same node
    index.place("d", None)
    assert index.lookup(tokens).keys() == {"a", "b", "c"}
