"""The copy that vLLM's own offloading is compared with: bytes come back, wherever in a chunk they lie."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from benchmarks.offloading.cpu_offloading import CpuEngineWorker

PAGE = 4096


def test_blocks_come_back_from_within_chunks() -> None:
    layers = [torch.randint(-128, 127, (8, PAGE), dtype=torch.int8) for _ in range(2)]
    tensors = [CanonicalKVCacheTensor(layer, PAGE) for layer in layers]
    refs = [[CanonicalKVCacheRef(0, PAGE)], [CanonicalKVCacheRef(1, PAGE)]]  # two groups
    worker = CpuEngineWorker(CanonicalKVCaches(tensors, refs), blocks_per_chunk=2, num_chunks=4)
    # Of the first group blocks 5, 1, 3 are the request's 1st to 3rd: the first lies in the middle of a chunk.
    stored = GPULoadStoreSpec([5, 1, 3, 6], group_sizes=[3, 1], block_indices=[1, 2])
    before = [layer.clone() for layer in layers]
    assert worker.submit_store(7, stored, CPULoadStoreSpec([2, 0, 3]))
    for layer in layers:
        layer.zero_()
    assert worker.submit_load(8, CPULoadStoreSpec([0, 3]), GPULoadStoreSpec([4, 0, 2], [2, 1], [2, 2]))
    assert worker.submit_load(9, CPULoadStoreSpec([2]), GPULoadStoreSpec([7], [1, 0], [1, 0]))
    assert torch.equal(layers[0][[7, 4, 0]], before[0][[5, 1, 3]])
    assert torch.equal(layers[1][2], before[1][6])
    assert not layers[0][[1, 2, 3, 5, 6]].any()
    finished = worker.get_finished()
    assert [(one.job_id, one.success, one.transfer_size) for one in finished] == [
        (7, True, 4 * PAGE),
        (8, True, 3 * PAGE),
        (9, True, PAGE),
    ]
    assert worker.get_finished() == []
