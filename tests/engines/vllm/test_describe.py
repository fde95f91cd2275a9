"""The namespace tells apart what makes other KV bytes; no engine is started."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from kvkeep.engines.vllm.describe import check_engine, describe_scales
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
