"""Greedy output and logits with kvkeep equal those without it, float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[3]
KINDS = ["Llama", "Qwen2", "Qwen3", "Gemma3"]


@pytest.mark.parametrize("kind", KINDS)
def test_miss_full_hit_partial_hit(kind: str, kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model(kind)
    cache = tie(model)
    text = kit.tokens(1, 200)
    for row, expected in (
        (text, 0),
        (text, 192),  # of 200 tokens, whole chunks
        (text[:150] + kit.tokens(2, 80), 144),
        (text[:16], 15),  # all of it is held: one token is left to compute
        (text[:15], 0),  # shorter than a chunk
        (kit.tokens(3, 100), 0),
    ):
        batch = kit.batch(row)
        past = cache.begin(*batch)
        assert past.loaded == expected
        kit.assert_alike(kit.answer(model, batch, past), kit.answer(model, batch))
    assert cache.stats.errors == 0
    assert cache.stats.hit_tokens == 192 + 144 + 15


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_padding_and_prefixes_of_their_own(kind: str, kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model(kind, seed=1)
    cache = tie(model)
    text, other = kit.tokens(1, 300), kit.tokens(2, 300)
    cache.save(kit.answer(model, kit.batch(text[:256]), cache.begin(*kit.batch(text[:256]))).past_key_values)
    for rows, expected in (
        # Columns that all rows can have: padding counts as had.
        ([text[:256], text[:130]], 254),  # 126 columns of padding + 128 tokens
        ([text[:250], other[:40]], 210),  # the second is a miss behind 210 columns of padding
        ([text[:250], other[:40]], 240),  # now 240 columns, and 210 + 32
        ([text[:40], other[:250]], 32),  # of the first only padding
        ([text[:200], text[:200], text[:90] + other[:100]], 90),
        ([text[:100], kit.tokens(9, 100)], 0),
    ):
        batch = kit.batch(*rows)
        past = cache.begin(*batch)
        assert past.loaded == expected
        kit.assert_alike(kit.answer(model, batch, past), kit.answer(model, batch))
    assert cache.stats.errors == 0


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_two_rounds_find_what_was_generated(kind: str, kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model(kind, seed=2)
    cache = tie(model)
    first = kit.batch(kit.tokens(1, 100), kit.tokens(2, 70))
    said = kit.answer(model, first, cache.begin(*first), count=300).sequences
    rows = [said[0].tolist() + kit.tokens(3, 10), said[1, 30:].tolist() + kit.tokens(4, 10)]
    second = kit.batch(*rows)
    past = cache.begin(*second)
    # 399 and 369 tokens were computed: the last one said was not. The second row has 30 of padding.
    assert past.loaded == min(399 // 16 * 16, 30 + 369 // 16 * 16)
    kit.assert_alike(kit.answer(model, second, past), kit.answer(model, second))
    assert cache.stats.errors == 0


def test_only_the_prompt_is_kept_where_asked(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=3)
    cache = tie(model, save_decoded=False)
    batch = kit.batch(kit.tokens(1, 100))
    said = kit.answer(model, batch, cache.begin(*batch), count=100).sequences
    assert cache.begin(said, torch.ones_like(said)).loaded == 96


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_forward(kind: str, kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model(kind, seed=4)
    cache = tie(model)
    ids, mask = kit.batch(kit.tokens(1, 150), kit.tokens(2, 130))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
    for _ in range(2):
        with torch.no_grad(), cache.begin(ids, mask) as past:
            rest = slice(past.loaded, None)
            logits = model(
                ids[:, rest], attention_mask=mask, position_ids=positions[:, rest], past_key_values=past
            ).logits
        torch.testing.assert_close(logits, whole[:, rest], rtol=1e-4, atol=1e-4)
    assert past.loaded == 144
    assert cache.stats.errors == 0


def test_a_forward_in_pieces_and_rows_padded_on_the_right(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=5)
    cache = tie(model)
    text = kit.tokens(1, 160)
    ids = torch.tensor([text, text[:100] + [0] * 60])
    mask = (ids != 0).long()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for loaded in (0, 96):
            with cache.begin(ids, mask) as past:
                assert past.loaded == loaded
                logits = [
                    model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past).logits
                    for a, b in ((loaded, 97), (97, 130), (130, 160))
                ]
            torch.testing.assert_close(torch.cat(logits, 1)[0], whole[0, loaded:], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                torch.cat(logits, 1)[1, : 100 - loaded], whole[1, loaded:100], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 3, "num_return_sequences": 2}, id="several answers"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="assisted"),
        pytest.param({"prefill_chunk_size": 50}, id="prefill in pieces"),
    ],
)
def test_ways_to_generate(kind: str, options: dict[str, Any], kit: Any, tie: Callable[..., Any]) -> None:
    if kind == "Gemma3" and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers cannot roll back a sliding window here")
    model = kit.model(kind, seed=6)
    cache = tie(model)
    row = kit.tokens(1, 40) * 3
    batch = kit.batch(row) if "prompt_lookup_num_tokens" in options else kit.batch(row, row[:77])
    without = kit.answer(model, batch, count=40, **options).sequences
    for _ in range(3):
        with cache.begin(*batch) as past:
            assert torch.equal(kit.answer(model, batch, past, count=40, **options).sequences, without)
    # What beams and drafts left behind is right as well.
    longer = kit.batch(without[0].tolist() + kit.tokens(2, 20))
    kit.assert_alike(kit.answer(model, longer, cache.begin(*longer)), kit.answer(model, longer))
    assert cache.stats.errors == 0
    assert cache.stats.hit_tokens > 0


def test_inference_mode(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=7)
    cache = tie(model)
    batch = kit.batch(kit.tokens(1, 100))
    for _ in range(2):
        with torch.inference_mode():
            past = cache.begin(*batch)
            kit.answer(model, batch, past)
        ids = torch.tensor([[5, 6]])
        with torch.no_grad():  # on what an inference tensor holds
            model(ids, past_key_values=past)
    assert cache.stats.errors == 0
    assert past.loaded == 96


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name: str, kit: Any, tie: Callable[..., Any]) -> None:
    folder = ROOT / "demo" / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not prepared: run `make models`")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (ROOT / "docs" / "design.md").read_text()
    row = tokenizer(text).input_ids[:700]  # beyond Gemma's window of 512
    cache = tie(model, chunk_tokens=None)
    for batch, loaded in (
        (kit.batch(row), 0),
        (kit.batch(row), 672),
        (kit.batch(row[:640], row[:600] + row[:50]), 576),
        (kit.batch(row[:690], row[:130]), 672),
    ):
        past = cache.begin(*batch)
        assert past.loaded == loaded
        kit.assert_alike(kit.answer(model, batch, past, 8), kit.answer(model, batch, None, 8))
    assert cache.stats.errors == 0
