"""vLLM's engine core and scheduler over a model that knows which text each place of its KV cache holds."""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import RequestStatus

from kvkeep.engines import search
from kvkeep.engines.vllm import worker
from kvkeep.engines.vllm.geometry import Geometry
from kvkeep.errors import KeeperUnavailable
from tests.engines.vllm.ledger import BLOCK, BLOCKS, Ledger, answer, slowly

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(200)]


@contextmanager
def engine(
    model: Path,
    socket: str,
    monkeypatch: pytest.MonkeyPatch,
    overlapped: bool,
    load_by: str,
    role: str = "kv_both",
    **options: Any,
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
    options |= {"socket": socket, "chunk_tokens": 2 * BLOCK, "load_by": load_by}
    arguments = EngineArgs(
        model=str(model),
        worker_cls="tests.engines.vllm.ledger.Ledger",
        skip_tokenizer_init=True,
        kv_transfer_config={
            "kv_connector": "KVKeepConnector",
            "kv_connector_module_path": "kvkeep.engines.vllm",
            "kv_role": role,
            "kv_connector_extra_config": options,
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
        self.loading: dict[str, bool] = {}
        """Requests that waited for a load of theirs, and whether that was all of their prompt."""
        self.given_up = set[str]()

    def prompt(self) -> list[int]:
        """The head of a text that others ask about too, of any length, sometimes with its earlier answer."""
        root = self.draw.choice(self.roots)[: self.draw.randrange(1, 260)]
        if self.said and self.draw.random() < 0.3:
            name = self.draw.choice(list(self.said))
            root = self.asked[name][0] + self.said[name]
        prompt = (root + [self.draw.randrange(3, 4000) for _ in range(self.draw.randrange(1, 20))])[:380]
        whole = len(prompt) // (2 * BLOCK) * 2 * BLOCK
        return prompt[:whole] if whole and self.draw.random() < 0.3 else prompt

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
        asked = 0
        while asked < requests or self.core.scheduler.has_requests():
            if asked < requests and self.draw.random() < 0.35:
                self.ask()
                asked += 1
            if self.draw.random() < 0.02 and len(self.asked) > 1:
                name = self.draw.choice(list(self.asked))
                if len(self.said[name]) < self.asked[name][1]:
                    self.give_up(name)
            if self.draw.random() < 0.02:
                self.core.reset_prefix_cache()
            self.step()
            self.watch()
            time.sleep(self.pause)  # an engine that has lost its session finds it again in the background
        for name, (prompt, count) in self.asked.items():
            right = answer(prompt, count)
            assert self.said[name] == right[: len(self.said[name])], name
            assert len(self.said[name]) == count or name in self.given_up, name

    def give_up(self, name: str) -> None:
        self.core.abort_requests([name])
        self.given_up.add(name)

    def watch(self) -> None:
        """See who waits for a load; every eighth is given up in the middle of it."""
        for name, request in list(self.core.scheduler.requests.items()):
            if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS and name not in self.loading:
                self.loading[name] = request.num_computed_tokens == request.num_tokens
                if len(self.loading) % 8 == 3:
                    self.give_up(name)


@pytest.mark.parametrize("hybrid", [False, True], ids=["one group", "sliding window"])
@pytest.mark.parametrize("overlapped", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("failing", [False, True], ids=["", "loads fail"])
@pytest.mark.parametrize("load_by", ["layers", "request"])
def test_every_text_finds_its_own(
    hybrid: bool,
    overlapped: bool,
    runner: str,
    failing: bool,
    load_by: str,
    tiny_model: Path,
    keeper_process: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[..., None],
) -> None:
    keeper = keeper_process(memory="4MiB")
    monkeypatch.setattr(Ledger, "hybrid", hybrid)
    monkeypatch.setattr(Ledger, "runner", runner)
    monkeypatch.setattr(Ledger, "load_errors", random.Random(1) if failing else None)
    monkeypatch.setattr(Ledger, "nonsense", 0)
    monkeypatch.setattr(search, "_RETRY_FIRST", 0.001)
    monkeypatch.setattr(worker, "load_beside", slowly(random.Random(2), failing))
    with engine(tiny_model, keeper.socket, monkeypatch, overlapped, load_by) as core:
        talk = Talk(core, seed=3, pause=0.002 if failing else 0)
        talk.run(60)
        figures = keeper.figures()["counters"]
        assert (core.batch_queue is not None) == overlapped
        assert core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1
        wait_until(lambda: not keeper.figures()["leases"], 20)
    assert figures["hit_chunks"] > 50
    if load_by == "layers":
        assert not talk.loading
        # Where the engine cannot recompute, a load is repeated instead, before the forward.
        assert (Ledger.nonsense > 0) == (failing and not hybrid and not overlapped)
    else:
        assert len(talk.loading) > 10
        assert hybrid or any(talk.loading.values())
        assert Ledger.nonsense == 0  # nothing is computed from blocks before they are there


def handed_over(core: EngineCore, prompt: list[int], salt: str | None, params: dict[str, Any]) -> Any:
    """One request to its end; its `kv_transfer_params`."""
    sampling = SamplingParams(temperature=0, max_tokens=1, extra_args={"kv_transfer_params": params})
    made = EngineCoreRequest(uuid.uuid4().hex, prompt, None, sampling, None, 0.0, None, salt, None)
    core.add_request(*core.preprocess_add_request(made))
    while True:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        for output in (output for group in (outputs or {}).values() for output in group.outputs):
            if output.finish_reason is not None:
                return output.kv_transfer_params


def test_a_forged_transfer_is_served_nothing_of_another_tenant(
    tiny_model: Path, keeper_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who repeats what another tenant's prefill was answered waits for a prompt of its own, which nobody
    prefills, and computes it."""
    keeper, prompt = keeper_process(memory="4MiB"), list(range(3, 330))
    for name, value in (("hybrid", False), ("runner", "v1"), ("load_errors", None)):
        monkeypatch.setattr(Ledger, name, value)
    with engine(tiny_model, keeper.socket, monkeypatch, False, "layers", "kv_producer") as core:
        told = handed_over(core, prompt, "owner", {"do_remote_decode": True})
    assert told["remote_all"] is True
    options = {"role": "kv_consumer", "remote_wait": 0.2}
    with engine(tiny_model, keeper.socket, monkeypatch, False, "layers", **options) as core:
        loaded = []
        for salt in ("thief", None, "owner"):
            before = keeper.figures()["counters"]["hit_chunks"]
            handed_over(core, prompt, salt, told)
            loaded.append(keeper.figures()["counters"]["hit_chunks"] - before)
    assert loaded[:2] == [0, 0]
    assert loaded[2] == told["remote_num_tokens"] // (2 * BLOCK)


def test_the_next_engine_is_told_of_what_was_kept(
    tiny_model: Path,
    keeper_process: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[..., None],
) -> None:
    """Of a tenant whose quota has no room for its prompt: less than was offered, and not what is refused."""
    keeper = keeper_process("--tenant-quota", "default=16KiB", memory="4MiB")
    for name, value in (("hybrid", False), ("runner", "v1"), ("load_errors", None)):
        monkeypatch.setattr(Ledger, name, value)
    prompt, chunks = list(range(3, 330)), 327 // (2 * BLOCK)

    def told(core: EngineCore, salt: str | None) -> tuple[int, bool]:
        params = handed_over(core, prompt, salt, {"do_remote_decode": True})
        return params["remote_num_tokens"], params["remote_all"]

    with engine(tiny_model, keeper.socket, monkeypatch, False, "layers", "kv_producer") as core:
        assert told(core, None) == (2 * BLOCK * chunks, True)
        tokens, whole = told(core, "tenant")
        wait_until(lambda: keeper.figures()["reservations"] == 0)
        (row,) = keeper.figures()["tenants"]
    assert 0 < row["refused_chunks"] == chunks - row["stored_chunks"] < chunks
    assert (tokens, whole) == (2 * BLOCK * row["stored_chunks"], False)


class Turns:
    """Requests one after the other, each to its end; its keepers come and go on one socket."""

    def __init__(self, core: EngineCore, start: Callable[..., Any], socket: str) -> None:
        self.core, self._start, self._socket = core, start, socket
        self.scheduler: Any = core.scheduler.connector._scheduler
        self._numbers = itertools.count()

    def take(self, number: int | None = None) -> None:
        number = next(self._numbers) if number is None else number
        prompt = [3 + (number * 331 + at) % 4000 for at in range(100)]
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        made = EngineCoreRequest(f"turn {number}", prompt, None, sampling, None, 0.0, None, None, None)
        self.core.add_request(*self.core.preprocess_add_request(made))
        while self.core.scheduler.has_requests():
            _, executed = self.core.step_fn()
            self.core.post_step(executed)

    def until(self, predicate: Callable[[], object]) -> Callable[[], object]:
        """For `wait_until`: a turn each time."""
        return lambda: self.take() or predicate()

    def keeper(self) -> Any:
        return self._start(memory="4MiB", socket=self._socket)


@pytest.fixture
def turns(
    tiny_model: Path, keeper_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Turns]:
    """An engine without a keeper, which looks for one often."""
    for name, value in (("hybrid", False), ("runner", "v1"), ("load_errors", None)):
        monkeypatch.setattr(Ledger, name, value)
    monkeypatch.setattr(search, "_RETRY_FIRST", 0.001)
    monkeypatch.setattr(search, "_RETRY_MOST", 0.01)
    socket = str(keeper_process.directory() / "keeper.sock")
    with engine(tiny_model, socket, monkeypatch, False, "layers") as core:
        yield Turns(core, keeper_process, socket)


def test_a_keeper_that_ends_before_all_have_joined(turns: Turns, wait_until: Callable[..., None]) -> None:
    """The scheduler asks nothing of it until then, and so would never hear of it."""
    side, rank = turns.scheduler, get_kv_transfer_group()._worker
    join = rank._joining._join

    def not_yet(keeper: str, epoch: int) -> Any:
        raise KeeperUnavailable("not yet, by the test's own wish")

    rank._joining._join = not_yet
    first = turns.keeper()
    wait_until(turns.until(lambda: side._keeper is not None))
    assert not side._ready
    first.process.kill()
    first.process.wait(20)
    second = turns.keeper()
    rank._joining._join = join
    wait_until(turns.until(lambda: side._ready))
    assert side._keeper.connection.keeper == second.figures()["keeper"]
    wait_until(turns.until(lambda: second.figures()["chunks"]))


def test_plans_are_of_the_session_that_they_were_made_in(
    turns: Turns, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their places are offsets in its arena, and in no other one's."""
    side = turns.scheduler
    turns.keeper()
    wait_until(turns.until(lambda: side._ready))
    old = side._session

    def renew() -> None:
        side._session = replace(old, place=("the next keeper", old.epoch + 1))

    with monkeypatch.context() as patch:
        patch.setattr(side, "_renew", renew)
        meta = side.step(SchedulerOutput.make_empty(), lambda action, otherwise: action())
    assert meta.epoch == old.epoch
    side._session = old


def test_a_reset_while_the_keeper_is_away(turns: Turns, wait_until: Callable[..., None]) -> None:
    side = turns.scheduler
    first = turns.keeper()
    wait_until(turns.until(lambda: side._ready))
    old = side._fingerprint
    first.close()
    wait_until(turns.until(lambda: side._keeper is None))
    assert turns.core.reset_prefix_cache(reset_connector=True)
    second = turns.keeper()
    wait_until(turns.until(lambda: second.figures()["chunks"]))
    assert side._fingerprint != old
    assert {space["fingerprint"] for space in second.figures()["namespaces"]} == {side._fingerprint.hex()}


def test_what_was_reserved_ends_when_the_cache_is_off(
    turns: Turns, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then other engines could not store it."""
    keeper = turns.keeper()
    wait_until(turns.until(lambda: turns.scheduler._ready))
    wait_until(lambda: not keeper.figures()["reservations"])

    reserved = list[Any]()

    def breaks(*_: Any) -> None:
        reserved.append(keeper.figures()["reservations"])
        raise RuntimeError("by the test's own wish")

    monkeypatch.setattr(Geometry, "add_save", breaks)
    turns.take()
    assert turns.scheduler._disabled
    assert reserved == [1]
    wait_until(lambda: not keeper.figures()["reservations"] and not keeper.figures()["leases"])


def test_what_is_certainly_not_held_is_not_asked_for(
    turns: Turns, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper counts it all the same, and what is held is found."""
    keeper = turns.keeper()
    wait_until(turns.until(lambda: turns.scheduler._ready))
    connection, asked = turns.scheduler._keeper.connection, list[Any]()
    lookup = connection.lookup
    monkeypatch.setattr(connection, "lookup", lambda *given: asked.append(given) or lookup(*given))

    def counts() -> list[int]:
        counters = keeper.figures()["counters"]
        return [counters[name] for name in ("lookups", "local_chunks", "asked_chunks", "hit_chunks")]

    before = counts()
    turns.take(1000)
    assert not asked
    assert [now - old for now, old in zip(counts(), before, strict=True)] == [1, 0, 3, 0]
    turns.core.reset_prefix_cache()
    turns.take(1000)
    assert len(asked) == 1
    assert [now - old for now, old in zip(counts(), before, strict=True)] == [2, 0, 6, 3]
    turns.take(1000)  # which the engine has itself: its use counts
    assert len(asked) == 2
    assert [now - old for now, old in zip(counts(), before, strict=True)] == [3, 3, 6, 3]


def test_who_asks_for_nothing_hears_that_the_keeper_is_gone(
    turns: Turns, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = turns.keeper()
    wait_until(turns.until(lambda: turns.scheduler._ready))
    monkeypatch.setattr(turns.scheduler._saves, "plan", lambda *_: None)
    keeper.process.kill()
    keeper.process.wait(20)
    assert turns.scheduler._keeper is not None
    turns.take()
    assert turns.scheduler._keeper is None


@pytest.mark.parametrize("waits", ["worker", "scheduler"])
def test_an_answer_that_never_comes(
    waits: str, turns: Turns, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it first does so no longer than for any, and nobody after that; both begin anew."""
    keeper, side = turns.keeper(), turns.scheduler
    wait_until(turns.until(lambda: side._ready))
    epoch, joined = side._keeper.epoch, get_kv_transfer_group()._worker._joined
    for connection in (side._keeper.connection, joined.connection):
        monkeypatch.setattr(connection, "_timeout", 0.05)
    asked, reserved = list[Any](), side._keeper.connection.reserved
    monkeypatch.setattr(side._keeper.connection, "begin_reserve", lambda *_: 0.0)  # lost on its way
    monkeypatch.setattr(
        side._keeper.connection, "reserved", lambda *given: asked.append(given) or reserved(*given)
    )
    if waits == "scheduler":
        monkeypatch.setattr(joined, "reserved", lambda *_: [])
    turns.take()
    if waits == "worker":
        assert joined.closed
        assert not asked
    wait_until(turns.until(lambda: joined.closed))
    assert len(asked) == (waits == "scheduler")
    assert side._keeper is None or side._keeper.epoch > epoch
    held = keeper.figures()["chunks"]
    wait_until(turns.until(lambda: side._ready and keeper.figures()["chunks"] > held))


def test_what_is_being_saved_is_known_before_events_are_asked_for(
    turns: Turns, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the engine would wait for the announcement of what has been announced."""
    side, calls = turns.scheduler, list[str]()
    turns.keeper()
    wait_until(turns.until(lambda: side._ready))
    sink = SimpleNamespace(
        met=lambda *_: None,
        look_out=lambda: None,
        pending=False,
        awaiting=lambda chunks: calls.append(f"awaiting {chunks}"),
        take=lambda keeper: calls.append("take") or (),
    )
    monkeypatch.setattr(side, "events", sink)
    monkeypatch.setattr(side._saves, "_events", sink)
    turns.take(2000)
    first = calls.index("take")
    assert first
    assert sum(int(call.split()[1]) for call in calls[:first]) == 3
