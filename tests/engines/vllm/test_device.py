"""A rank on a device, with a real keeper: the device is one of the tests' own, late and out of order."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import ForwardContext
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from kvbench.host_device import HostBackend, HostEvent
from kvkeep.config import EngineConfig
from kvkeep.engines.link import session_name
from kvkeep.engines.vllm import worker
from kvkeep.engines.vllm.connector import KVKeepConnector
from kvkeep.engines.vllm.describe import describe_backends
from kvkeep.engines.vllm.device import Device, by_blocks, kind_of, replays_whole_graphs
from kvkeep.engines.vllm.geometry import blocks_written
from kvkeep.engines.vllm.metadata import Copies, Offered, Session, StepMeta
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.errors import DeviceError, KeeperUnavailable
from kvkeep.transfer import choose, cuda
from kvkeep.transfer.streams import Pending
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds

LAYERS, BLOCKS, PER_CHUNK, CHUNKS = 4, 24, 4, 2
KEYS = bytes(range(16 * CHUNKS))
NAMES = [f"layer.{n}" for n in range(LAYERS)]


def context(mode: CUDAGraphMode = CUDAGraphMode.PIECEWISE, metadata: Any = True) -> ForwardContext:
    return ForwardContext({}, {NAMES[0]: object()} if metadata else {}, {}, cudagraph_runtime_mode=mode)


class Rank:
    """One worker of an engine on the tests' device, and its scheduler as far as the keeper sees it."""

    def __init__(
        self, keeper: Any, patch: pytest.MonkeyPatch, seed: int, captured: bool = True, on_cpu: bool = False
    ) -> None:
        self.keeper, self.ticket = keeper, 0
        self.backend = HostBackend(random.Random(seed))
        self.layers = {name: torch.randn(BLOCKS, 1024) for name in NAMES}
        group = SimpleNamespace(rank_in_group=0)
        patch.setattr(cuda, "_STAGE_BYTES", 1)
        patch.setattr(worker, "get_pp_group", lambda: group)
        patch.setattr(worker, "get_tp_group", lambda: group)
        patch.setattr(worker, "get_forward_context", context)
        for module in (worker, choose):  # of tensors that lie on a CPU
            patch.setattr(module, "make_backend", lambda devices: None if on_cpu else self.backend)
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(engine_id="engine"),
            compilation_config=SimpleNamespace(static_forward_context={}, cudagraph_mode=None),
        )
        kv = SimpleNamespace(
            num_blocks=BLOCKS,
            kv_cache_groups=[SimpleNamespace(layer_names=NAMES)],
            needs_kv_cache_zeroing=False,
        )
        self.side = worker.WorkerSide(config, kv, EngineConfig(socket=keeper.socket))
        self.side.register(self.layers)
        if captured:
            assert self.side.handshake().place == (keeper.figures()["keeper"], 0)
        self.link = keeper.connect(session_name("engine", 0))
        size = self.side._handshake.block_bytes[0]
        assert size == LAYERS * 4096
        self.space = self.link.open_namespace(b"f" * 32, "test", [(size * PER_CHUNK, None)], 1, 1)
        self.session = Session(self.side._handshake.place, {(0, 0): [0]}, {(0, 0): 0})

    def copies(self, offsets: np.ndarray, blocks: list[int], claim: int) -> Copies:
        copies = Copies(claims=[claim], tokens=len(blocks))
        index = np.tile(np.arange(PER_CHUNK), CHUNKS)
        copies.add(0, np.repeat(offsets, PER_CHUNK), index, np.array(blocks, np.int64))
        return copies

    def offer(self, blocks: list[int], keys: bytes = KEYS) -> Offered:
        """Ask the keeper for slots for these blocks, as the chunks of KEYS."""
        self.ticket += 1
        self.link.begin_reserve(self.space, [Reservation(keys, [b"\1" * CHUNKS], 0, 0)], self.ticket)
        offered = Offered(self.ticket, math.inf, PER_CHUNK)
        places, index = np.repeat(np.arange(CHUNKS), PER_CHUNK), np.tile(np.arange(PER_CHUNK), CHUNKS)
        offered.blocks.add(0, places, index, np.array(blocks, np.int64))
        return offered

    def keep(self, blocks: list[int]) -> None:
        """Save these blocks in a step, as the chunks of KEYS."""
        assert self.step(saves=self.offer(blocks))

    def step(
        self,
        loads: Copies | None = None,
        saves: Offered | None = None,
        writes: int | None = None,
        apart: dict[str, Copies | None] | None = None,
        gate: HostEvent | None = None,
    ) -> bool:
        """One step as Model Runner V2 makes it; `writes`: a block that its forward overwrites; `gate`: what
        that forward waits for."""
        apart = apart or {}
        written = [row for copies in apart.values() if copies for row in copies.blocks[0]]
        reused = np.concatenate([*written, np.array([] if writes is None else [writes], np.int64)])
        tokens = 128 if gate is None else 1  # a forward that stands still is not to be measured
        meta = StepMeta(0, loads, apart, saves, self.session, reused=reused, scheduled_tokens=tokens)
        self.side.fence(meta)
        self.side.begin_step()
        if gate is not None:
            self.backend.engine.wait_event(gate)
        assert self.side.load(meta, context())
        for name, copies in apart.items():
            assert self.side.load_apart(meta, name, copies)
        for name in NAMES:
            self.side.arrive(name)
            if writes is not None:
                target = self.layers[name]
                self.backend.engine.submit([lambda target=target: target[writes].fill_(7)])
        fine = self.side.end_forward(meta)
        self.side.save(meta)
        return fine

    def figure(self, name: str) -> int:
        return int(self.keeper.figures()[name])


@pytest.mark.parametrize("seed", range(3))
def test_saved_behind_the_forward_and_loaded_beside_it(
    seed: int, keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(keeper_process(), monkeypatch, seed)
    before = {name: tensor.clone() for name, tensor in rank.layers.items()}
    saved, fresh = list(range(1, 9)), list(range(12, 20))
    rank.keep(saved)
    assert rank.step(writes=saved[3])  # given to somebody else while it is still being saved
    wait_until(lambda: not rank.figure("reservations"), 20)
    assert rank.step()  # by now the order of layers is known

    found = rank.link.lookup(rank.space, KEYS)
    assert found.chunks == CHUNKS
    assert rank.side._device._order.of(kind_of(context())) == tuple(NAMES)
    assert rank.step(loads=rank.copies(found.offsets[0], fresh, found.lease))
    wait_until(lambda: not rank.figure("leases"), 20)
    for name, tensor in rank.layers.items():
        assert torch.equal(tensor[fresh], before[name][saved]), name
        assert (tensor[saved[3]] == 7).all()

    rank.side.stop(wait=20)
    assert rank.side._joined.connection.closed
    rank.side.begin_step()
    figures = rank.side.stats.data
    assert figures["saved_bytes"] == figures["loaded_bytes"] == 8 * LAYERS * 4096
    assert figures["save_seconds"] > 0
    assert figures["computed_tokens"] == 3 * 128


def test_a_connection_ends_after_the_copies(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claims protect slots that the device still writes; and what was under way is not committed."""
    rank = Rank(keeper_process(), monkeypatch, 1)
    rank.step()
    saves = rank.offer(list(range(1, 9)))
    rank.backend._lock.acquire()  # the device stands still
    try:
        rank.step(saves=saves)
        rank.side.stop()
        assert rank.side._joined.closed
        assert not rank.side._joined.connection.closed
        assert rank.side._joined._ending.is_alive()
    finally:
        rank.backend._lock.release()
    rank.side.stop(wait=20)
    assert rank.side._joined.connection.closed
    assert rank.figure("reservations") == 1
    rank.link.close()
    wait_until(lambda: not rank.figure("reservations"), 20)
    assert rank.figure("chunks") == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_request_waits_for_its_load_while_a_forward_goes_on(
    seed: int, keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(keeper_process(), monkeypatch, seed)
    before = {name: tensor.clone() for name, tensor in rank.layers.items()}
    saved, fresh = list(range(1, 9)), list(range(12, 20))
    rank.keep(saved)
    wait_until(lambda: not rank.figure("reservations"), 20)
    found = rank.link.lookup(rank.space, KEYS)

    assert rank.step(writes=fresh[0])  # by a request that has ended since: before the load
    gate = HostEvent(rank.backend)
    waits = {"r": rank.copies(found.offsets[0], fresh, found.lease)}
    assert rank.step(apart=waits, gate=gate)
    wait_until(rank.side.apart.ended, 20)
    assert gate.at is None  # the forward has not gone on
    assert rank.side.apart.ended() == ["r"]
    assert rank.side.settle("r")
    assert rank.side.apart.ended() == []
    for name, tensor in rank.layers.items():
        assert torch.equal(tensor[fresh], before[name][saved]), name
    wait_until(lambda: not rank.figure("leases"), 20)
    figures = rank.side.stats.data
    assert (figures["loaded_bytes"], figures["loaded_tokens"]) == (8 * LAYERS * 4096, 8)
    gate.at = 0.0
    rank.side.stop(wait=20)


def test_a_rank_that_leaves_ends_its_loads_first(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim on what it reads ends with its connection; what is asked of it afterwards is refused."""
    rank = Rank(keeper_process(), monkeypatch, 3)
    rank.keep(list(range(1, 9)))
    wait_until(lambda: not rank.figure("reservations"), 20)
    found = rank.link.lookup(rank.space, KEYS)
    rank.backend._lock.acquire()  # the device stands still
    try:
        rank.step(apart={"r": rank.copies(found.offsets[0], list(range(12, 20)), found.lease)})
        rank.side.stop()
        assert rank.side._joined.leaving
        assert not rank.side._joined.connection.closed
        assert rank.side.apart.ended() == []
    finally:
        rank.backend._lock.release()
    wait_until(rank.side.apart.ended, 20)
    assert rank.side.settle("r")
    late = rank.copies(found.offsets[0], list(range(12, 20)), found.lease)
    meta = StepMeta(0, late, {"late": late}, session=rank.session)
    for refused in (
        lambda: rank.side.load_apart(meta, "late", late),
        lambda: rank.side.load(meta, context()),
        lambda: rank.side.load_again(meta),  # not as a second try either
    ):
        with pytest.raises(KeeperUnavailable, match="is not in session 0"):
            refused()
    rank.side.stop(wait=20)
    assert rank.side._joined.connection.closed


@pytest.mark.parametrize("lost", [True, False])
def test_what_a_rank_on_a_cpu_loads_that_has_left(
    lost: bool, keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing: its leases may have ended. But from a keeper that is gone, as none writes there any more."""
    rank = Rank(keeper_process(), monkeypatch, 0, on_cpu=True)
    before = {name: tensor.clone() for name, tensor in rank.layers.items()}
    saved, fresh = list(range(1, 9)), list(range(12, 20))
    rank.keep(saved)
    wait_until(lambda: not rank.figure("reservations"), 20)
    found = rank.link.lookup(rank.space, KEYS)
    loads = rank.copies(found.offsets[0], fresh, found.lease)
    if not lost:
        rank.side.stop()
        for load in (rank.side.load, lambda meta, _: rank.side.load_again(meta)):
            with pytest.raises(KeeperUnavailable, match="is not in session 0"):
                load(StepMeta(0, loads, session=rank.session), context())
        return
    rank.keeper.process.kill()
    rank.keeper.process.wait(20)
    joined = rank.side._joined
    wait_until(lambda: joined.tell((0, 0), Connection.release, [77], 0) or joined.leaving, 20)
    assert rank.step(loads=loads)
    assert all(torch.equal(tensor[fresh], before[name][saved]) for name, tensor in rank.layers.items())


@pytest.mark.parametrize("seed", range(4))
def test_a_load_that_is_repeated_is_behind_what_the_first_try_began(
    seed: int, keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its lease can end: a copy under way would read what others write there by then. The session
    goes on, as later steps that were planned meanwhile load in it."""
    rank = Rank(keeper_process(), monkeypatch, seed)
    before = {name: tensor.clone() for name, tensor in rank.layers.items()}
    saved, fresh = list(range(1, 9)), list(range(12, 20))
    rank.keep(saved)
    wait_until(lambda: not rank.figure("reservations"), 20)
    found, copy = rank.link.lookup(rank.space, KEYS), rank.backend.copy
    meta = StepMeta(0, rank.copies(found.offsets[0], fresh, found.lease), session=rank.session)

    def refuse(*args: Any, **options: Any) -> None:
        copy(*args, **options)
        raise DeviceError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(rank.backend, "copy", refuse)
        with pytest.raises(DeviceError):
            rank.side.load(meta, context())
    rank.side.load_again(meta)
    wait_until(lambda: not rank.figure("leases"), 20)
    for name, tensor in rank.layers.items():
        assert torch.equal(tensor[fresh], before[name][saved]), name
        tensor[fresh] = 7
    rank.backend.finish()
    assert all((tensor[fresh] == 7).all() for tensor in rank.layers.values())
    assert not rank.side._joined.leaving
    rank.side.stop(wait=20)


def test_who_recomputes_what_failed_to_load() -> None:
    def recomputes(groups: int = 1, batches: int = 1, drafts: bool = False, v2: bool = False) -> bool:
        config = SimpleNamespace(
            max_concurrent_batches=batches, speculative_config=drafts or None, use_v2_model_runner=v2
        )
        cache = SimpleNamespace(kv_cache_groups=[None] * groups)
        given = SimpleNamespace(_vllm_config=config, _kv_cache_config=cache)
        return KVKeepConnector._recomputes.fget(given)

    assert recomputes()
    assert recomputes(drafts=True, v2=True)
    assert not recomputes(groups=2)
    assert not recomputes(batches=2)
    assert not recomputes(drafts=True), "V1 asks for failed blocks before it says that all is computed"


def test_nothing_is_asked_of_the_driver_before_graphs_are_captured(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses many a call meanwhile, whatever thread it comes from; and the capture may fail of it."""
    rank = Rank(keeper_process(), monkeypatch, 5, captured=False)
    starts = list[int]()
    pinning = rank.side._joined.device.pinning
    start = pinning.start
    monkeypatch.setattr(pinning, "start", lambda fd: starts.append(fd) or start(fd))
    assert not starts
    rank.side.handshake()  # vLLM asks for it once it has captured
    rank.step()
    assert len(starts) == 1
    wait_until(lambda: pinning.registered == len(rank.side._joined.transfer.arena), 20)
    saved = rank.backend.attended
    rank.keep(list(range(1, 9)))
    wait_until(lambda: not rank.figure("reservations"), 20)
    rank.side.stop(wait=20)
    threads = {name.rstrip("0123456789_") for name in saved}
    assert threads == {"kvkeep-pin", "kvkeep-completions", "kvkeep-end"}
    assert not rank.backend.registered


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error"), KeyError("a bug of ours")])
def test_what_follows_a_copy(error: Exception | None, wait_until, caplog: pytest.LogCaptureFixture) -> None:
    """Comes after the bytes, on another thread, which survives whatever goes wrong."""
    backend, said = HostBackend(random.Random(0)), list[Any]()
    device, stats, copied = Device(backend), KVKeepStats(), list[int]()

    def then(number: int) -> None:
        said.append((number, len(copied) >= number, threading.current_thread() is threading.main_thread()))
        if error is not None and number == 2:
            raise error

    for number in range(1, 4):
        stream = backend.stream()
        began = stream.record_event()
        stream.submit([lambda number=number: copied.append(number)])
        pending = Pending(1, began, stream.record_event())
        device.after(pending, "save_seconds", partial(then, number), partial(said.append, f"failed {number}"))
    wait_until(lambda: (3, True, False) in said, 20)
    assert [what for what in said if what != "failed 2"] == [(n, True, False) for n in (1, 2, 3)]
    assert ("failed 2" in said) == (error is not None)
    assert ("Traceback" in caplog.text) == (error is not None)
    device.collect(stats)
    assert stats.data["save_seconds"] > 0


def test_which_engines_load_by_request() -> None:
    modes = {mode for mode in CUDAGraphMode if replays_whole_graphs(CompilationConfig(cudagraph_mode=mode))}
    assert modes == {CUDAGraphMode.FULL}


def test_a_forward_that_asks_for_fewer_layers_fails_its_load(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(keeper_process(), monkeypatch, 2)
    for saves in (rank.offer(list(range(1, 9))), None):
        rank.step(saves=saves)
    wait_until(lambda: not rank.figure("reservations"), 20)
    found = rank.link.lookup(rank.space, KEYS)
    monkeypatch.setitem(globals(), "NAMES", NAMES[:2])
    assert not rank.step(loads=rank.copies(found.offsets[0], list(range(12, 20)), found.lease))
    rank.side.stop(wait=20)


def test_how_a_forward_runs() -> None:
    assert kind_of(context(CUDAGraphMode.FULL)) == kind_of(context(metadata=False)) == ""
    kinds = {kind_of(context(mode)) for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)}
    assert len(kinds - {""}) == 2


def test_kernel_blocks_are_put_together_again() -> None:
    on_device = torch.empty(12, 2, 16, 8, device="meta")
    assert by_blocks(on_device, 12).shape == (12, 2, 16, 8)
    assert by_blocks(on_device, 3).shape == (3, 4, 2, 16, 8)
    assert by_blocks(on_device, 5) is on_device  # for `group_layout` to refuse


def test_blocks_that_a_step_may_write() -> None:
    new = NewRequestData("a", [1], [], None, None, ([3, 4], [9]), 0, None)
    cached = CachedRequestData(["b", "c"], {"c"}, [], {}, [None, ([5], [0])], [0, 0], [0, 0])
    output = SchedulerOutput([new], cached, {}, 0, {}, {}, set(), [])
    loads = Copies()
    loads.add(1, np.array([0]), np.array([0]), np.array([7]))
    assert blocks_written(output, [loads]).tolist() == [0, 3, 4, 5, 7, 9]
    assert blocks_written(SchedulerOutput.make_empty(), []).tolist() == []


def test_the_layout_that_is_asked_for() -> None:
    def wish(
        device: str = "cuda", mla: bool = False, hybrid: bool = False, block: int | None = 16
    ) -> str | None:
        config = SimpleNamespace(
            device_config=SimpleNamespace(device_type=device),
            model_config=SimpleNamespace(use_mla=mla, is_hybrid=hybrid),
            cache_config=SimpleNamespace(block_size=block),
        )
        return KVKeepConnector.get_required_kvcache_layout(config)

    assert wish() == wish(block=None) == "BLHNC"
    assert wish("cpu") is wish(mla=True) is wish(hybrid=True) is wish(block=128) is None


def test_each_layers_backend_is_in_the_namespace_of_a_gpu() -> None:
    def module(name: str) -> SimpleNamespace:
        return SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: name))

    one, two = ({"a": module(name)} for name in ("FLASH_ATTN", "FLASHINFER"))
    assert describe_backends(["a"], one, "cuda") != describe_backends(["a"], two, "cuda")
    assert describe_backends(["a"], one, "cpu") == describe_backends(["a"], two, "cpu") == ""
    assert "null" in describe_backends(["a"], {}, "cuda")
