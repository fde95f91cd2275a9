"""The keeper's parts by themselves: key table, usable prefix, arena."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import ConfigError
from kvkeep.keeper.arena import ALIGNMENT, Arena
from kvkeep.keeper.index import KeyTable
from kvkeep.keeper.usable import usable_chunks

# Few distinct low and high words, so that probes collide in position, in tag, and in both.
words = st.sampled_from([0, 1, 2, 1 << 20, 1 << 33, (1 << 33) + 1, 5 << 32, (1 << 64) - 1])
keys = st.tuples(words, words)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["insert", "remove", "find"]), st.lists(keys, max_size=12, unique=True))
    )
)
def test_the_key_table_is_a_dict(operations) -> None:
    table, model, free = KeyTable(4), {}, list(range(500, -1, -1))
    for what, batch in operations:
        if what == "insert":
            new = [key for key in batch if key not in model]
            records = [free.pop() for _ in new]
            table.insert(as_keys(new), np.array(records, np.int64))
            model |= dict(zip(new, records, strict=True))
        elif what == "remove":
            old = [key for key in batch if key in model]
            records = [model.pop(key) for key in old]
            table.remove(np.array(records, np.int64))
            free += records
        assert table.find(as_keys(batch)).tolist() == [model.get(key, -1) for key in batch]
        assert len(table) == len(model)
        table.check_integrity()


def as_keys(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.uint64).reshape(-1, 2)


@given(
    st.integers(0, 9).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    st.data(),
)
def test_usable_is_what_the_definition_says(held, data) -> None:
    windows = data.draw(st.lists(st.none() | st.integers(1, 4), min_size=len(held), max_size=len(held)))

    def good(end: int) -> bool:
        return all(
            all(row[0 if window is None else max(0, end - window) : end])
            for row, window in zip(held, windows, strict=True)
        )

    longest = max(end for end in range(len(held[0]) + 1) if good(end))
    assert usable_chunks([np.array(row, np.bool_) for row in held], windows) == longest


def test_an_arena_gives_each_byte_once() -> None:
    arena = Arena(64 * ALIGNMENT)
    small, large = arena.size_class(100), arena.size_class(ALIGNMENT + 1)
    taken = arena.allocate(small, 10).tolist() + [
        place for start in arena.allocate(large, 1000).tolist() for place in (start, start + ALIGNMENT)
    ]
    assert len(set(taken)) == len(taken) == 10 + 2 * large.slots
    assert max(taken) < arena.nbytes
    assert arena.available(large) == 0
    arena.check_integrity()
    with pytest.raises(ConfigError, match="does not fit"):
        arena.size_class(arena.slab_bytes + 1)
    with pytest.raises(ConfigError, match="too small"):
        Arena(ALIGNMENT)
