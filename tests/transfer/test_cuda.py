"""The GPU's copy engine on a device that is none: bytes, order, fences, registration."""

from __future__ import annotations

import logging
import mmap
import os
import random
import threading
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from kvbench.host_device import HostBackend
from kvkeep import pages
from kvkeep.errors import DeviceError, LayoutError
from kvkeep.transfer import choose, cuda, pinning
from kvkeep.transfer.base import Move
from kvkeep.transfer.cuda import CudaTransfer
from kvkeep.transfer.reference import ReferenceTransfer
from kvkeep.transfer.streams import Copies, Pending, merge, split
from tests.transfer.test_transfer import DTYPES, FORMS, paged
from tests.transfer.test_transfer import random as random_tensor
from tests.transfer.words import copy_words_reference

STEP = 1 << 16  # small registrations: copies cross their borders


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The kernels for Triton's interpreter, which decides when they are defined."""
    import importlib.util

    from kvkeep.transfer import kernels as compiled

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec = importlib.util.spec_from_file_location("interpreted", compiled.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def small_stages() -> Iterator[None]:
    """Loads of a few KiB arrive layer by layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_STAGE_BYTES", 64)
        yield


def engine(layers, blocks: int, memory: mmap.mmap, backend: HostBackend, pinned: bool = True) -> CudaTransfer:
    """A transfer with all of its arena registered, or none."""
    transfer = CudaTransfer(layers, blocks, memory, backend)
    transfer.pinning = pinning.Pinning(backend, memory, STEP)
    if pinned:
        for offset in range(0, len(memory), STEP):
            assert not transfer.pinning._register(offset, min(STEP, len(memory) - offset))
    return transfer


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


GEOMETRY = {
    "form": st.sampled_from(FORMS),
    "blocks": st.integers(3, 12),
    "heads": st.integers(1, 4),
    "tokens": st.sampled_from([1, 16, 32]),
    "dim": st.sampled_from([8, 24, 64]),
    "layers": st.integers(1, 3),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=80, deadline=None)
@given(**GEOMETRY, pinned=st.booleans(), layered=st.booleans(), late=st.booleans())
def test_equal_to_the_reference(
    form, blocks, heads, tokens, dim, layers, dtype, seed, pinned, layered, late
) -> None:
    torch.manual_seed(seed)
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    tensors = [
        (f"layer {n}", tensor)
        for n, tensor in enumerate(paged(form, blocks, heads, tokens, dim, layers, dtype))
    ]
    arenas = [mmap.mmap(-1, 4 << 20) for _ in range(2)]
    fast = engine([tensors], blocks, arenas[0], HostBackend(chance if late else None), pinned)
    slow = ReferenceTransfer([tensors], blocks, arenas[1])
    size = fast.layouts[0].block_bytes
    chosen = rng.permutation(blocks)[: rng.integers(1, blocks + 1)].astype(np.int64)
    if rng.random() < 0.5:
        chosen.sort()  # neighbours: larger copies
    first = rng.integers(0, (4 << 20) // size - len(chosen) + 1)
    offsets = (first + np.arange(len(chosen))) * size
    assert fast.save(0, offsets, chosen) == slow.save(0, offsets, chosen) == size * len(chosen)
    assert arenas[0][:] == arenas[1][:]
    before = [raw(tensor).clone() for _, tensor in tensors]
    for _, tensor in tensors:
        tensor.copy_(torch.zeros(tensor.shape, dtype=torch.uint8).to(torch.float32).to(dtype))
    names = [name for name, _ in tensors]
    if layered:
        pending = fast.start_load([Move(0, offsets, chosen)], names)
        assert pending.wait() >= 0
    else:
        assert fast.load(0, offsets, chosen) == size * len(chosen)
    others = torch.tensor([block for block in range(blocks) if block not in set(chosen.tolist())], dtype=int)
    for expected, (_, tensor) in zip(before, tensors, strict=True):
        axis = 1 if form == "apart" else 0
        index = torch.from_numpy(chosen)
        assert torch.equal(expected.index_select(axis, index), raw(tensor).index_select(axis, index))
        assert not raw(tensor).index_select(axis, others).any(), "a block that was not loaded has changed"
    fast.close()
    assert not fast.backend.registered


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 60),
    words=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_equals_its_reference(
    kernels: ModuleType, count: int, words: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = 8 * rng.choice(np.array(words, np.int64), count)
    room = int(sizes.max()) + 8
    source = torch.from_numpy(rng.integers(0, 256, count * room, np.uint8))
    targets = [torch.zeros_like(source) for _ in range(2)]
    places = rng.permutation(count) * room
    reads = source.data_ptr() + np.arange(count) * room
    table = torch.from_numpy(np.stack([targets[0].data_ptr() + places, reads, sizes]))
    kernels.copy_words(table)
    copy_words_reference(targets[1].data_ptr() + places, reads, sizes)
    assert torch.equal(*targets)
    assert int(targets[0].count_nonzero()) > 0


def test_many_small_pieces_take_the_kernel(kernels: ModuleType) -> None:
    """And of each kind the right ones do: small, aligned, enough of them, pinned."""

    def gathering(copies: Copies) -> None:
        kernels.copy_words(torch.from_numpy(np.stack(copies)))

    for dim, blocks, pinned, expected in (
        (8, 32, True, 64),
        (8, 7, True, 0),
        (8, 32, False, 0),
        (2048, 32, True, 0),
    ):
        backend = HostBackend(gathering=gathering)
        tensors = [(f"{n}", random_tensor(torch.float32, blocks, 4, dim)) for n in range(2)]
        transfer = engine([tensors], blocks, mmap.mmap(-1, 4 << 20), backend, pinned)
        block_ids, size = np.arange(blocks), transfer.layouts[0].block_bytes
        transfer.save(0, block_ids * size, block_ids)
        expected_bytes = [raw(tensor).clone() for _, tensor in tensors]
        for _, tensor in tensors:
            tensor.zero_()
        transfer.load(0, block_ids * size, block_ids)
        assert all(torch.equal(a, raw(b)) for a, (_, b) in zip(expected_bytes, tensors, strict=True))
        # A piece that crosses a registration's border counts twice.
        assert expected <= backend.gathered <= expected * 1.1
        transfer.close()


class Engine:
    """What an engine does to its blocks, each with its fence, on a device that is as late as it may be.

    All in the arena and in a forward's reads is compared with what was true when it was submitted.
    """

    LAYERS, BLOCKS, SLOTS = 4, 12, 40

    def __init__(self, seed: int, form: str, pinned: bool = True) -> None:
        self.chance = random.Random(seed)
        self.backend = HostBackend(random.Random(seed + 1))
        if form == "block outermost":
            whole = torch.randn(self.BLOCKS, self.LAYERS, 64)
            self.layers = [(f"{n}", whole[:, n]) for n in range(self.LAYERS)]
        else:
            self.layers = [(f"{n}", torch.randn(self.BLOCKS, 64)) for n in range(self.LAYERS)]
        # Two groups whose layers alias one memory: a block belongs to one of them at a time.
        self.groups = [self.layers, [(f"alias {name}", tensor) for name, tensor in self.layers]]
        self.arena = mmap.mmap(-1, self.SLOTS * self.LAYERS * 256)
        self.transfer = engine(self.groups, self.BLOCKS, self.arena, self.backend, pinned)
        self.truth = torch.stack([tensor for _, tensor in self.layers]).clone()  # [layer, block, 64]
        self.kept: dict[int, torch.Tensor] = {}
        self.saving: list[tuple[Pending, dict[int, torch.Tensor]]] = []
        self.leased: list[tuple[Pending, list[int]]] = []
        self.apart: list[tuple[Pending, dict[int, torch.Tensor]]] = []
        self.checks: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []
        self.value = 1.0

    def compute(self, layer: int, block: int) -> None:
        """Write a block of one layer, on the engine's stream."""
        self.value += 1
        new, target = torch.full((64,), self.value), self.layers[layer][1]
        self.truth[layer, block] = new
        self.backend.engine.submit([lambda: target[block].copy_(new)])

    def step(self) -> None:
        self.settle(wait=False)
        free_blocks = sorted(set(range(self.BLOCKS)) - set(self.waiting()))
        blocks = self.chance.sample(free_blocks, min(self.chance.randint(1, 6), len(free_blocks)))
        cut = self.chance.randint(0, len(blocks))
        fresh, loads = blocks[:cut], blocks[cut:]
        held = sorted(self.kept)
        slots = self.chance.sample(held, min(len(loads), len(held)))
        loads = loads[: len(slots)]
        self.transfer.fence(np.array(fresh + loads, np.int64))
        begun = self.backend.current().record_event()
        apart = loads if self.chance.random() < 0.3 else []
        if loads and not apart:
            names = [f"{n}" for n in range(self.LAYERS)] if self.chance.random() < 0.7 else []
            group = self.chance.randint(0, 1)
            names = [f"alias {name}" for name in names] if group else names
            pending = self.transfer.start_load(
                [self.move(group, slots, loads)], names[self.chance.randint(0, 2) :]
            )
            self.leased.append((pending, slots))
            for slot, block in zip(slots, loads, strict=True):
                self.truth[:, block] = self.kept[slot]
        loading = [*self.waiting(), *apart]
        for layer in range(self.LAYERS - (self.chance.random() < 0.5)):  # at times it leaves the last one out
            for name in (f"{layer}", f"alias {layer}"):
                self.transfer.arrive(name)
            for block in fresh:
                self.compute(layer, block)
            self.read(layer, loading)
        self.transfer.end_forward()
        if apart:
            pending = self.transfer.start_apart([self.move(self.chance.randint(0, 1), slots, apart)], begun)
            self.leased.append((pending, slots))
            coming = {block: self.kept[slot] for slot, block in zip(slots, apart, strict=True)}
            self.apart.append((pending, coming))
            loads = []
        self.leased = [(pending, slots) for pending, slots in self.leased if not pending.done()]
        taken = [slot for _, slots in [*self.saving, *self.leased] for slot in slots]
        free = sorted(set(range(self.SLOTS)) - set(self.kept) - set(taken))
        still = sorted(set(range(self.BLOCKS)) - set(self.waiting()))
        whence = loads if loads and self.chance.random() < 0.5 else still
        chosen = self.chance.sample(whence, min(self.chance.randint(0, 5), len(free), len(whence)))
        if chosen:
            slots = self.chance.sample(free, len(chosen))
            pending = self.transfer.start_save([self.move(self.chance.randint(0, 1), slots, chosen)])
            written = {slot: self.truth[:, block].clone() for slot, block in zip(slots, chosen, strict=True)}
            self.saving.append((pending, written))

    def move(self, group: int, slots: list[int], blocks: list[int]) -> Move:
        size = self.transfer.layouts[group].block_bytes
        return Move(group, np.array(slots, np.int64) * size, np.array(blocks, np.int64))

    def waiting(self) -> list[int]:
        """Blocks that requests wait for."""
        return [block for _, coming in self.apart for block in coming]

    def read(self, layer: int, loading: list[int]) -> None:
        """What attention does: read all blocks of a layer that are not `loading`, on the engine's stream."""
        seen, target = torch.zeros(self.BLOCKS, 64), self.layers[layer][1]
        self.backend.engine.submit([lambda: seen.copy_(target)])
        self.checks.append((seen, self.truth[layer].clone(), loading))

    def settle(self, wait: bool) -> None:
        """What the keeper hears: a slot may be loaded once its save is done; and what the engine hears: a
        request need not wait any longer."""
        for loading in self.apart[:]:
            if loading[0].done():
                self.apart.remove(loading)
                for block, value in loading[1].items():
                    self.truth[:, block] = value
        for entry in self.saving[:]:
            pending, written = entry
            if wait:
                pending.wait()
            if pending.done():
                self.kept |= written
                self.saving.remove(entry)
                if len(self.kept) > self.SLOTS // 2:
                    del self.kept[min(self.kept)]

    def finish(self) -> int:
        """Run to the end; returns how much was wrong."""
        self.settle(wait=True)
        self.backend.finish()
        slots = torch.frombuffer(self.arena, dtype=torch.float32).view(self.SLOTS, self.LAYERS, 64)
        wrong = sum(not torch.equal(slots[slot], value) for slot, value in self.kept.items())
        for seen, expected, loading in self.checks:
            still = [block for block in range(self.BLOCKS) if block not in loading]
            wrong += not torch.equal(seen[still], expected[still])
        self.transfer.close()
        return wrong


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    form=st.sampled_from(["apart", "block outermost"]),
    pinned=st.sampled_from([True] * 4 + [False]),
)
def test_no_order_of_execution_gives_wrong_bytes(seed: int, form: str, pinned: bool) -> None:
    world = Engine(seed, form, pinned)
    for _ in range(12):
        world.step()
    assert world.finish() == 0


@pytest.mark.parametrize("missing", ["fence", "arrive", "end_forward", "wait for the engine"])
def test_a_missing_fence_shows(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail: without any one of the fences some order of execution is wrong."""
    wrong = 0
    for seed in range(40):
        world = Engine(seed, "apart")
        if missing == "wait for the engine":
            for stream in (world.transfer._saves, world.transfer._loads):
                monkeypatch.setattr(stream, "wait_event", lambda event: None)
        else:
            monkeypatch.setattr(world.transfer, missing, lambda *_: None)
        for _ in range(12):
            world.step()
        wrong += world.finish() > 0
    assert wrong


@pytest.mark.parametrize("seed", range(8))
def test_a_layer_in_anothers_tensor_comes_with_it(seed: int) -> None:
    backend = HostBackend(random.Random(seed))
    first, last = torch.randn(4, 1024), torch.randn(4, 1024)
    tensors = [("first", first), ("last", last), ("sharer", first)]
    transfer = engine([tensors], 4, mmap.mmap(-1, 1 << 16), backend)
    one = np.array([2])
    assert transfer.save(0, one * 0, one) == transfer.layouts[0].block_bytes == 2 * 4096
    expected = first[2].clone()
    first[2].zero_()
    transfer.start_load([Move(0, one * 0, one)], ["last", "sharer", "first"])
    transfer.arrive("sharer")
    seen = torch.zeros_like(expected)
    backend.engine.submit([lambda: seen.copy_(first[2])])
    backend.finish()
    assert torch.equal(seen, expected)
    transfer.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_stage_that_is_refused_leaves_nothing_under_way(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are computed then: what had been begun must not come after that."""
    backend = HostBackend(random.Random(seed))
    tensors = [(f"{n}", torch.randn(4, 1024)) for n in range(3)]
    transfer = engine([tensors], 4, mmap.mmap(-1, 1 << 16), backend)
    one, copy, calls = np.array([2]), backend.copy, list[int]()
    transfer.save(0, one * 0, one)

    def refuse(*args, **kwargs) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise DeviceError("no more")
        copy(*args, **kwargs)

    monkeypatch.setattr(backend, "copy", refuse)
    with pytest.raises(DeviceError):
        transfer.start_load([Move(0, one * 0, one)], ["0", "1", "2"])
    transfer.end_forward()
    backend.engine.submit([lambda: tensors[0][1][2].fill_(7)])
    backend.finish()
    assert (tensors[0][1][2] == 7).all()
    transfer.close()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_refused_load_apart_has_ended(pinned: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks go to others: what had been begun must not come after that."""
    backend = HostBackend(random.Random(seed))
    tensors = [(f"{n}", torch.randn(4, 1024)) for n in range(3)]
    transfer = engine([tensors], 4, mmap.mmap(-1, 1 << 16), backend, pinned)
    one, copy = np.array([2]), backend.copy
    transfer.save(0, one * 0, one)

    def refuse(*args, **kwargs) -> None:
        copy(*args, **kwargs)
        raise DeviceError("no more")

    monkeypatch.setattr(backend, "copy", refuse)
    with pytest.raises(DeviceError):
        transfer.start_apart([Move(0, one * 0, one)], backend.engine.record_event()).wait()
    tensors[0][1][2].fill_(7)
    backend.finish()
    assert (tensors[0][1][2] == 7).all()
    transfer.close()


def test_merged_and_split() -> None:
    copies = Copies(np.array([100, 110, 130, 140]), np.array([7, 17, 27, 37]), np.array([10, 10, 10, 25]))
    merged = merge(copies)
    assert [column.tolist() for column in merged] == [[100, 130], [7, 27], [20, 35]]
    cut = split(merged, base=5, step=15)
    assert cut.slots.tolist() == [7, 20, 27, 35, 50]
    assert cut.sizes.tolist() == [13, 7, 8, 15, 12]
    assert cut.paged.tolist() == [100, 113, 130, 138, 153]
    assert split(cut, 5, 15) is cut


def test_places_out_of_bounds_are_refused_before_a_byte_moves() -> None:
    transfer = engine([[("0", random_tensor(torch.float32, 4, 16))]], 4, mmap.mmap(-1, STEP), HostBackend())
    good, bad = Move(0, np.array([0]), np.array([1])), Move(0, np.array([STEP]), np.array([1]))
    for start in (transfer.start_save, transfer.start_load):
        with pytest.raises(LayoutError):
            start([good, bad])
    assert not any(transfer.arena)
    transfer.close()


def test_what_is_not_registered_is_not_taken_for_pinned() -> None:
    """The backend refuses a pinned copy outside its registrations, so this would be an error."""
    tensor = random_tensor(torch.float32, 8, STEP // 4)
    backend, memory = HostBackend(), mmap.mmap(-1, 8 * STEP)
    transfer = engine([[("0", tensor)]], 8, memory, backend, pinned=False)
    assert not transfer.pinning._register(0, STEP)
    every = np.arange(8)
    transfer.save(0, every * STEP, every)
    assert memory[:] == raw(tensor).numpy().tobytes()
    with pytest.raises(DeviceError):
        backend.copy(backend.engine, transfer._plan([Move(0, every * STEP, every)]), saving=True, pinned=True)
    transfer.close()


@pytest.fixture
def shared() -> tuple[mmap.mmap, int]:
    fd = os.memfd_create("test")
    os.posix_fallocate(fd, 0, 5 * STEP)
    return mmap.mmap(fd, 5 * STEP), fd


@pytest.mark.parametrize("limit", [float("inf"), 2 * STEP, 0])
def test_registration_stops_where_it_is_refused(
    limit: float, shared: tuple[mmap.mmap, int], caplog: pytest.LogCaptureFixture
) -> None:
    memory, fd = shared
    backend = HostBackend(limit=limit)
    pins = pinning.Pinning(backend, memory, STEP)
    with caplog.at_level(logging.WARNING):
        pins.start(fd).join(20)
    assert pins.registered == min(limit, 5 * STEP)
    base = pages.address(memory)
    assert sorted(backend.registered) == [base + n * STEP for n in range(pins.registered // STEP)]
    assert [record.args[2] for record in caplog.records] == (
        ["the driver refuses more of it (CUDA error 2; see `kvkeep doctor`)"] if limit < 5 * STEP else []
    )
    assert backend.attended == {"kvkeep-pin"}
    pins.close()
    assert not backend.registered
    os.close(fd)


@pytest.mark.parametrize("error", [900, 901])
def test_while_a_graph_is_captured_registration_waits(
    error: int, shared: tuple[mmap.mmap, int], caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    """CUDA refuses it then, from whatever thread, for as long as the capture lasts."""
    memory, fd = shared
    backend, answers = HostBackend(), [0, error, error, 0, error]
    register = backend.register
    monkeypatch.setattr(pinning, "_AGAIN", 0.0)
    monkeypatch.setattr(backend, "register", lambda *place: (answers and answers.pop(0)) or register(*place))
    pins = pinning.Pinning(backend, memory, STEP)
    pins.start(fd).join(20)
    assert pins.registered == 5 * STEP
    assert not answers
    assert not caplog.records
    pins.close()

    monkeypatch.setattr(backend, "register", lambda *place: error)
    pins = pinning.Pinning(backend, memory, STEP)
    thread = pins.start(fd)
    pins.close()  # in the midst of it
    thread.join(20)
    assert not thread.is_alive()
    assert pins.registered == 0
    os.close(fd)


def test_one_that_is_closed_touches_its_memory_no_more(shared: tuple[mmap.mmap, int], monkeypatch) -> None:
    memory, fd = shared
    backend, entered = HostBackend(), list[bool]()
    pins = pinning.Pinning(backend, memory, STEP)
    populate = pages.populate

    def closing(place: int, nbytes: int, give_way, stop) -> bool:
        pins.close()
        entered.append(populate(place, nbytes, give_way, stop))
        return entered[-1]

    monkeypatch.setattr(pages, "populate", closing)
    pins.start(fd).join(20)
    assert entered == [False]
    assert not backend.registered
    os.close(fd)


def test_an_arena_that_is_not_allocated_ahead_stays_so(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(pages, "_PATIENCE", 0.1)
    fd = os.memfd_create("test")
    os.ftruncate(fd, STEP)
    pins = pinning.Pinning(HostBackend(), mmap.mmap(fd, STEP), STEP)
    pins.start(fd).join(20)
    assert pins.registered == os.fstat(fd).st_blocks == 0
    assert "--prefault no" in caplog.text
    os.close(fd)


def test_a_device_that_is_not_served_is_named() -> None:
    class Elsewhere:
        device = torch.device("xpu", 1)

    with pytest.raises(LayoutError, match="KV on xpu:1 cannot be moved"):
        choose.make_transfer([[("0", Elsewhere())]], 1, mmap.mmap(-1, 4096))


def test_nothing_is_let_go_of_while_a_copy_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session ends on another thread, between the look at what is pinned and the submission."""
    backend = HostBackend()
    transfer = engine([[("0", torch.randn(4, 1024))]], 4, mmap.mmap(-1, STEP), backend)
    one, looked, closing = np.array([1]), transfer._pinned, list[threading.Thread]()

    def look(moves) -> bool:
        found = looked(moves)
        closing.append(threading.Thread(target=transfer.close))
        closing[0].start()
        closing[0].join(0.2)  # without the lock it would be through
        return found

    monkeypatch.setattr(transfer, "_pinned", look)
    assert transfer.start_save([Move(0, one * 0, one)]).done()
    closing[0].join(20)
    assert not backend.registered
    event = backend.engine.record_event()
    for start in (transfer.start_save, transfer.start_load, lambda moves: transfer.start_apart(moves, event)):
        with pytest.raises(DeviceError, match="ended"):
            start([Move(0, one * 0, one)])


def test_a_device_that_is_broken_lets_go_of_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HostBackend()
    transfer = engine([[("0", torch.randn(4, 1024))]], 4, mmap.mmap(-1, STEP), backend)

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(transfer._saves, "record_event", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        transfer.close()
    assert not backend.registered


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("batches", "blocks", "beside"), [(True, 7, False), (True, 8, True), (False, 5, True), (False, 4, False)]
)
def test_many_copies_are_submitted_beside_the_engine(
    batches: bool, blocks: int, beside: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_ONE_BY_ONE", 5)
    monkeypatch.setattr(cuda, "_AT_ONCE", 8)
    backend, threads = HostBackend(), list[int]()
    backend.batches, copy = batches, backend.copy
    transfer = engine([[("0", torch.randn(16, 1024))]], 16, mmap.mmap(-1, STEP), backend)

    def note(*args, **kwargs) -> None:
        threads.append(threading.get_ident())
        copy(*args, **kwargs)

    monkeypatch.setattr(backend, "copy", note)
    chosen = np.arange(blocks) * 2  # no two of them are one copy
    moves, whole = [Move(0, np.arange(blocks) * 4096, chosen)], transfer.layers[0][0]
    slots = transfer.arena[: blocks * 4096].view(torch.float32).view(blocks, -1)
    if apart:
        slots.copy_(torch.randn(slots.shape))
        transfer.start_apart(moves, backend.engine.record_event()).wait()
    else:
        transfer.start_save(moves).wait()
    assert [thread != threading.get_ident() for thread in threads] == [beside]
    assert slots.equal(whole[chosen])
    assert len(backend.attended) == beside
    transfer.close()
