"""Copies that fail, drafts that are rejected, a layout that is not known: what is served is right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkeep.identity import ChainHasher, encode_extra

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

Live = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("groups", "flags"), [(1, []), (2, ["--in-process"])])
def test_a_load_that_fails(
    groups: int,
    flags: list[str],
    live: Live,
    keeper_process: Callable[..., Any],
    wait_until: Callable[..., None],
    request,
) -> None:
    """Its blocks are computed (one group) or loaded again (several), and nothing wrong is kept."""
    model = request.getfixturevalue("tiny_model" if groups == 1 else "hybrid_model")
    keeper = keeper_process(memory="256MiB")
    connector = {"socket": keeper.socket, "chunk_tokens": 32}
    told = live(model, "broken", connector, "--module", "faulty", *flags)
    for phase in ("first load", "second load", "third load", "off"):
        assert told[phase]["tokens"] == told["cold"]["tokens"], phase
    # What is computed from blocks that had to be loaded again is kept: they were right.
    assert told["second load"]["cached"] == ([320, 320] if groups == 1 else [768, 480])
    assert told["off"]["cached"][0] == 0  # the second prompt may have some of the first one
    assert told["metrics"]["vllm:kvkeep_load_failures"] == (2 if groups == 1 else 0)
    claims = ("leases", "reservations")  # of an engine that is gone they last a few seconds more
    wait_until(lambda: [keeper.figures()[kind] for kind in claims] == [0, 0], 20)


def test_rejected_drafts_leave_nothing(
    live: Live, tiny_model: Path, keeper_process: Callable[..., Any]
) -> None:
    """With n-gram speculation: equal answers, hits, and kept KV that equals that of a prefill."""
    tokens, slot_bytes = 32, 32 * 4096
    options = {"block_size": tokens, "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    options["speculative_config"] |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    keeper = keeper_process(memory="256MiB")
    connector = {"socket": keeper.socket, "chunk_tokens": tokens}
    off = live(tiny_model, "drafts", None, "--in-process", **options)
    on = live(tiny_model, "drafts", connector, "--in-process", **options)
    for phase in ("first", "again", "second round", "all in prompts"):
        assert on[phase]["tokens"] == off[phase]["tokens"], phase
    proposed, accepted = (
        on["metrics"][f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted")
    )
    assert 50 < accepted < proposed - 50
    assert on["again"]["cached"] == [96] * 4  # of 122 tokens
    assert on["second round"]["cached"] == [256] * 4
    assert off["again"]["cached"] == [0] * 4

    fingerprint = bytes.fromhex(keeper.figures()["namespaces"][0]["fingerprint"])
    connection = keeper.connect(arena=True)
    arena = np.frombuffer(connection.map_arena(), np.float32)
    space = connection.open_namespace(fingerprint, "", [(slot_bytes, None)], 1, 1)

    def kept(ids: list[int], salt: str | None) -> np.ndarray:
        hasher, count = ChainHasher(fingerprint, tokens), len(ids) // tokens
        extra = None if salt is None else encode_extra((("cache_salt", salt),))
        hasher.extend(ids, [extra, *[None] * (count - 1)])
        found = connection.lookup(space, hasher.keys(0, count))
        assert found.chunks == count
        return np.stack([arena[at // 4 : (at + slot_bytes) // 4] for at in found.offsets[0].tolist()])

    for prompt, answer in zip(on["prompts"], on["first"]["tokens"], strict=True):
        decoded, prefilled = kept(prompt + answer, None), kept(prompt + answer, "prefilled")
        assert np.allclose(decoded, prefilled, rtol=1e-3, atol=1e-4)
        assert not any(np.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairwise(prefilled))


def test_a_layout_that_is_not_known(live: Live, tiny_model: Path) -> None:
    """The cache is off for this engine, with one warning, and requests are served."""
    told = live(tiny_model, "twice", {"memory": "64MiB"}, "--module", "odd")
    assert told["first"]["tokens"] == told["again"]["tokens"]
    assert told["first"]["cached"] == told["again"]["cached"] == [0]
    warnings = [line for line in told["log"].splitlines() if "kvkeep" in line and "WARNING" in line]
    assert len(warnings) == 1, warnings
    assert "kvkeep is off for this engine: layer 0: no clear block dimension" in warnings[0]
    assert "Traceback" not in told["log"]
