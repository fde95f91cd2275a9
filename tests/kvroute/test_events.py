"""Events as vLLM encodes them, now and before, and bytes that are none."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute.events import Cleared, Decoder, Removed, Stored, pack
from kvroute.index import Index

SEQUENCE = (7).to_bytes(8, "big")


def message(*events: object, batch: object = None) -> list[bytes]:
    return [b"kv@pod@model", SEQUENCE, msgspec.msgpack.encode(batch or [1.5, list(events), 0])]


STORED = {"block_hashes": [2**64 - 1, b"\x01" * 32], "parent_block_hash": None, "token_ids": [1, 2, 3, 4]}


def test_maps() -> None:
    decoder = Decoder()
    batch = decoder.decode(
        message(
            {"type": "BlockStored", **STORED, "block_size": 2, "lora_id": None, "medium": "GPU", "new": [1]},
            {"type": "BlockRemoved", "block_hashes": [5], "medium": "CPU", "group_idx": 1},
            {"type": "AllBlocksCleared"},
        )
    )
    assert batch is not None
    assert (batch.topic, batch.sequence) == ("kv@pod@model", 7)
    assert batch.events == [Stored(**STORED, block_size=2, medium="GPU"), Removed([5], "CPU", 1), Cleared()]
    assert (decoder.bad_messages, decoder.bad_events) == (0, 0)


def test_rows() -> None:
    row = [
        "BlockStored",
        [8, 9],
        7,
        [1, 2],
        1,
        None,
        "CPU",
        "french",
        [["french"], None],
        0,
        "full_attention",
    ]
    batch = Decoder().decode(
        message(row, row[:5], [*row, 1024, "later"], ["BlockRemoved", [5]], ["AllBlocksCleared"])
    )
    assert batch is not None
    whole, short, long, removed, cleared = batch.events
    assert isinstance(whole, Stored)
    assert (whole.parent_block_hash, whole.medium, whole.lora_name) == (7, "CPU", "french")
    assert (whole.extra_keys, whole.group_idx) == ([["french"], None], 0)
    assert isinstance(short, Stored)
    assert (short.block_size, short.medium) == (1, None)
    assert isinstance(long, Stored)
    assert long == whole
    assert isinstance(removed, Removed)
    assert isinstance(cleared, Cleared)


def test_one_bad_event_takes_nothing_from_the_others() -> None:
    decoder = Decoder()
    bad = [
        {"type": "BlockMoved"},
        {"type": "BlockStored", "block_hashes": "x"},
        {"block_hashes": [1]},
        ["BlockStored", [1]],
        [],
        7,
        None,
        "text",
    ]
    batch = decoder.decode(message(*bad, {"type": "AllBlocksCleared"}))
    assert batch is not None
    assert batch.events == [Cleared()]
    assert (decoder.bad_messages, decoder.bad_events) == (0, len(bad))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"", SEQUENCE],
        [b"", SEQUENCE, b"", b""],
        [b"", b"\0" * 7, msgspec.msgpack.encode([1.0, []])],
        [b"", SEQUENCE, b""],
        [b"", SEQUENCE, b"\x91" * 100_000],
        message(batch={"events": []}),
        message(batch=["now", []]),
        message(batch=[1.0]),
    ],
)
def test_what_is_no_message(frames: list[bytes]) -> None:
    decoder = Decoder()
    assert decoder.decode(frames) is None
    assert decoder.bad_messages == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [*Stored.__struct_fields__]
EVENTS = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), VALUES).map(lambda event: {"type": "BlockStored", **event}),
    st.dictionaries(st.sampled_from(FIELDS), VALUES).map(lambda event: {**STORED, "block_size": 2, **event}),
    st.lists(VALUES, max_size=10).map(lambda row: ["BlockStored", [1], None, [1, 2], 2, *row]),
    VALUES,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=4), st.binary(max_size=40), st.integers(0, 200))
def test_any_bytes_at_all(events: list[object], noise: bytes, cut: int) -> None:
    decoder, index = Decoder(), Index()
    whole = message(*events)
    for body in (whole[2], whole[2][:cut], noise, whole[2][:cut] + noise):
        batch = decoder.decode([noise, SEQUENCE, body])
        if batch is not None:
            index.apply("engine", batch.events)
    index.lookup([1, 2, 3, 4])


def test_packed_as_an_engine_would() -> None:
    event = Stored([1], None, [5, 6], 2, medium="CPU", extra_keys=[["salt"]])
    frames = pack("kv@a@b", 3, 1.0, [event, Cleared()], rank=2)
    assert msgspec.msgpack.decode(frames[2])[1][0]["type"] == "BlockStored"
    batch = Decoder().decode(frames)
    assert batch is not None
    assert batch == ("kv@a@b", 3, [event, Cleared()], 2)


@pytest.mark.parametrize("rank", [-1, 1024, 1 << 62])
def test_a_rank_that_no_engine_has(rank: int) -> None:
    decoder = Decoder()
    assert decoder.decode(pack("kv@a@b", 3, 1.0, [Cleared()], rank)) is None
    assert decoder.bad_messages == 1
