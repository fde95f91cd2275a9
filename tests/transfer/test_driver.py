"""The NVIDIA backend's calls, held against a library that writes them down: no GPU is needed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import mmap
import threading
from typing import Any

import numpy as np
import pytest
import torch

from kvkeep.errors import DeviceError, LayoutError
from kvkeep.transfer import choose, driver
from kvkeep.transfer.streams import Copies
from tests.transfer.words import copy_words_reference

COPIES = Copies(*(np.array(column, np.int64) for column in ([100, 200], [7000, 9000], [16, 32])))
"""Two runs: device addresses, arena addresses, bytes."""


class Library:
    """libcuda with these functions, over host memory: it copies what is copied to try it out. Each call is
    kept; those in `failing` return an error."""

    def __init__(self, batched: bool = True, **failing: int) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.modes: list[tuple[str, int]] = []
        self.failing, self.trying = failing, True
        if batched:
            self.cuMemcpyBatchAsync = self._function("cuMemcpyBatchAsync")

    def __getattr__(self, name: str) -> Any:
        if name == "cuMemcpyBatchAsync":  # hasattr() asks: an old driver
            raise AttributeError(name)
        return self._function(name)

    def _function(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, tuple(map(self._plain, arguments))))
            if name in self.failing:
                return self.failing[name]
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = 1
            if name == "cuThreadExchangeStreamCaptureMode":
                self.modes.append((threading.current_thread().name, arguments[0]._obj.value))
            if name == "cuMemcpyBatchAsync" and self.trying:
                for row in zip(*(at(one.value, arguments[3].value) for one in arguments[:3]), strict=True):
                    ctypes.memmove(*row)
            return 0

        return call

    @staticmethod
    def _plain(argument: Any) -> Any:
        if isinstance(argument, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint)):
            return argument.value
        return argument._obj

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


class TorchStream:
    cuda_stream = 77
    idle = True

    def __init__(self, _device: Any = None, priority: int = 0) -> None:
        self.waited: list[Any] = []
        self.priority = priority

    def synchronize(self) -> None: ...

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


class TorchEvent:
    """As torch's: without `enable_timing` it tells no time."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.blocking, self.on = enable_timing, blocking, None

    def record(self, stream: Any) -> None:
        self.on = stream

    def query(self) -> bool:
        return self.on.idle

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: TorchEvent) -> float:
        if not (self.timed and end.timed):
            raise RuntimeError("both events should be created with argument 'enable_timing=True'")
        return 2.0


GATHERED: list[list[list[int]]] = []
"""What the kernel was launched for by the last backend that was made."""


def gather(table: torch.Tensor) -> None:
    GATHERED.append(table.tolist())
    if len(GATHERED) == 1:  # to try it out
        copy_words_reference(*table.numpy())


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    parts = {"current_stream": TorchStream, "Stream": TorchStream, "Event": TorchEvent}
    for name, part in {**parts, "stream": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(driver, "_new_table", lambda: torch.empty(3 * driver._TABLE_ROWS, dtype=torch.int64))
    monkeypatch.setattr(driver, "copy_words", gather)

    def make(library: Library) -> driver.CudaBackend:
        GATHERED.clear()
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
        made = driver.CudaBackend(torch.device("cpu", 0))
        library.trying = False
        library.calls.clear()
        return made

    return make


def at(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


def test_events_tell_the_time(backend: Any) -> None:
    made = backend(Library())
    for stream in (made.stream(), made.current()):
        first, last = stream.record_event(), stream.record_event()
        assert first.elapsed_time(last) == 2.0
        assert first.blocking, "who waits must not spin on a core"
        assert isinstance(first.on, TorchStream)
        stream.wait_event(last)
        assert first.on.waited == [last]


def test_the_attributes_are_as_the_driver_has_them() -> None:
    assert ctypes.sizeof(driver._Attributes) == 24


@pytest.mark.parametrize("saving", [True, False])
def test_one_call_for_a_batch(backend: Any, saving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    made = backend(library)
    seen: list[list[int]] = []
    whole = library.cuMemcpyBatchAsync

    def read(*arguments: Any) -> int:  # the columns live as long as the call
        seen.extend(at(argument.value, 2) for argument in arguments[:3])
        return int(whole(*arguments))

    monkeypatch.setattr(library, "cuMemcpyBatchAsync", read)
    made.copy(made.stream(), COPIES, saving=saving, pinned=True)
    target, source = ([7000, 9000], [100, 200]) if saving else ([100, 200], [7000, 9000])
    assert seen == [target, source, [16, 32]]
    ((*_, count, attributes, first, attribute_count, failed, stream),) = library.named("cuMemcpyBatchAsync")
    assert (count, first.value, attribute_count, failed.value, stream) == (2, 0, 1, 0, 77)
    assert attributes.order == (1 if saving else 3)
    names = [name for name, _ in library.calls]
    assert names[-3:] == ["cuCtxPushCurrent_v2", "cuMemcpyBatchAsync", "cuCtxPopCurrent_v2"]


def test_an_older_driver_gets_them_one_by_one_and_says_so(
    backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library(batched=False)
    with caplog.at_level(logging.WARNING):
        made = backend(library)
    made.copy(made.stream(), COPIES, saving=False, pinned=True)
    made.copy(made.stream(), COPIES, saving=True, pinned=True)
    assert library.named("cuMemcpyAsync") == [
        *((100, 7000, 16, 77), (200, 9000, 32, 77)),
        *((7000, 100, 16, 77), (9000, 200, 32, 77)),
    ]
    assert caplog.text.count("older than CUDA 12.8") == 1


def test_pageable_memory_is_never_batched(backend: Any) -> None:
    library = Library()
    made = backend(library)
    made.copy(made.stream(), COPIES, saving=False, pinned=False)
    assert len(library.named("cuMemcpyAsync")) == 2


def test_an_error_of_the_driver_is_told(backend: Any) -> None:
    library = Library()
    made = backend(library)
    library.failing["cuMemcpyBatchAsync"] = 1
    with pytest.raises(DeviceError, match="cuMemcpyBatchAsync failed: CUDA error 1"):
        made.copy(made.stream(), COPIES, saving=True, pinned=True)
    assert library.calls[-1][0] == "cuCtxPopCurrent_v2"


def test_memory_that_cannot_be_pinned_is_told_and_what_is_pinned_is_let_go(backend: Any) -> None:
    library = Library()
    made = backend(library)
    assert not made.register(4096, 8192)
    assert library.named("cuMemHostRegister_v2") == [(4096, 8192, 0)]
    made.unregister(4096)
    assert library.named("cuMemHostUnregister") == [(4096,)]
    library.failing["cuMemHostRegister_v2"] = 2
    assert made.register(4096, 8192) == 2


def test_what_it_relies_on_was_tried_with_registered_memory(backend: Any, caplog: Any) -> None:
    """The kernel is compiled so, before the first load."""
    made = backend(Library())
    [[targets, sources, sizes]] = GATHERED
    assert sizes == [512] * 4
    assert [place - sources[0] for place in sources] == [place - targets[0] for place in targets]
    assert made.batches
    assert made._kernel
    assert not caplog.records


@pytest.mark.parametrize(
    ("failing", "why"),
    [
        ({"cuMemcpyBatchAsync": 801}, "CUDA error 801"),
        ({}, "other bytes"),
        ({"cuMemHostRegister_v2": 2}, ""),
    ],
)
def test_batches_that_fail_when_tried_are_not_used(
    failing: dict[str, int], why: str, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library(**failing)
    library.trying = bool(failing)  # else it copies nothing
    made = backend(library)
    assert not made.batches
    assert len(caplog.records) == bool(why)  # `Pinning` tells of the other
    assert why in caplog.text
    made.copy(made.stream(), COPIES, saving=True, pinned=True)
    assert len(library.named("cuMemcpyAsync")) == 2
    assert not library.named("cuMemcpyBatchAsync")
    assert made._kernel == ("cuMemHostRegister_v2" not in failing)


@pytest.mark.parametrize("fails", ["to compile", "silently"])
def test_a_kernel_that_fails_when_tried_is_not_used(
    fails: str, backend: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(table: torch.Tensor) -> None:
        if fails == "to compile":
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "copy_words", fail)
    library = Library()
    made = backend(library)
    assert not made._kernel
    assert made.batches
    assert ("C compiler" if fails == "to compile" else "other bytes") in caplog.text
    assert len(caplog.records) == 1
    made.gather(made.stream(), COPIES)
    assert len(library.named("cuMemcpyBatchAsync")) == 1


def test_what_a_kernel_is_told_lies_in_memory_that_no_launch_reads(backend: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(driver, "_TABLES", 2)
    monkeypatch.setattr(driver, "_TABLE_ROWS", 4)
    made, tables, told = backend(Library()), list[int](), list[Any]()
    first, take = {table.data_ptr() for table, _ in made._tables}, made._table

    def taken() -> torch.Tensor:
        table = take()
        tables.append(table.data_ptr())
        return table

    monkeypatch.setattr(made, "_table", taken)
    monkeypatch.setattr(driver, "copy_words", lambda table: told.append(table.clone()))
    stream = made.stream()
    stream.torchs.idle = False  # the device is behind
    columns = np.arange(30, dtype=np.int64).reshape(3, 10)
    made.gather(stream, Copies(*columns))
    assert [table.shape[1] for table in told] == [4, 4, 2]
    assert torch.cat(told, 1).numpy().tolist() == columns.tolist()
    assert first == set(tables[:2])
    assert tables[2] not in first, "the device still reads both"
    stream.torchs.idle = True
    made.gather(stream, Copies(*columns))
    assert set(tables[3:]) == set(tables[:3]), "no memory is pinned anew"


def test_a_thread_of_ours_disturbs_no_graph_that_is_captured(backend: Any) -> None:
    library = Library()
    made = backend(library)
    assert not library.modes, "the thread that makes it is the engine's"
    thread = threading.Thread(target=made.attend, name="ours")
    thread.start()
    thread.join()
    assert library.modes == [("ours", 2)]  # CU_STREAM_CAPTURE_MODE_RELAXED
    assert [name for name, _ in library.calls][::2] == ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]


def test_only_a_stream_that_is_urgent_goes_before_the_engines(backend: Any) -> None:
    made = backend(Library())
    assert made.stream(urgent=True).torchs.priority == -1
    assert made.stream().torchs.priority == 0


class OnGpu:
    device = torch.device("cuda", 0)


@pytest.mark.parametrize("missing", ["CUDA", "Triton", "driver"])
def test_what_is_missing_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find, library = importlib.util.find_spec, "libcuda.so.1: cannot open"
    named = {"CUDA": "serves CPUs, and one NVIDIA GPU", "Triton": "pip install triton", "driver": library}
    monkeypatch.setattr(torch.version, "cuda", None if missing == "CUDA" else "12.8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing == "Triton" else find(name))

    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", load)
    with pytest.raises(LayoutError, match=named[missing]):
        choose.make_transfer([[("0", OnGpu())]], 1, mmap.mmap(-1, 4096))


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(OSError, match="libcuda"):
        driver.CudaBackend(torch.device("cuda", 0))
