"""Output with kvkeep equals output without it where requests are preempted and prefilled in pieces.

A file of its own, since tests run side by side file by file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engines.vllm.test_equality import assert_equal, prepared

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

# 36 blocks for six requests that grow to eight each; prefill in pieces of 64 tokens.
TIGHT = {"num_gpu_blocks_override": 36, "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 512}


def test_preemption_and_chunked_prefill(live: Callable[..., dict[str, Any]]) -> None:
    off = live(prepared("smollm2"), "crowded", None, **TIGHT)
    for chunk_tokens, own_cache, load_by in (
        (32, True, "layers"),
        (64, False, "layers"),
        (32, True, "request"),
    ):
        # A keeper that another test on the same cores holds up for a second is not what this is about.
        patient = {"memory": "1GiB", "timeout": 30}
        connector = {**patient, "chunk_tokens": chunk_tokens, "load_by": load_by}
        on = live(prepared("smollm2"), "crowded", connector, enable_prefix_caching=own_cache, **TIGHT)
        assert assert_equal(on, off) == 12
        assert on["metrics"]["vllm:num_preemptions"] > 0
        assert on["metrics"]["vllm:kvkeep_keeper_losses"] == 0
        assert sum(on["preempted again"]["cached"]) > 500
