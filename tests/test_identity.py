"""Keys depend on content alone, on all of it, and on nothing of the process."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.identity import KEY_BYTES, ChainHasher, encode_extra, file_digest, fingerprint, group_keys

NAMESPACE = bytes(range(32))

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None, exclude_categories=[]))
    | st.binary()
)
EXTRAS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8)
TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)


def keys_of(tokens: list[int], extras: list[bytes | None] | None = None, chunk: int = 4) -> list[bytes]:
    hasher = ChainHasher(NAMESPACE, chunk)
    hasher.extend(tokens, extras)
    return [hasher.keys(index, index + 1) for index in range(hasher.chunks)]


def same(one: Any, other: Any) -> bool:
    """Whether two extras are the same value of the same type, throughout."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return type(one) is type(other) and one == other


ELSEWHERE = """
import json
from kvkeep.identity import ChainHasher, encode_extra, fingerprint, group_keys
space = fingerprint({"model": "m", "dtype": "bf16", "layers": ["a", "b"], "tp": 2, "scale": 0.5, "x": None})
hasher = ChainHasher(space, 16)
hasher.extend(list(range(640)), [encode_extra(("salt", i, {"a", "b"} and b"y")) for i in range(40)])
print(json.dumps([space.hex(), hasher.keys(0, 40).hex(), group_keys(hasher.keys(0, 40), space, 1).tobytes().hex()]))
"""


def test_keys_do_not_depend_on_the_process() -> None:
    seen = set()
    for seed in ("0", "1", "4242"):
        env = {"PYTHONHASHSEED": seed, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE], env=env, capture_output=True, text=True, timeout=60, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(json.loads(seen.pop())[1]) == 40 * KEY_BYTES * 2


def test_golden_values() -> None:
    """A change here orphans every stored byte: raise identity.FORMAT, and say so in the changelog."""
    space = fingerprint({"model": "m", "groups": [[16, 128]], "tp": 1})
    hasher = ChainHasher(space, 16)
    extras: list[bytes | None] = [None, encode_extra(("salt", 3)), *[None] * 18]
    hasher.extend(list(range(320)), extras)
    assert space.hex() == "GOLDEN_SPACE"
    assert hasher.keys(0, 1).hex() == "GOLDEN_FIRST"
    assert hasher.keys(19, 20).hex() == "GOLDEN_LAST"
    assert group_keys(hasher.keys(19, 20), space, 2).tobytes().hex() == "GOLDEN_GROUP"
    extra = (None, True, -7, 0.5, "é", b"\0", ())
    assert encode_extra(extra).hex() == "GOLDEN_EXTRA"


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 40)), chunk=st.integers(1, 5), data=st.data())
def test_piece_by_piece_is_the_same_as_in_one_go(
    tokens: list[int], cuts: list[int], chunk: int, data: st.DataObject
) -> None:
    count = len(tokens) // chunk
    extras = data.draw(st.none() | st.lists(st.none() | st.binary(), min_size=count, max_size=count))
    hasher = ChainHasher(NAMESPACE, chunk)
    for cut in [*sorted(cuts), len(tokens)]:
        start = hasher.chunks
        rest = None if extras is None else extras[start:]
        hasher.extend(tokens[start * chunk : max(cut, start * chunk)], rest)
    assert hasher.chunks == count
    assert hasher.keys(0, count) == b"".join(keys_of(tokens, extras, chunk))


@pytest.mark.parametrize("chunk", [1, 16, 100, 248, 249, 1000])
def test_piece_by_piece_over_many_chunks(chunk: int) -> None:
    """Long enough to pass any boundary inside the hash."""
    tokens = np.random.default_rng(chunk).integers(0, 2**31, 12 * max(chunk, 40) + 3).tolist()
    whole, pieces = ChainHasher(NAMESPACE, chunk), ChainHasher(NAMESPACE, chunk)
    whole.extend(tokens)
    for end in range(chunk, len(tokens) + 1, chunk):
        pieces.extend(tokens[end - chunk : end])
    count = len(tokens) // chunk
    assert whole.chunks == pieces.chunks == count
    assert whole.keys(0, count) == pieces.keys(0, count)
    assert len({whole.keys(index, index + 1) for index in range(count)}) == count


@given(tokens=TOKENS, data=st.data())
def test_a_key_stands_for_every_token_before_it(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[at] ^= data.draw(st.integers(1, 2**31 - 1))
    before, after = keys_of(tokens), keys_of(other)
    assert before[: at // 4] == after[: at // 4]
    assert not set(before[at // 4 :]) & set(after)


@given(one=st.tuples(TOKENS, EXTRAS | st.just(...)), two=st.tuples(TOKENS, EXTRAS | st.just(...)), at=st.integers(0, 9))
@example(one=([0, 0], ...), two=([0, 0], None), at=0)
@example(one=([0, 0], ""), two=([0, 0], b""), at=0)
def test_different_tokens_or_extras_are_different_keys(one: Any, two: Any, at: int) -> None:
    def last_key(tokens: list[int], extra: Any) -> tuple[int, bytes]:
        extras: list[bytes | None] = [None] * len(tokens)
        extras[at % len(tokens)] = None if extra is ... else encode_extra(extra)
        return len(tokens), keys_of(tokens, extras, 1)[-1]

    equal = one[0] == two[0] and (one[1] is two[1] is ... or (... not in (one[1], two[1]) and same(one[1], two[1])))
    assert (last_key(*one) == last_key(*two)) == equal


@given(tokens=st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=6), split=st.integers(1, 5), extra=st.binary())
def test_bytes_cannot_move_between_extras_and_tokens(tokens: list[int], split: int, extra: bytes) -> None:
    """The same bytes, said once as tokens and once as an extra key, are different prefixes."""
    split = min(split, len(tokens) - 1)
    packed = struct.pack(f"<{len(tokens) - split}i", *tokens[split:])
    as_tokens = keys_of(tokens, [None] * len(tokens), 1)[-1]
    as_extra = keys_of(tokens[:split], [*[None] * (split - 1), packed], 1)[-1]
    after_extra = keys_of(tokens[:split], [*[None] * (split - 1), extra], 1)[-1]
    before_tokens = keys_of(tokens, [*[None] * (split - 1), extra, *[None] * (len(tokens) - split)], 1)[-1]
    assert len({as_tokens, as_extra, before_tokens}) == 3
    assert after_extra not in (as_tokens, before_tokens)


@given(one=st.lists(st.none() | st.binary(max_size=9), min_size=3, max_size=3), two=st.lists(st.none() | st.binary(max_size=9), min_size=3, max_size=3))
@example(one=[b"ab", b"c", None], two=[b"a", b"bc", None])
@example(one=[b"", None, None], two=[None, b"", None])
def test_an_extra_belongs_to_its_chunk(one: list[bytes | None], two: list[bytes | None]) -> None:
    assert (keys_of([1, 1, 1], one, 1)[-1] == keys_of([1, 1, 1], two, 1)[-1]) == (one == two)


@pytest.mark.parametrize("token", [-1, 2**31, -(2**31), 2**40])
def test_a_token_that_cannot_be_is_an_error_and_changes_nothing(token: int) -> None:
    hasher = ChainHasher(NAMESPACE, 2)
    with pytest.raises(struct.error):
        hasher.extend([1, 2, 3, token])
    assert hasher.chunks == 0
    hasher.extend([1, 2])
    assert hasher.keys(0, 1) == keys_of([1, 2], chunk=2)[0]


@given(one=EXTRAS, two=EXTRAS)
@settings(max_examples=300)
@example(one=("a", "b"), two=("ab",))
@example(one=(("a",), "b"), two=(("a", "b"),))
@example(one=1, two=True)
@example(one=1, two=1.0)
@example(one=0.0, two=-0.0)
@example(one="1", two=1)
@example(one=b"x", two="x")
@example(one=None, two=())
@example(one=(None, None), two=((None,), None))
def test_an_encoded_extra_tells_its_value(one: Any, two: Any) -> None:
    assert (encode_extra(one) == encode_extra(two)) == same(one, two)


def test_a_list_is_a_tuple() -> None:
    assert encode_extra([1, ["a", None]]) == encode_extra((1, ("a", None)))


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1, 2}, 1j, bytearray(b"x"), np.int64(1), ("fine", [object()])])
def test_what_has_no_canonical_encoding_is_not_cached(value: Any) -> None:
    with pytest.raises(TypeError):
        encode_extra(value)


def test_a_fingerprint_tells_every_field() -> None:
    base = {"model": "m", "layers": ["a", "b"], "window": None, "scale": 1.0, "mla": False}
    others = [
        {},
        base | {"model": "n"},
        base | {"layers": ["b", "a"]},
        base | {"layers": ["a", "b", "c"]},
        base | {"layers": "ab"},
        base | {"window": 0},
        base | {"window": "null"},
        base | {"scale": 1},
        base | {"mla": 0},
        base | {"more": None},
        base | {"model": {"m": 1}},
    ]
    prints = {fingerprint(one) for one in [base, *others]}
    assert len(prints) == len(others) + 1
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base), "the order of fields says nothing"
    assert all(len(one) == 32 for one in prints)


@pytest.mark.parametrize("value", [b"x", object(), {1, 2}, {1: "a"}, [{None: 1}], float("nan"), float("inf")])
def test_a_fingerprint_of_what_cannot_be_told_apart_is_an_error(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"field": value})


def test_groups_have_keys_of_their_own() -> None:
    base = b"".join(keys_of(list(range(16))))
    tables = [group_keys(base, NAMESPACE, group) for group in range(64)]
    tables += [group_keys(base, bytes(32), group) for group in range(64)]
    assert all(table.shape == (4, 2) and table.dtype == np.uint64 for table in tables)
    assert len({row.tobytes() for table in tables for row in table}) == 128 * 4
    assert np.array_equal(tables[5], group_keys(base, NAMESPACE, 5))
    assert group_keys(b"", NAMESPACE, 0).shape == (0, 2)


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    """Two files, of four MiB and of a few bytes."""
    large, small = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    large.write_bytes(np.random.default_rng(0).bytes((4 << 20) + 100))
    small.write_bytes(b"small")
    return [large, small]


def test_a_changed_mib_is_another_model(weights: list[Path]) -> None:
    seen = {file_digest(weights)}
    for mib in range(5):
        with weights[0].open("r+b") as file:
            file.seek((mib << 20) + 50)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        seen.add(file_digest(weights))
    assert len(seen) == 6


def test_names_sizes_and_number_of_files_count(weights: list[Path]) -> None:
    before = file_digest(weights)
    assert file_digest(weights[::-1]) == before
    seen = {before, file_digest(weights[:1]), file_digest([])}
    with weights[0].open("ab") as file:
        file.write(b"x")
    seen.add(file_digest(weights))
    weights[1] = weights[1].rename(weights[1].with_name("model-3.safetensors"))
    seen.add(file_digest(weights))
    assert len(seen) == 5


def test_files_elsewhere_are_the_same_model(weights: list[Path]) -> None:
    before = file_digest(weights)
    moved = weights[0].parent / "other"
    moved.mkdir()
    assert file_digest([path.rename(moved / path.name) for path in weights]) == before
