"""Keys name bytes: the same everywhere for equal content, and different for anything else."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.identity import ChainHasher, encode_extra, file_digest, fingerprint, group_keys

SPACE = fingerprint({"model": "m"})
extra_keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)
chunk = st.tuples(
    st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4), st.none() | st.binary(max_size=40)
)


def keys(chunks: list[tuple[list[int], bytes | None]]) -> bytes:
    hasher = ChainHasher(SPACE, 4)
    hasher.extend([token for tokens, _ in chunks for token in tokens], [extra for _, extra in chunks])
    return hasher.keys(0, len(chunks))


def test_keys_do_not_depend_on_the_process() -> None:
    script = (
        "from kvkeep.identity import *; h = ChainHasher(fingerprint({'b': [1, None], 'a': 'ü'}), 16);"
        "h.extend(list(range(64))); print(h.keys(0, 4).hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1", "777")
    }
    # Pinned: a change of this value makes every stored chunk unreachable, and must be meant.
    assert len(seen) == 1
    assert len(seen.pop()) == 128


@given(st.lists(chunk, min_size=1, max_size=6), st.integers(0, 6))
def test_feeding_in_pieces_is_feeding_at_once(chunks, cut) -> None:
    hasher = ChainHasher(SPACE, 4)
    for piece in (chunks[:cut], chunks[cut:]):
        hasher.extend([token for tokens, _ in piece for token in tokens], [extra for _, extra in piece])
    assert hasher.keys(0, len(chunks)) == keys(chunks)


@given(st.lists(chunk, min_size=1, max_size=4), st.lists(chunk, min_size=1, max_size=4))
def test_different_chains_have_different_keys(one, two) -> None:
    short = min(len(one), len(two))
    equal_to = next((i for i in range(short) if one[i] != two[i]), short)
    for index in range(short):
        same = keys(one)[16 * index : 16 * index + 16] == keys(two)[16 * index : 16 * index + 16]
        assert same == (index < equal_to)


def test_extra_keys_cannot_pose_as_tokens() -> None:
    plain = ChainHasher(SPACE, 4)
    extra = struct.pack("<4i", 5, 6, 7, 8)
    plain.extend([1, 2, 3, 4, 5, 6, 7, 8])
    assert keys([([1, 2, 3, 4], extra)]) not in (plain.keys(0, 1), plain.keys(1, 2))
    with pytest.raises(struct.error):
        plain.extend([-1, 2, 3, 4])
    with pytest.raises(struct.error):
        plain.extend([2**31, 2, 3, 4])


@given(extra_keys, extra_keys)
def test_extra_keys_are_encoded_one_to_one(one, two) -> None:
    same = repr(one) == repr(two)  # 1, 1.0 and True are equal to Python, not to us
    assert (encode_extra(one) == encode_extra(two)) == same


def test_what_has_no_canonical_form_is_not_encoded() -> None:
    for value in (object(), {"a": 1}, {1, 2}, np.zeros(3), (1, {})):
        with pytest.raises(TypeError):
            encode_extra(value)
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"a": float("nan")})


def test_groups_and_namespaces_have_keys_of_their_own() -> None:
    base = keys([([1, 2, 3, 4], None)])
    spaces = (SPACE, fingerprint({"model": "n"}))
    seen = {group_keys(base, space, group).tobytes() for space in spaces for group in range(300)}
    assert len(seen) == 600


def test_weights_are_known_by_content(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3 << 20))
    before = file_digest([file])
    assert file_digest([file]) == before
    with file.open("r+b") as out:
        out.seek((2 << 20) + 100)
        out.write(b"x")
    assert file_digest([file]) != before
    file.write_bytes(bytes((3 << 20) + 1))
    assert file_digest([file]) != before


HOSTILE = [
    b'{"a": {"data_offsets": [-99999, 1]}}',
    b'{"a": {"data_offsets": [-%d, 1]}}' % 10**30,
    b'{"a": {"data_offsets": [%d, 1]}}' % 10**30,
    b'{"a": {"data_offsets": [1e999, 1]}}',
    b'{"a": {"data_offsets": [NaN, 1]}}',
    b'{"a": {"data_offsets": []}}',
    b'{"a": {"data_offsets": {}}}',
    b'{"a": {}}',
    b'{"a": []}',
    b'{"a": null}',
    b"[1]",
    b"\xff",
    b"[" * 200_000,
    b'{"a":' * 200_000,
]


@pytest.mark.parametrize("header", HOSTILE, ids=lambda header: repr(header[:40]))
def test_weights_with_a_hostile_header_are_sampled_as_any_file(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(3 << 20))
    before = file_digest([file])
    with file.open("r+b") as out:
        out.seek((2 << 20) + 100)
        out.write(b"x")
    assert file_digest([file]) != before


def test_pinned_values() -> None:
    """A change here makes every stored chunk unreachable: raise identity.FORMAT, and say so."""
    space = fingerprint({"model": "m", "groups": [[16, 128]], "tp": 1})
    hasher = ChainHasher(space, 16)
    hasher.extend(list(range(320)), [None, encode_extra(("salt", 3)), *[None] * 18])
    assert space.hex() == "dad964e77d520a7f787898f295a21ca8c83b8d21168b7f117d90ab8c51e2eab2"
    assert hasher.keys(0, 1).hex() == "b9f001917d344e50f70a4cfcb99535a6"
    assert hasher.keys(19, 20).hex() == "8f0eeeb1424d54eff19e70d41a10fc4f"
    assert group_keys(hasher.keys(19, 20), space, 2).tobytes().hex() == "ed4e289730efbef4bf480a10944f3c19"
    assert encode_extra((None, True, -7, "é")).hex() == (
        "7419000000000000006e62316902000000000000002d37730200000000000000c3a9"
    )


@pytest.mark.parametrize("tokens", [1, 16, 100, 248, 249, 1000])
def test_pieces_over_every_boundary_inside_the_hash(tokens: int) -> None:
    prompt = np.random.default_rng(tokens).integers(0, 2**31, 12 * max(tokens, 40) + 3).tolist()
    whole, pieces = ChainHasher(SPACE, tokens), ChainHasher(SPACE, tokens)
    whole.extend(prompt)
    for end in range(tokens, len(prompt) + 1, tokens):
        pieces.extend(prompt[end - tokens : end])
    count = len(prompt) // tokens
    assert whole.chunks == pieces.chunks == count
    assert whole.keys(0, count) == pieces.keys(0, count)
    assert len({whole.keys(index, index + 1) for index in range(count)}) == count


def test_a_description_tells_every_field_and_type() -> None:
    base = {"model": "m", "layers": ["a", "b"], "window": None, "scale": 1.0, "mla": False}
    others: list[dict] = [{"model": "n"}, {"layers": ["b", "a"]}, {"layers": "ab"}, {"window": 0}]
    others += [{"window": "null"}, {"scale": 1}, {"mla": 0}, {"more": None}, {"model": {"m": 1}}]
    assert len({fingerprint(base), *(fingerprint(base | other) for other in others)}) == len(others) + 1
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base), "their order says nothing"


@pytest.mark.parametrize("value", [b"x", object(), {1, 2}, {1: "a"}, [{None: 1}], ({"a": {True: 1}},)])
def test_a_description_of_what_json_would_confuse_is_refused(value) -> None:
    with pytest.raises(TypeError):
        fingerprint({"field": value})
