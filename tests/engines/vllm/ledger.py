"""A vLLM worker whose model is a ledger: each place of the KV cache says which text it belongs to.

What it "computes" for a token is a number made of all tokens up to it, so a forward can tell whether every
place that it attends to holds just what its text demands. Where one does not, it computes nonsense, as a
model would: wrong numbers in the cache, and a wrong token. All around it is vLLM's own: engine core,
scheduler, executor, hooks of the model runners.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.distributed.kv_transfer import (
    ensure_kv_transfer_initialized,
    ensure_kv_transfer_shutdown,
    get_kv_transfer_group,
)
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from kvkeep.errors import KVKeepError
from kvkeep.transfer.base import Move, Transfer
from kvkeep.transfer.pipeline import load_beside

__all__ = ["BLOCK", "LAYERS", "WINDOW", "Ledger", "answer", "slowly"]

BLOCK, LAYERS, BLOCKS = 16, 2, 46
WINDOW = 33  # no whole number of blocks: what it still looks back on begins at any place of a block
_MODULUS = (1 << 23) - 15  # exact in float32


def sums(tokens: list[int]) -> list[int]:
    """Per token, the number of the text up to it."""
    out, state = [], 7
    for token in tokens:
        state = (state * 4093 + token + 1) % _MODULUS
        out.append(state)
    return out


def follower(total: int) -> int:
    """The token that the model says after a text of this number."""
    return 3 + total % 4000


def answer(prompt: list[int], count: int) -> list[int]:
    """What the engine has to say."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(follower(sums(tokens)[-1]))
    return tokens[len(prompt) :]


def slowly(draw: random.Random, failing: bool) -> Callable[[Transfer, Sequence[Move]], float]:
    """`load_beside` that takes the time of a few steps; where `failing`, one of five ends halfway."""

    def load(transfer: Transfer, moves: Sequence[Move]) -> float:
        time.sleep(0.015 * draw.random())
        if failing and draw.random() < 0.2:
            for group, offsets, blocks in moves:
                transfer.load(group, offsets[:1], blocks[:1])
            raise KVKeepError("a load that ends halfway, by the test's own wish")
        return load_beside(transfer, moves)

    return load


class Ledger(WorkerBase):
    """One rank. `hybrid`: a second group of layers, whose window slides."""

    hybrid = False
    runner = "v1"
    """Whose order of hooks: "v1" or "v2"."""
    load_errors: random.Random | None = None
    """Where given, one load of three fails."""
    nonsense = 0
    """Forwards of a request that met another text's KV."""

    def __init__(self, *args: Any, shared_worker_lock: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.blocks: dict[str, list[list[int]]] = {}
        self._result: ModelRunnerOutput

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        with set_current_vllm_config(self.vllm_config):
            init_distributed_environment(1, 0, self.distributed_init_method, 0, "gloo")
            initialize_model_parallel(1, 1)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        pass

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 4, "dtype": torch.float32}
        specs: dict[str, KVCacheSpec] = {f"full.{n}": FullAttentionSpec(**shape) for n in range(LAYERS)}
        if self.hybrid:
            window = SlidingWindowSpec(**shape, sliding_window=WINDOW)
            specs.update({f"sliding.{n}": window for n in range(LAYERS)})
        return specs

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBHNC"]

    def determine_available_memory(self) -> int:
        return 1 << 24

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        config = kv_cache_configs[0] if isinstance(kv_cache_configs, list) else kv_cache_configs
        groups = config.kv_cache_groups
        self.groups = [list(group.layer_names) for group in groups]
        self.windows = [getattr(group.kv_cache_spec, "sliding_window", None) for group in groups]
        self.caches = {
            name: torch.zeros(config.num_blocks, BLOCK, 8) for names in self.groups for name in names
        }
        with set_current_vllm_config(self.vllm_config):
            ensure_kv_transfer_initialized(self.vllm_config, config)
            self.connector = ActiveKVConnector(self.vllm_config, self.caches)
        if self.load_errors is not None:
            self._fail_some(self.load_errors)

    def _fail_some(self, draw: random.Random) -> None:
        side = get_kv_transfer_group()._worker
        load, begin = side.load, side.load_apart

        def sometimes(meta: Any, context: Any) -> bool:
            if meta.loads is not None and draw.random() < 0.33:
                raise KVKeepError("a load that fails, by the test's own wish")
            done: bool = load(meta, context)
            return done

        def seldom(meta: Any, name: str, copies: Any) -> bool:
            if draw.random() < 0.2:
                raise KVKeepError("a load that cannot begin, by the test's own wish")
            begun: bool = begin(meta, name, copies)
            return begun

        side.load, side.load_apart = sometimes, seldom

    def get_kv_connector_handshake_metadata(self) -> dict[tuple[int, int], Any]:
        return {(0, 0): get_kv_transfer_group().get_handshake_metadata()}

    def shutdown(self) -> None:
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput | None:
        result = self._result = self._step(scheduled)
        return None if scheduled.total_num_scheduled_tokens else result

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        return self._result

    def _step(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        if self.runner == "v2":
            self._update(scheduled)
            self.connector.pre_forward(scheduled)
            ids, sampled = self._forward(scheduled)
            self.connector.finish_forward()
            return self._output(ids, sampled, self.connector.post_forward(scheduled.finished_req_ids))
        get_kv_transfer_group().handle_preemptions(scheduled.kv_connector_metadata)
        self._update(scheduled)
        with (
            set_forward_context(None, self.vllm_config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduled) as told,
        ):
            ids, sampled = self._forward(scheduled)
        return self._output(ids, sampled, told)

    def _output(
        self, ids: list[str], sampled: list[list[int]], told: KVConnectorOutput | None
    ) -> ModelRunnerOutput:
        index = {name: at for at, name in enumerate(ids)}
        return ModelRunnerOutput(ids, index, sampled, kv_connector_output=told)

    def _update(self, scheduled: SchedulerOutput) -> None:
        for name in scheduled.finished_req_ids:
            self.tokens.pop(name, None)
            self.blocks.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids or ())
            self.prompts[new.req_id] = len(new.prompt_token_ids or ())
            self.blocks[new.req_id] = [list(group) for group in new.block_ids]
        cached = scheduled.scheduled_cached_reqs
        for name, blocks, said in zip(
            cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True
        ):
            if name in cached.all_token_ids:
                self.tokens[name] = list(cached.all_token_ids[name])
            del self.tokens[name][self.prompts[name] + said :]  # taken back: they came of a load that failed
            if name in cached.resumed_req_ids:
                self.blocks[name] = [list(group) for group in blocks or ()]
            elif blocks is not None:
                for mine, more in zip(self.blocks[name], blocks, strict=True):
                    mine.extend(more)

    def _forward(self, scheduled: SchedulerOutput) -> tuple[list[str], list[list[int]]]:
        starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        ids, sampled = list(scheduled.num_scheduled_tokens), []
        for name in ids:
            start, count = starts[name], scheduled.num_scheduled_tokens[name]
            tokens = self.tokens[name]
            assert start + count <= len(tokens), (name, start, count, len(tokens))
            expected = torch.tensor(sums(tokens[: start + count]), dtype=torch.float32)
            sane = self._attend(name, expected, start)
            sampled.append([])
            if start + count == len(tokens):
                tokens.append(follower(int(expected[-1])) if sane else 1)
                sampled[-1].append(tokens[-1])
        return ids, sampled

    def _attend(self, name: str, expected: torch.Tensor, start: int) -> bool:
        """Look at all that the first new token attends to, and write what is new."""
        places, sane = torch.arange(len(expected)), True
        at = [torch.tensor(blocks)[places // BLOCK] for blocks in self.blocks[name]]
        for layers, blocks, window in zip(self.groups, at, self.windows, strict=True):
            seen = places[max(0, start - window + 1) if window else 0 : start]
            for number, layer in enumerate(layers):
                found = self.caches[layer][blocks[seen], seen % BLOCK]
                sane = sane and torch.equal(found, (expected[seen, None] + number).expand(-1, 8))
        for layers, blocks in zip(self.groups, at, strict=True):
            new = places[start:]
            for number, layer in enumerate(layers):
                values = expected[new, None] + number if sane else torch.full((len(new), 1), -1.0)
                self.caches[layer][blocks[new], new % BLOCK] = values.expand(-1, 8)
        type(self).nonsense += not sane
        return sane
