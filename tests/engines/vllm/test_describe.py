"""The namespace tells apart what makes other KV bytes; no engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import AttentionConfig, MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from kvkeep.engines.vllm.describe import check_engine, describe_model, describe_scales
from kvkeep.errors import LayoutError

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds


def layer(**scales: float | list[float]) -> torch.nn.Module:
    """An attention layer as vLLM leaves it after loading, as far as scales go."""
    module = torch.nn.Module()
    set_default_quant_scales(module, register_buffer=True)
    for name, value in scales.items():
        setattr(module, name, value if name.endswith("_float") else torch.tensor(value))
    return module


def test_the_scales_of_each_layer_are_told_apart() -> None:
    plain = layer()
    described = [
        describe_scales(["a", "b"], {"a": one, "b": two})
        for one, two in [
            (plain, plain),
            (layer(_k_scale=0.5, _k_scale_float=0.5), plain),
            (plain, layer(_k_scale=0.5, _k_scale_float=0.5)),
            (layer(_v_scale=0.5), plain),
            (layer(_v_scale_float=0.5), plain),
            (layer(_k_scale=[0.5, 0.25]), plain),  # one per head
        ]
    ]
    assert len(set(described)) == len(described)
    assert describe_scales(["a"], {"a": layer()}) == describe_scales(["a"], {"a": plain})
    assert json.loads(described[0]) == [[1.0, 1.0, 1.0, 1.0]] * 2, "vLLM names its scales otherwise now"


def test_a_layer_without_scales_is_described_too() -> None:
    assert json.loads(describe_scales(["a", "b"], {"a": torch.nn.Module()})) == [[None] * 4] * 2


def test_an_engine_on_several_hosts_is_refused() -> None:
    """Its ranks would each have a keeper of their own host."""

    def config(hosts: int) -> Any:
        parallel = SimpleNamespace(
            nnodes_within_dp=hosts, decode_context_parallel_size=1, prefill_context_parallel_size=1
        )
        return SimpleNamespace(parallel_config=parallel, speculative_config=None)

    groups: Any = SimpleNamespace(kv_cache_groups=[])
    check_engine(config(1), groups)
    with pytest.raises(LayoutError, match="several hosts"):
        check_engine(config(2), groups)


def described(folder: Path, media: Any = None, attention: Any = None, **options: Any) -> dict[str, Any]:
    """The namespace of an engine with these options, for a model whose positions depend on them."""
    model = EngineArgs(model=str(folder), skip_tokenizer_init=True, **options).create_model_config()
    model.multimodal_config = None if media is None else MultiModalConfig(**media)
    config: Any = SimpleNamespace(
        model_config=model,
        attention_config=AttentionConfig(**(attention or {})),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    groups: Any = SimpleNamespace(kv_cache_groups=[])
    return describe_model(config, groups, 32, "weights")


def test_what_changes_kv_at_run_time_is_in_the_namespace(tmp_path: Path) -> None:
    """vLLM chooses the factors of longrope by the longest context, Llama 4 its attention's temperature; a
    model of images and text has its positions' scheme somewhere inside."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
        "rope_scaling": {"type": "longrope", **factors},
    }
    for name, more in {"a": {}, "b": {}, "llama4": {"used_by": "llama4"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(phi | more))
    plain, moved = (described(tmp_path / name, max_model_len=400) for name in "ab")
    assert plain == moved, "where it was loaded from is no part of it"
    same = {"served_model_name": "x", "enforce_eager": True, "max_logprobs": 3, "seed": 7}
    assert described(tmp_path / "a", max_model_len=400, **same) == plain
    told = [
        plain,
        described(tmp_path / "a", max_model_len=800),
        described(tmp_path / "a", max_model_len=-1),
        described(tmp_path / "a", max_model_len=400, dtype="float16"),
        described(tmp_path / "a", max_model_len=400, hf_overrides={"rope_theta": 5e5}),
        described(tmp_path / "a", max_model_len=400, disable_sliding_window=True),
        described(tmp_path / "a", max_model_len=400, attention={"use_non_causal": True}),
        described(tmp_path / "a", max_model_len=400, media={}),
        described(tmp_path / "a", max_model_len=400, media={"mm_processor_kwargs": {"max_pixels": 1}}),
        described(tmp_path / "a", max_model_len=400, media={"video_pruning_rate": 0.5}),
        described(tmp_path / "llama4", max_model_len=400),
        described(
            tmp_path / "llama4",
            max_model_len=400,
            override_generation_config={"attn_temperature_tuning": True},
        ),
    ]
    assert len({json.dumps(one) for one in told}) == len(told)
    limits = {"limit_per_prompt": {"image": 3}, "mm_processor_cache_gb": 1}
    assert described(tmp_path / "a", max_model_len=400, media=limits) == told[7]
