"""What a rank on a GPU does beside the copies that it starts: what waits for them, and what follows them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import group_kernel_blocks

from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.transfer.pipeline import Completions, LayerOrder
from kvkeep.transfer.streams import Backend, Event, Pending

if TYPE_CHECKING:
    from vllm.config import CompilationConfig
    from vllm.forward_context import ForwardContext

    from kvkeep.transfer.base import Move
    from kvkeep.transfer.cuda import CudaTransfer

__all__ = ["Device", "by_blocks", "kind_of", "replays_whole_graphs"]


def by_blocks(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A layer's cache with the engine's blocks first, where its kernels split each into smaller ones."""
    if tensor.device.type == "cpu" or not tensor.dim() or tensor.shape[0] % num_blocks:
        return tensor
    grouped: torch.Tensor = group_kernel_blocks(tensor, num_blocks)
    return grouped


def kind_of(context: ForwardContext) -> str:
    """How the forward runs that this context is for; empty where no layer will be asked for.

    Model Runner V2 replays whole graphs outside of any context, for which it then makes an empty one.
    """
    mode: Any = context.cudagraph_runtime_mode
    return "" if not context.attn_metadata or mode == CUDAGraphMode.FULL else str(mode)


def replays_whole_graphs(compilation: CompilationConfig) -> bool:
    """Whether batches with prefill, which those with a load are, are replayed as graphs of the whole model.

    True once the runner has settled it, before it registers its KV caches. FULL_AND_PIECEWISE and
    FULL_DECODE_ONLY, of which only decoding is a whole graph, are not such.
    """
    mode = compilation.cudagraph_mode
    return mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL


class Device:
    """One rank's. The engine's thread calls it; `_figures` alone is written by another."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._order = LayerOrder()
        self._completions = Completions(backend.attend)
        self._figures: deque[tuple[str, float]] = deque()
        self._kind = ""
        self._layered = False
        self._began: Event | None = None

    def collect(self, stats: KVKeepStats) -> None:
        """Add what has been measured since the last call."""
        while self._figures:
            stats.add(*self._figures.popleft())

    def begin_step(self, transfer: CudaTransfer | None) -> None:
        """The engine is about to submit a step."""
        self._began = transfer.backend.current().record_event() if transfer is not None else None

    def load(self, transfer: CudaTransfer, moves: Sequence[Move], context: ForwardContext) -> Pending:
        """Start a load, layer by layer where the forward will ask for them."""
        order = self._order.of(kind_of(context))
        pending = transfer.start_load(moves, order)
        self._layered = bool(order)
        return pending

    def load_apart(self, transfer: CudaTransfer, moves: Sequence[Move]) -> Pending:
        """Start a load for requests that wait for it: behind all earlier steps, beside this one."""
        return transfer.start_apart(moves, self._began or transfer.backend.current().record_event())

    def arrive(
        self, transfer: CudaTransfer | None, layer: str, context: Callable[[], ForwardContext]
    ) -> None:
        """The forward has come to a layer: the device waits for its bytes, the caller does not."""
        if not self._kind:
            self._kind = kind_of(context())
        self._order.ask(layer)
        if transfer is not None:
            transfer.arrive(layer)

    def end_forward(self, transfer: CudaTransfer | None, tokens: int) -> bool:
        """False where the forward read layers that it had not asked for, while they were loaded.

        `tokens`: what it computes, if that is to tell how fast the engine is.
        """
        if transfer is not None:
            transfer.end_forward()
            if tokens and self._began is not None:
                whole = Pending(0, self._began, transfer.backend.current().record_event())
                count = ("computed_tokens", float(tokens))
                self.after(whole, "compute_seconds", lambda: self._figures.append(count), lambda: None)
        kind, self._kind = self._kind, ""
        as_expected = not kind or self._order.end(kind)
        layered, self._layered = self._layered, False
        return not layered or (bool(kind) and as_expected)

    def after(
        self, pending: Pending, figure: str, then: Callable[[], None], failed: Callable[[], None]
    ) -> None:
        """When the bytes are there, count the device's seconds as `figure`, and go on on another thread."""

        def done(seconds: float) -> None:
            self._figures.append((figure, seconds))
            then()

        self._completions.add(pending, done, failed)
