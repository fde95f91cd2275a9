"""vLLM's own offloading on a CPU engine, where vLLM refuses it: all of it but the copy.

`OffloadingConnector` finds this by `spec_name` and `spec_module_path`; the folder has to be on PYTHONPATH.
vLLM's: which blocks are stored and loaded, when, what is evicted, one row per block and layer in host memory.
Ours: that memory is touched before the first request and asks for huge pages, and blocks are copied by
kvkeep's own compiled loop, in the worker's thread, at once; on a CPU a copy has no stream to run on, and a
thread would take a core that computes. So the two differ in their design, not in how fast they copy.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvkeep.transfer.cpu import copy_pieces
from kvkeep.transfer.team import share

__all__ = ["CpuEngineOffloadingSpec"]


class CpuEngineOffloadingSpec(CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's CPU offloading, with a worker for engines that are on a CPU themselves."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker side's only worker."""
        if self._worker is None:
            self._worker = CpuEngineWorker(kv_caches, self.blocks_per_chunk, self.num_chunks)
        return self._worker


class CpuEngineWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies whole pages between paged KV and host memory; a transfer is over when it was submitted."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, num_chunks: int) -> None:
        self._refs, self._per_chunk = kv_caches.group_data_refs, blocks_per_chunk
        self._paged = [one.tensor for one in kv_caches.tensors]
        rows = [one.page_size_bytes * blocks_per_chunk for one in kv_caches.tensors]
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, num_chunks * sum(rows), flags=private)
        memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.int8).zero_()  # touched now, as a keeper's memory is
        parts = whole.split([num_chunks * row for row in rows])
        self._host = [part.view(num_chunks, row) for part, row in zip(parts, rows, strict=True)]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Paged KV to host memory."""
        return self._copy(job_id, src_spec, dst_spec, storing=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Host memory to paged KV."""
        return self._copy(job_id, dst_spec, src_spec, storing=False)

    def get_finished(self) -> list[TransferResult]:
        """All transfers since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def _copy(self, job_id: int, paged: GPULoadStoreSpec, host: LoadStoreSpec, storing: bool) -> bool:
        assert isinstance(host, CPULoadStoreSpec)
        began = time.perf_counter()
        pieces = list(self._pieces(paged, host))
        if pieces:
            blocks, chunks, sizes = (np.concatenate(column) for column in zip(*pieces, strict=True))
            share(copy_pieces(), *((chunks, blocks) if storing else (blocks, chunks)), sizes, threads=0)
        nbytes = sum(int(sizes.sum()) for _, _, sizes in pieces)
        self._finished.append(TransferResult(job_id, True, nbytes, time.perf_counter() - began))
        return True

    def _pieces(self, paged: GPULoadStoreSpec, host: CPULoadStoreSpec) -> Iterator[tuple[Any, Any, Any]]:
        """By group and layer: addresses of blocks, of their places in host memory, and sizes."""
        block_at = chunk_at = 0
        for refs, count, index in zip(self._refs, paged.group_sizes, paged.block_indices, strict=True):
            if not count:
                continue
            skip = index % self._per_chunk  # the group's first block may lie within a chunk
            chunks = -(-(skip + count) // self._per_chunk)
            its = paged.block_ids[block_at : block_at + count]
            places = host.block_ids[chunk_at : chunk_at + chunks]
            block_at, chunk_at = block_at + count, chunk_at + chunks
            for ref in refs:
                there, here = (np.empty(count, np.uint64) for _ in range(2))
                compute_sub_block_ptrs(its, 1, there, self._paged[ref.tensor_idx])
                compute_sub_block_ptrs(places, self._per_chunk, here, self._host[ref.tensor_idx], skip)
                sizes = np.full(count, ref.page_size_bytes, np.int64)
                yield there.view(np.int64), here.view(np.int64), sizes
