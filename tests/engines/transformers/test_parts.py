"""The pieces: copies equal the reference's, rows are named only by what is certain, layers grow in place."""

from __future__ import annotations

import importlib.util
import mmap
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.host_device import HostBackend
from kvkeep.engines.transformers import copies, store
from kvkeep.engines.transformers.book import Book, name_rows
from kvkeep.engines.transformers.copies import Bus, StagedTransfer, as_blocks, find_backend, make_copier
from kvkeep.engines.transformers.describe import weights_digest
from kvkeep.engines.transformers.layers import FullLayer
from kvkeep.errors import DeviceError, LayoutError
from kvkeep.transfer.pinning import Pinning
from kvkeep.transfer.reference import ReferenceTransfer
from kvkeep.wire.client import Connection

ROOT = Path(__file__).parents[3]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.sampled_from(["f4", "bf"])
)
def test_staged_copies_equal_the_references(
    heads: int, size: int, tokens: int, count: int, kind: str
) -> None:
    dtype = torch.float32 if kind == "f4" else torch.bfloat16
    rng = np.random.default_rng(heads * 100 + size)
    states = [
        torch.randn(2, heads, 2 + tokens * count + (tokens > 1), size + extra).to(dtype) for extra in (0, 2)
    ]
    views = [(str(i), as_blocks(one[1, :, 2:], tokens)) for i, one in enumerate(states)]
    block = sum(view[0].numel() * view.element_size() for _, view in views)
    blocks = rng.permutation(count)[: rng.integers(1, count + 1)]
    offsets = (rng.permutation(count)[: len(blocks)] * (block + 64)).astype(np.int64)
    arenas = [mmap.mmap(-1, count * (block + 64)) for _ in range(3)]
    kinds = (ReferenceTransfer([views], count, arenas[0]), StagedTransfer([views], count, arenas[1]))
    for one in (*kinds, make_copier(views, arenas[2], 1)):
        assert one.save(0, offsets, blocks) == len(blocks) * block
    assert arenas[0][:] == arenas[1][:] == arenas[2][:]
    before = [one.clone() for one in states]
    for one in states:
        one[1, :, 2 : 2 + tokens * count] = 0
    kinds[1].load(0, offsets, blocks)
    for one, old in zip(states, before, strict=True):
        for number in range(count):
            columns = slice(2 + number * tokens, 2 + (number + 1) * tokens)
            assert one[1, :, columns].equal(old[1, :, columns] * (number in blocks))
        assert one[0].equal(old[0])


def late_device(seed: int, patch: pytest.MonkeyPatch, pinned: bool = True) -> HostBackend:
    """Copies as late as it may. Torch computes here at once, so its stream is one that waits on the spot."""
    backend = HostBackend(random.Random(seed))
    backend.engine.wait_event = lambda event: event.synchronize()
    patch.setattr(Pinning, "start", lambda self, fd: pinned and self._register(0, self._nbytes))
    return backend


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_bus_copies_what_the_reference_does(
    seed: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_STAGE_BYTES", 2 * 1536)
    states = torch.randn(2, 3, 40, 16)
    views = [(str(i), as_blocks(one, 4)) for i, one in enumerate(states)]
    arenas = [memoryview(mmap.mmap(-1, 1 << 16)) for _ in range(2)]
    backend = late_device(seed, monkeypatch, pinned)
    bus = Bus(backend, arenas[0], -1, [1536], torch.device("cpu"))
    assert bus.pinned == pinned
    ours, reference = make_copier(views, arenas[0], 1, bus), ReferenceTransfer([views], 10, arenas[1])
    blocks = np.array([7, 2, 3, 4, 5, 9, 0])
    offsets = 64 + 1536 * np.array([4, 9, 1, 2, 3, 30, 7])
    for one in (ours, reference):
        assert one.save(0, offsets, blocks) == len(blocks) * 1536
    assert not pinned or arenas[0] != arenas[1], "a device that is late is to be late here"
    bus.settle()
    assert arenas[0] == arenas[1]
    before = states.clone()
    states.zero_()
    ours.load(0, offsets, blocks)
    for number in range(10):
        columns = slice(number * 4, number * 4 + 4)
        assert states[:, :, columns].equal(before[:, :, columns] * (number in blocks))
    bus.close()
    assert not backend.registered


def test_with_a_device_nothing_is_committed_or_released_before_its_copies(
    kit: Any, tie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = late_device(5, monkeypatch)
    monkeypatch.setattr(store, "find_backend", lambda devices: backend)
    model, batch = kit.model("Gemma3", seed=9), kit.batch(kit.tokens(1, 150), kit.tokens(2, 120))
    cache, told = tie(model), list[tuple[str, int]]()
    for name in ("commit", "release"):
        real = getattr(Connection, name)

        def note(link: Connection, *arguments: Any, name: str = name, real: Any = real) -> None:
            told.append((name, len(cache._store._mapped.bus._pending)))
            real(link, *arguments)

        monkeypatch.setattr(Connection, name, note)
    plain = kit.answer(model, batch)
    kit.assert_alike(kit.answer(model, batch, cache.begin(batch.ids, batch.mask)), plain)
    told.clear()
    past = cache.begin(batch.ids, batch.mask)
    assert past.loaded > 100
    kit.answer(model, batch, past, count=1)
    assert "release" not in dict(told), "the forward is launched while the load is under way"
    past = cache.begin(batch.ids, batch.mask)
    kit.assert_alike(kit.answer(model, batch, past), plain)
    cache.save()
    assert set(told) == {("commit", 0), ("release", 0)}
    assert cache.stats.errors == 0
    cache.close()
    assert not backend.registered


def test_a_copy_that_the_device_refuses_is_a_miss(
    kit: Any, tie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = late_device(6, monkeypatch)
    monkeypatch.setattr(store, "find_backend", lambda devices: backend)
    model, batch = kit.model("Llama", seed=10), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    plain = kit.answer(model, batch, cache.begin(batch.ids, batch.mask))
    cache.save()

    def refuse(*_: Any, **__: Any) -> None:
        raise DeviceError("no more")

    monkeypatch.setattr(backend, "copy", refuse)
    past = cache.begin(batch.ids, batch.mask)
    assert past.loaded == 0
    kit.assert_alike(kit.answer(model, batch, past), plain)
    assert cache.stats.errors == 1
    assert not backend.registered, "the session has ended"


def test_a_device_that_breaks_lets_go_of_arena_and_keeper(
    kit: Any, tie: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = late_device(7, monkeypatch)
    monkeypatch.setattr(store, "find_backend", lambda devices: backend)
    model, batch = kit.model("Llama", seed=11), kit.batch(kit.tokens(1, 100))
    cache = tie(model)
    plain = kit.answer(model, batch, cache.begin(batch.ids, batch.mask))
    link = cache._store._keeper.connection

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cache._store._mapped.bus._transfer._saves, "record_event", broken)
    cache.save()
    assert "an unexpected error" in caplog.text
    assert "a copy on the device failed" in caplog.text
    assert link.closed
    assert not backend.registered
    kit.assert_alike(kit.answer(model, batch, cache.begin(batch.ids, batch.mask)), plain)


def test_a_plain_forward_is_launched_without_a_look_at_the_device(
    kit: Any, tie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is busy with the load; where it must look, it does."""
    model, ids = kit.model("Llama", seed=12), kit.batch(kit.tokens(1, 100)).ids
    cache = tie(model)
    with torch.no_grad():
        whole = model(ids).logits
        for _ in range(2):
            with cache.begin(ids) as past:
                model(ids[:, past.loaded :], past_key_values=past)
        past = cache.begin(ids)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "equal", lambda *_: pytest.fail("a look at the device"))
            logits = model(ids[:, past.loaded :], past_key_values=past).logits
        torch.testing.assert_close(logits, whole[:, past.loaded :], rtol=1e-4, atol=1e-4)
        past = cache.begin(ids)
        ids[:, -1] += 1
        with pytest.raises(ValueError, match="does not go on"):
            model(ids[:, past.loaded :], past_key_values=past)


def test_which_devices_have_a_bus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(devices: frozenset[torch.device]) -> None:
        raise LayoutError(f"{next(iter(devices))} without Triton")

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(copies, "make_backend", lambda devices: f"backend of {next(iter(devices))}")
    assert find_backend({first}) == "backend of cuda:0"
    assert find_backend({first, second}) is find_backend({torch.device("cpu")}) is None
    assert not caplog.text
    monkeypatch.setattr(copies, "make_backend", refuse)
    assert find_backend({first}) is None
    assert "cuda:0 without Triton; torch copies it" in caplog.text


def test_rows_are_named_by_what_is_certain() -> None:
    ids = torch.arange(10, 22).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    first, second = name_rows(ids, mask)
    assert (first.start, first.tokens.tolist()) == (2, [12, 13, 14, 15])
    assert (second.start, second.tokens.tolist()) == (0, [16, 17, 18])
    first, _ = name_rows(ids, mask, torch.tensor([[0, 0, 0, 1, 3, 4], [0, 1, 2, 3, 4, 5]]))
    assert first.tokens.tolist() == [12, 13]
    (empty,) = name_rows(ids[:1], mask[:1] & False)
    assert (empty.start, len(empty.tokens)) == (6, 0)


def test_a_book_follows_rows_and_columns() -> None:
    ids, positions = torch.arange(10, 22).view(2, 6), torch.arange(6)[None]
    whole = torch.ones(2, 6, dtype=torch.bool)
    book = Book(ids[:, :2], whole[:, :2], positions[:, :2].expand(2, 2))
    book.note(ids[:, 2:], whole, positions[:, 2:])
    book.crop(1)
    book.select(torch.tensor([1, 1, 0]))
    assert [row.tokens.tolist() for row in book.rows()] == [[*range(16, 21)]] * 2 + [[*range(10, 15)]]
    changed = torch.ones(3, 6, dtype=torch.bool)
    changed[0, 1] = False
    book.note(torch.tensor([[1], [2], [3]]), changed, torch.tensor([[5]]))
    assert [len(row.tokens) for row in book.rows()] == [0, 6, 6]


def test_a_layer_grows_in_place_and_not_over_what_was_cut_off() -> None:
    layer, states = FullLayer(), torch.randn(1, 2, 9, 4)
    layer.update(states[:, :, :3], -states[:, :, :3])
    kept = layer.keys
    layer.update(states[:, :, 3:5], -states[:, :, 3:5])
    assert layer.keys.data_ptr() == kept.data_ptr()
    layer.crop(-2)
    layer.update(states[:, :, 3:], -states[:, :, 3:])
    assert layer.keys.equal(states)
    assert layer.values.equal(-states)
    layer.reorder_cache(torch.tensor([0]))
    layer.update(states, -states)
    assert layer.keys.equal(torch.cat([states, states], 2))
    for _ in range(300):  # past the room
        layer.update(states[:, :, :1], -states[:, :, :1])
    assert layer.keys[:, :, :18].equal(torch.cat([states, states], 2))


def test_weights_that_are_not_in_memory(kit: Any) -> None:
    model = kit.model("Llama")
    digest = weights_digest(model)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert weights_digest(model) != digest
    with pytest.raises(LayoutError, match="model_id"):
        weights_digest(model.to("meta"))


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("gpu_ttft", ROOT / "benchmarks" / "gpu" / "ttft.py")
    assert spec is not None
    assert spec.loader is not None
    ttft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ttft)
    rows = ttft.measure(
        ttft.TINY, [500, 800], device="cpu", dtype=torch.float32, memory="32MiB", disk=tmp_path, rounds=1
    )
    *memory, short, long = rows
    assert [(row["tokens"], row["loaded_bytes"]) for row in memory] == [(500, 786432), (800, 1572864)]
    assert [row["tokens"] for row in (short, long)] == [500, 800]
    assert all(row["load_ratio"] > 0 for row in memory)
    assert short["disk_ratio"] > 0 < long["disk_ratio"]
    assert all(row["same_token"] and row["pinned"] == 1 for row in (*memory, short, long))


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, short_dir: Path) -> None:
    if not (ROOT / "demo" / "models" / "smollm2").is_dir():
        pytest.skip("smollm2 is not prepared: run `make models`")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    text = (ROOT / "docs" / "transformers.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/transformers.md", "exec"), names)
    assert names["past"].loaded > 100
    assert names["cache"].stats.errors == 0
