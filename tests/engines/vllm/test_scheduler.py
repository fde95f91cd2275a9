"""vLLM's engine core and scheduler over a model that knows which text each place of its KV cache holds."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from kvkeep.engines import link
from tests.engines.vllm.ledger import BLOCK, BLOCKS, Ledger, answer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(200)]


@contextmanager
def engine(
    model: Path, socket: str, monkeypatch: pytest.MonkeyPatch, overlapped: bool
) -> Iterator[EngineCore]:
    """An engine core in this process, with our connector on both sides."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    settings: dict[str, Any] = {
        "max_model_len": 448,
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        "num_gpu_blocks_override": BLOCKS,
    }
    arguments = EngineArgs(
        model=str(model),
        worker_cls="tests.engines.vllm.ledger.Ledger",
        skip_tokenizer_init=True,
        kv_transfer_config={
            "kv_connector": "KVKeepConnector",
            "kv_connector_module_path": "kvkeep.engines.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"socket": socket, "chunk_tokens": 2 * BLOCK},
        },
        **settings,
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = overlapped  # which the CPU's platform switches off
    # Of what the runner's version changes, the scheduler's part is wanted here; the rest needs Triton.
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", Ledger.runner == "v2")
    monkeypatch.setattr(type(current_platform), "register_triton_kernel_overrides", lambda *_: None)
    core = EngineCore(config, UniProcExecutor, log_stats=False)
    try:
        yield core
    finally:
        core.shutdown()


class Talk:
    """Requests that come and go while the engine steps; all answers are held against the model's own."""

    def __init__(self, core: EngineCore, seed: int, pause: float) -> None:
        self.core, self.draw, self.pause = core, random.Random(seed), pause
        self.roots = [[self.draw.randrange(3, 4000) for _ in range(260)] for _ in range(4)]
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.said: dict[str, list[int]] = {}
        self.numbers = itertools.count()

    def prompt(self) -> list[int]:
        """The head of a text that others ask about too, of any length, sometimes with its earlier answer."""
        root = self.draw.choice(self.roots)[: self.draw.randrange(1, 260)]
        if self.said and self.draw.random() < 0.3:
            name = self.draw.choice(list(self.said))
            root = self.asked[name][0] + self.said[name]
        return (root + [self.draw.randrange(3, 4000) for _ in range(self.draw.randrange(1, 20))])[:380]

    def ask(self) -> None:
        name, prompt, count = f"r{next(self.numbers)}", self.prompt(), self.draw.randrange(1, 60)
        self.asked[name], self.said[name] = (prompt, count), []
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        made = EngineCoreRequest(name, prompt, None, sampling, None, 0.0, None, None, None)
        self.core.add_request(*self.core.preprocess_add_request(made))

    def step(self) -> None:
        if not self.core.scheduler.has_requests() and not self.core.batch_queue:
            return
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        for group in (outputs or {}).values():
            for output in group.outputs:
                self.said[output.request_id] += output.new_token_ids

    def run(self, requests: int) -> None:
        """All of them; the engine's own cache is emptied, and some are given up, in between."""
        asked, given_up = 0, set[str]()
        while asked < requests or self.core.scheduler.has_requests():
            if asked < requests and self.draw.random() < 0.35:
                self.ask()
                asked += 1
            if self.draw.random() < 0.02 and len(self.asked) > 1:
                name = self.draw.choice(list(self.asked))
                if len(self.said[name]) < self.asked[name][1]:
                    self.core.abort_requests([name])
                    given_up.add(name)
            if self.draw.random() < 0.02:
                self.core.reset_prefix_cache()
            self.step()
            time.sleep(self.pause)  # an engine that has lost its session finds it again in the background
        for name, (prompt, count) in self.asked.items():
            right = answer(prompt, count)
            assert self.said[name] == right[: len(self.said[name])], name
            assert len(self.said[name]) == count or name in given_up, name


@pytest.mark.parametrize("hybrid", [False, True], ids=["one group", "sliding window"])
@pytest.mark.parametrize("overlapped", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("failing", [False, True], ids=["", "loads fail"])
def test_every_text_finds_its_own(
    hybrid: bool,
    overlapped: bool,
    runner: str,
    failing: bool,
    tiny_model: Path,
    keeper_process: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper = keeper_process(memory="4MiB")
    monkeypatch.setattr(Ledger, "hybrid", hybrid)
    monkeypatch.setattr(Ledger, "runner", runner)
    monkeypatch.setattr(Ledger, "load_errors", random.Random(1) if failing else None)
    monkeypatch.setattr(Ledger, "nonsense", 0)
    monkeypatch.setattr(link, "_RETRY_FIRST", 0.001)
    with engine(tiny_model, keeper.socket, monkeypatch, overlapped) as core:
        Talk(core, seed=3, pause=0.002 if failing else 0).run(60)
        figures = keeper.figures()["counters"]
        assert (core.batch_queue is not None) == overlapped
    assert figures["hit_chunks"] > 50
    # Where the engine cannot recompute, a load is repeated instead, before the forward.
    assert (Ledger.nonsense > 0) == (failing and not hybrid and not overlapped)
