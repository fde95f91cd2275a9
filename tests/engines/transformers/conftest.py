"""Tiny models with random weights, and what a program does with them, with and without the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from kvkeep.engines.transformers import KVKeepCache, PrefixCache

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HYBRID = {
    "sliding_window": 64,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
CHUNK = 16


def make_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """`kind` names transformers' classes: Llama, Qwen2, Qwen3, Gemma3."""
    torch.manual_seed(seed)
    if kind == "Gemma3":
        return transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**{**SIZES, **HYBRID, **changes})
        ).eval()
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


class Batch(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor


def make_batch(*rows: list[int]) -> Batch:
    """Padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask)


def tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (count,), generator=generator).tolist()


def answer(model: Any, batch: Batch, past: PrefixCache | None = None, count: int = 20, **options: Any) -> Any:
    """Greedy, with the logits of each step."""
    return model.generate(
        batch.ids,
        attention_mask=batch.mask,
        past_key_values=past,
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def assert_alike(one: Any, other: Any) -> None:
    """Equal tokens, and logits up to float32's rounding: a hit computes in other shapes."""
    assert torch.equal(one.sequences, other.sequences)
    for ours, theirs in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="session")
def kit() -> Any:
    """The helpers above."""

    class Kit:
        chunk = CHUNK
        model = staticmethod(make_model)
        batch = staticmethod(make_batch)
        tokens = staticmethod(tokens)
        answer = staticmethod(answer)
        assert_alike = staticmethod(assert_alike)

    return Kit


@pytest.fixture(scope="module")
def keeper(module_keeper_process: Callable[..., Any]) -> Any:
    """One keeper for the tests of a file: their models have weights of their own, so namespaces."""
    return module_keeper_process(memory="256MiB")


@pytest.fixture
def tie(keeper: Any) -> Iterator[Callable[..., KVKeepCache]]:
    """Tie models to that keeper, or to another; all are closed."""
    made: list[KVKeepCache] = []

    def make(model: Any, **options: Any) -> KVKeepCache:
        options = {"socket": keeper.socket, "chunk_tokens": CHUNK, "timeout": 20.0, **options}
        made.append(KVKeepCache.for_model(model, **options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()
