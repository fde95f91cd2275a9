"""What is not plainly right is a miss, and what fails never fails generate()."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvkeep.engines.transformers import KVKeepCache
from kvkeep.errors import ConfigError
from kvkeep.identity import tenant_of

ROOT = Path(__file__).parents[3]

# Loads, or finds held, what another process computed.
OTHER = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import CHUNK, answer, make_batch, make_model, tokens
from kvkeep.engines.transformers import KVKeepCache
model, batch = make_model("Llama", seed=20), make_batch(tokens(1, 100))
with KVKeepCache.for_model(model, socket=sys.argv[2], chunk_tokens=CHUNK, timeout=20) as cache:
    past = cache.begin(*batch)
    print(past.loaded, answer(model, batch, past).sequences.tolist(), flush=True)
    cache.save()
    print("saved", flush=True)
    input()
"""


class After(transformers.LogitsProcessor):
    """Does something in the middle of generate()."""

    def __init__(self, steps: int, action: Callable[[], object]) -> None:
        self.steps, self.action = steps, action

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps -= 1
        if not self.steps:
            self.action()
        return scores


def loaded_again(cache: KVKeepCache, batch: Any) -> int:
    """What a batch finds; nothing of it is computed."""
    return cache.begin(*batch).loaded


def test_two_processes_and_a_restart(
    kit: Any, keeper: Any, tie: Callable[..., Any], child_process: Callable[..., Any]
) -> None:
    model, batch = kit.model("Llama", seed=20), kit.batch(kit.tokens(1, 100))
    expected = kit.answer(model, batch).sequences.tolist()
    child = child_process(OTHER, str(Path(__file__).parent), keeper.socket)
    assert child.line() == f"0 {expected}"
    assert child.line() == "saved"
    # While that one lives, and after it was killed.
    for _ in range(2):
        cache = tie(model)
        past = cache.begin(*batch)
        assert past.loaded == 96
        assert kit.answer(model, batch, past).sequences.tolist() == expected
        cache.close()
        if child.process.poll() is None:
            child.kill()


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_keeper_killed_in_the_middle_and_the_next_one(
    kind: str, kit: Any, keeper_process: Callable[..., Any], tie: Callable[..., Any], wait_until: Any
) -> None:
    first = keeper_process(memory="64MiB")
    model, batch = kit.model(kind, seed=21), kit.batch(kit.tokens(1, 100), kit.tokens(2, 90))
    cache = tie(model, socket=first.socket)
    without = kit.answer(model, batch)
    kit.assert_alike(kit.answer(model, batch, cache.begin(*batch)), without)
    past = cache.begin(*batch)
    assert past.loaded == 90
    kill = transformers.LogitsProcessorList([After(3, first.process.kill)])
    kit.assert_alike(kit.answer(model, batch, past, logits_processor=kill), without)
    first.process.wait(20)
    past = cache.begin(*batch)  # it would save, and look up
    assert (past.loaded, cache.stats.keeper_losses) == (0, 1)
    kit.assert_alike(kit.answer(model, batch, past), without)
    keeper_process(memory="64MiB", socket=first.socket)

    def attached() -> bool:
        kit.answer(model, batch, cache.begin(*batch), count=1)
        return loaded_again(cache, batch) == 90

    wait_until(attached, 30)
    past = cache.begin(*batch)
    kit.assert_alike(kit.answer(model, batch, past), without)


def test_a_keeper_that_does_not_answer_is_given_up(
    kit: Any, keeper_process: Callable[..., Any], tie: Callable[..., Any]
) -> None:
    slow = keeper_process(memory="64MiB")
    model, batch = kit.model("Llama", seed=22), kit.batch(kit.tokens(1, 100))
    cache = tie(model, socket=slow.socket, timeout=0.2)
    past = cache.begin(*batch)
    os.kill(slow.process.pid, 19)
    kit.assert_alike(kit.answer(model, batch, past), kit.answer(model, batch))
    assert loaded_again(cache, batch) == 0
    assert cache.stats.keeper_losses == 1


def test_no_keeper_at_the_start(kit: Any, tie: Callable[..., Any], tmp_path: Path) -> None:
    model, batch = kit.model("Llama", seed=23), kit.batch(kit.tokens(1, 100))
    cache = tie(model, socket=str(tmp_path / "none.sock"))
    for _ in range(2):
        kit.assert_alike(kit.answer(model, batch, cache.begin(*batch)), kit.answer(model, batch))
    assert cache.stats.hit_tokens == 0


def test_a_keeper_that_is_full(kit: Any, keeper_process: Callable[..., Any], tie: Callable[..., Any]) -> None:
    small = keeper_process(memory="1MiB")
    model = kit.model("Gemma3", seed=24)
    cache = tie(model, socket=small.socket)
    for seed in (1, 2, 1, 2):
        batch = kit.batch(kit.tokens(seed, 1500))  # 1.5 MB of KV
        kit.assert_alike(kit.answer(model, batch, cache.begin(*batch), 4), kit.answer(model, batch, None, 4))
    assert cache.stats.errors == 0


def test_a_private_keeper_and_its_options(kit: Any, monkeypatch: Any, short_dir: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    model, batch = kit.model("Llama", seed=25), kit.batch(kit.tokens(1, 100))
    with KVKeepCache.for_model(model, memory="64MiB", chunk_tokens=kit.chunk) as cache:
        kit.answer(model, batch, cache.begin(*batch))
        assert loaded_again(cache, batch) == 96
    with pytest.raises(ConfigError, match="memory"):
        KVKeepCache.for_model(model, memry="64MiB")


def test_what_else_is_in_the_key(kit: Any, tie: Callable[..., Any], keeper: Any) -> None:
    model, batch = kit.model("Llama", seed=26), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    kit.answer(model, batch, cache.begin(*batch, salt="a"))
    assert cache.begin(*batch, salt="a").loaded == 96
    assert cache.begin(*batch, salt="b").loaded == 0
    assert cache.begin(*batch).loaded == 0
    told = {row["tenant"]: row for row in keeper.figures()["tenants"]}
    a, b = told[tenant_of("a").hex()], told[tenant_of("b").hex()]
    assert (a["stored_chunks"] > 0, a["hit_chunks"] > 0) == (True, True)
    assert (b["asked_chunks"] > 0, b["hit_chunks"]) == (True, 0)
    # Another chunk size, type, configuration, or weights: another namespace.
    assert loaded_again(tie(model, chunk_tokens=32), batch) == 0
    assert loaded_again(tie(kit.model("Llama", seed=27)), batch) == 0
    assert loaded_again(tie(kit.model("Llama", seed=26, rope_theta=999.0)), batch) == 0
    assert loaded_again(tie(kit.model("Llama", seed=26).to(torch.float64)), batch) == 0
    past = tie(kit.model("Llama", seed=26)).begin(*batch, salt="a")
    assert past.loaded == 96


def test_weights_that_change_in_memory(kit: Any, tie: Callable[..., Any]) -> None:
    model, batch = kit.model("Llama", seed=28), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    kit.answer(model, batch, cache.begin(*batch))
    past = cache.begin(*batch)
    assert past.loaded == 96
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="has changed since begin"):
        kit.answer(model, batch, past)
    for loaded in (0, 96):
        past = cache.begin(*batch)
        assert past.loaded == loaded
        kit.assert_alike(kit.answer(model, batch, past), kit.answer(model, batch))
    # And between generate() and the save: what was computed has no name any more.
    other = kit.batch(kit.tokens(2, 100))
    past = cache.begin(*other)
    kit.answer(model, other, past, count=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    cache.save()
    assert loaded_again(cache, other) == 0
    assert cache.stats.errors == 0


def test_an_adapter_that_is_switched(kit: Any, tie: Callable[..., Any]) -> None:
    model, batch = kit.model("Llama", seed=29), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    layer = model.model.layers[0].self_attn.k_proj  # with what PEFT's layers say of themselves
    layer.merged_adapters, layer.active_adapters, layer.disable_adapters = [], ["one"], False
    for change, loaded in ((False, 0), (True, 0), (False, 96), (True, 96)):
        layer.disable_adapters = change
        with cache.begin(*batch) as past:
            assert past.loaded == loaded
            kit.answer(model, batch, past, count=1)


def test_what_cannot_be_followed_is_not_kept(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=30)
    cache = tie(model)
    ids, mask = kit.batch(kit.tokens(1, 100))
    embeds = model.get_input_embeddings()(ids).detach()
    positions = torch.arange(100)[None]
    for options in (
        {"inputs_embeds": embeds},
        {"input_ids": ids, "position_ids": positions + 5},
        {"input_ids": ids, "attention_mask": torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()},
    ):
        with torch.no_grad(), cache.begin(ids, mask) as past:
            model(**options, past_key_values=past)
        assert loaded_again(cache, (ids, mask)) == 0
    with torch.no_grad(), cache.begin(ids, mask) as past:  # an earlier mask that changes later
        model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=past)
        changed = mask.clone()
        changed[:, :30] = 0
        model(ids[:, 60:], attention_mask=changed, position_ids=positions[:, 60:], past_key_values=past)
    assert loaded_again(cache, (ids, mask)) == 0
    model.train()
    with torch.no_grad(), cache.begin(ids, mask) as past:
        model(ids, past_key_values=past)
    model.eval()
    assert loaded_again(cache, (ids, mask)) == 0
    assert cache.begin(torch.cat([ids[:, :50] * 0, ids], 1)).loaded == 0  # pad tokens, and no mask
    assert cache.stats.errors == 0


def test_a_cache_that_is_cut_and_used_again(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=41)
    cache = tie(model)
    text = kit.tokens(1, 100)
    batch = kit.batch(text)
    cache.save(kit.answer(model, batch, cache.begin(*batch)).past_key_values)
    past = cache.begin(*batch)
    kit.answer(model, batch, past)
    past.crop(96 - past.get_seq_length())  # to what was loaded; other tokens follow
    other = kit.batch(text[:96] + kit.tokens(2, 50))
    kit.assert_alike(kit.answer(model, other, past), kit.answer(model, other))
    cache.save(past)
    past.reset()
    several = kit.batch(*[kit.tokens(seed, 60) for seed in (3, 4, 5)])
    kit.assert_alike(kit.answer(model, several, past), kit.answer(model, several))
    cache.save(past)
    for batch, loaded in ((other, 144), (several, 48)):
        past = cache.begin(*batch)
        assert past.loaded == loaded
        kit.assert_alike(kit.answer(model, batch, past), kit.answer(model, batch))
    picked = cache.begin(*several)
    picked.batch_select_indices(torch.tensor([2, 0]))
    fewer = kit.batch(*[kit.tokens(seed, 60) for seed in (5, 3)])
    kit.assert_alike(kit.answer(model, fewer, picked), kit.answer(model, fewer))
    assert cache.stats.errors == 0


def test_a_forward_that_does_not_go_on_is_refused(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Gemma3", seed=31)
    cache = tie(model)
    batch = kit.batch(kit.tokens(1, 100), kit.tokens(2, 80))
    kit.answer(model, batch, cache.begin(*batch))
    ids, mask = batch
    rest = mask.cumsum(-1)[:, 80:] - 1
    for wrong in (
        {"input_ids": ids[:, 80:] + 1, "attention_mask": mask, "position_ids": rest},
        {"input_ids": ids[:, 80:], "attention_mask": mask * 0 + 1, "position_ids": rest},
        {"input_ids": ids[:, 80:], "attention_mask": mask},  # positions of columns, not of tokens
    ):
        past = cache.begin(*batch)
        assert past.loaded == 96
        wrong["input_ids"] = wrong["input_ids"][:, 16:]
        if "position_ids" in wrong:
            wrong["position_ids"] = wrong["position_ids"][:, 16:]
        with torch.no_grad(), pytest.raises(ValueError, match="where begin"):
            model(**wrong, past_key_values=past)
    assert cache.stats.errors == 0


def test_gradients_flow(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=32)
    ids, mask = kit.batch(kit.tokens(1, 40))
    past = tie(model).begin(ids, mask)
    model(ids, past_key_values=past).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_copy(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Llama", seed=33)
    cache = tie(model)
    batch, longer = (kit.batch(kit.tokens(1, count)) for count in (100, 130))
    past = cache.begin(*batch)
    with torch.no_grad():
        model(batch.ids, past_key_values=past)
    for one in (past, copy.deepcopy(past)):
        assert one.owner is cache
        kit.assert_alike(kit.answer(model, longer, one, 5), kit.answer(model, longer, None, 5))


def test_threads(kit: Any, tie: Callable[..., Any]) -> None:
    model = kit.model("Gemma3", seed=38)
    cache = tie(model)
    batches = [kit.batch(kit.tokens(seed % 3, 100 + seed)) for seed in range(12)]

    def serve(batch: Any) -> Any:
        with cache.begin(*batch) as past:
            return kit.answer(model, batch, past, 5)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(serve, batches))
    for batch, ours in zip(batches, answers, strict=True):
        kit.assert_alike(ours, kit.answer(model, batch, None, 5))
    assert loaded_again(cache, batches[-1]) == 96
    assert cache.stats.errors == 0


def test_a_fork_uses_its_parents_keeper(kit: Any, tie: Callable[..., Any], wait_until: Any) -> None:
    model, batch = kit.model("Llama", seed=34), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    kit.answer(model, batch, cache.begin(*batch))
    cache.save()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)
            wait_until(lambda: loaded_again(cache, batch) == 96, 20)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert loaded_again(cache, batch) == 96
    assert cache.stats.keeper_losses == 0


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param(
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            id="rope",
        ),
        pytest.param("Gemma3", {"use_bidirectional_attention": True}, id="attends to later tokens"),
    ],
)
def test_a_model_that_cannot_be_served(
    kind: str, changes: Any, kit: Any, tie: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    odd, batch = kit.model(kind, seed=35, **changes), kit.batch(kit.tokens(1, 100))
    with caplog.at_level(logging.WARNING):
        cache = tie(odd)
    assert "off for this model" in caplog.text
    for _ in range(2):
        kit.assert_alike(kit.answer(odd, batch, cache.begin(*batch)), kit.answer(odd, batch))
    assert cache.stats.errors == 1


def test_autocast(kit: Any, tie: Callable[..., Any]) -> None:
    model, batch = kit.model("Llama", seed=39), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    kit.answer(model, batch, cache.begin(*batch))
    past = cache.begin(*batch)
    assert past.loaded == 96
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="has changed since begin"):
            kit.answer(model, batch, past)
        for _ in range(2):
            with cache.begin(*batch) as past:
                assert past.loaded == 0  # its KV is of another type than the model's was at the start
                kit.answer(model, batch, past)
    assert cache.begin(*batch).loaded == 96
    assert cache.stats.errors == 0


def test_chunks_that_only_a_tier_holds(
    kit: Any, keeper_process: Callable[..., Any], tie: Callable[..., Any], tmp_path: Path
) -> None:
    model, batch = kit.model("Gemma3", seed=40), kit.batch(kit.tokens(1, 100), kit.tokens(2, 90))
    without = kit.answer(model, batch)
    tier = f"fs://{tmp_path}/kv?capacity=64MiB"
    for loaded in (0, 90):
        keeper = keeper_process("--tier", tier, memory="64MiB")
        cache = tie(model, socket=keeper.socket, probe_wait=20.0, load_wait=20.0)
        past = cache.begin(*batch)
        assert past.loaded == loaded
        kit.assert_alike(kit.answer(model, batch, past), without)
        cache.close()
        keeper.close()


def test_an_unexpected_error_turns_it_off(
    kit: Any, tie: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = kit.model("Gemma3", seed=36), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    kit.answer(model, batch, cache.begin(*batch))
    cache.save()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(
        "kvkeep.engines.transformers.layers.FullLayer.fill", broken
    )  # half way: the second layer
    past = cache.begin(*batch)
    kit.assert_alike(kit.answer(model, batch, past), kit.answer(model, batch))
    kit.assert_alike(kit.answer(model, batch, cache.begin(*batch)), kit.answer(model, batch))
    assert (past.loaded, cache.stats.errors) == (0, 1)
    assert "off for this model" in caplog.text


def test_after_close_it_is_a_plain_cache(kit: Any, tie: Callable[..., Any]) -> None:
    model, batch = kit.model("Gemma3", seed=37), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    past = cache.begin(*batch)
    cache.close()
    for one in (past, cache.begin(*batch)):
        kit.assert_alike(kit.answer(model, batch, one), kit.answer(model, batch))
