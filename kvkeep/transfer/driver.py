"""The backend of NVIDIA GPUs: torch's streams, the driver's batched copies, our kernel.

The driver is called by ctypes: it takes numpy's arrays as they are, tens of thousands of pieces in one
call that does not hold the GIL, where cuda-python wants lists of Python integers. No GPU has seen this
file yet; `make gpu-check` is its test.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import subprocess
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from triton.errors import TritonError

from kvkeep.errors import DeviceError
from kvkeep.transfer.base import Offsets
from kvkeep.transfer.kernels import copy_words
from kvkeep.transfer.streams import Backend, Copies, Event, Stream

__all__ = ["CudaBackend"]

log = logging.getLogger("kvkeep.transfer")

_SOURCE_IN_ORDER, _SOURCE_ANY_TIME = 1, 3  # CUmemcpySrcAccessOrder
_HOST_POINTERS_WORK = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_TABLE_ROWS, _TABLES = 1 << 14, 16  # pieces of one launch; launches that need no new pinned memory
_PIECE, _PIECES = 512, 4  # of what is copied to try it


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of CUDA 12.8 and later; the hints (type, id) are for memory that is not ours."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class _Stream:
    """A stream of torch's whose events tell the time, which torch's own do not, and let who waits sleep."""

    def __init__(self, torchs: torch.cuda.Stream) -> None:
        self.torchs = torchs

    def record_event(self, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
        event = event or torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self.torchs)
        return event

    def wait_event(self, event: torch.cuda.Event) -> None:
        self.torchs.wait_event(event)


class CudaBackend(Backend):
    """One GPU of this process, by the context that torch uses. Raises OSError without a driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = ctypes.CDLL("libcuda.so.1")
        number, handle, value = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        ordinal: int | None = device.index
        if ordinal is None:
            ordinal = torch.cuda.current_device()
        torch.cuda.current_stream(device).synchronize()  # torch makes its context, at start only
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(ordinal))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), number)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(_HOST_POINTERS_WORK), number)
        self._context, self._kernel = handle, bool(value.value)
        # By this name every driver from 12.8 on has it as 12.8 did, with an index of the failed copy.
        self.batches = hasattr(self._driver, "cuMemcpyBatchAsync")
        if not self.batches:
            log.warning("this driver is older than CUDA 12.8: copies are submitted one by one")
        began = self.current().record_event()
        self._tables = deque[tuple[torch.Tensor, Event]]((_new_table(), began) for _ in range(_TABLES))
        self._try_out()

    def _try_out(self) -> None:
        """Copy in each way between the device and a page that is registered as the arena will be. So
        the kernel is compiled now, not in the first load; and what does not work here is not relied on."""
        page = mmap.mmap(-1, mmap.PAGESIZE)
        host = torch.frombuffer(page, dtype=torch.uint8)[: 2 * _PIECE * _PIECES].view(_PIECES, -1)[:, :_PIECE]
        device = torch.zeros(_PIECES, 2, _PIECE, dtype=torch.uint8, device=self._device)[:, 0]
        if self.register(host.data_ptr(), mmap.PAGESIZE):
            self.batches = self._kernel = False  # and `Pinning` says that nothing is pinned
            return
        try:
            if self.batches and (why := self._fails(host, device, kernel=False)):
                log.warning(
                    "cuMemcpyBatchAsync does not work here (%s): copies are submitted one by one", why
                )
                self.batches = False
            if self._kernel and (why := self._fails(host, device, kernel=True)):
                log.warning(
                    "our kernel does not work here (%s): small pieces are copied by copy engines", why
                )
                self._kernel = False
        finally:
            self.unregister(host.data_ptr())

    def _fails(self, host: torch.Tensor, device: torch.Tensor, *, kernel: bool) -> str:
        """Copy pieces to the device and, without the kernel, back: what went wrong, or nothing."""
        stream, expected = self.stream(), (torch.arange(host.numel()) % 251).to(torch.uint8).view(host.shape)
        rows = np.arange(_PIECES, dtype=np.int64)
        paged, slots = (one.data_ptr() + rows * one.stride(0) for one in (device, host))
        copies = Copies(paged, slots, np.full(_PIECES, _PIECE, np.int64))
        host.copy_(expected)
        device.zero_()
        stream.wait_event(self.current().record_event())
        try:
            if kernel:
                self.gather(stream, copies)
            else:
                self.copy(stream, copies, saving=False, pinned=True)
                stream.record_event().synchronize()
                host.zero_()
                self.copy(stream, copies, saving=True, pinned=True)
            stream.record_event().synchronize()
        except (DeviceError, TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            return f"{type(error).__name__}: {error}"  # such as Triton's, which finds no C compiler
        return "" if host.equal(expected) and device.cpu().equal(expected) else "other bytes came"

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._driver, name)(*arguments)
        if error:
            raise DeviceError(f"{name} failed: CUDA error {error}")

    def attend(self) -> None:
        with self._bound():
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(_RELAXED)))

    @contextlib.contextmanager
    def _bound(self) -> Iterator[None]:
        """The driver's own calls need the context on their thread; torch binds it where it has to only."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def current(self) -> Stream:
        return _Stream(torch.cuda.current_stream(self._device))

    def stream(self, urgent: bool = False) -> Stream:
        return _Stream(torch.cuda.Stream(self._device, priority=-1 if urgent else 0))

    def copy(self, stream: Stream, copies: Copies, *, saving: bool, pinned: bool) -> None:
        target, source = (copies.slots, copies.paged) if saving else (copies.paged, copies.slots)
        handle = _torchs(stream).cuda_stream
        with self._bound():
            if pinned and self.batches:
                # What a save reads, the engine's stream has just written; what a load reads, nobody writes.
                order = _SOURCE_IN_ORDER if saving else _SOURCE_ANY_TIME
                self._submit(target, source, copies.sizes, order, handle)
                return
            for row in zip(target.tolist(), source.tolist(), copies.sizes.tolist(), strict=True):
                self._call("cuMemcpyAsync", *map(ctypes.c_size_t, row), ctypes.c_void_p(handle))

    def _submit(self, target: Offsets, source: Offsets, sizes: Offsets, order: int, handle: int) -> None:
        columns = [np.ascontiguousarray(column) for column in (target, source, sizes)]
        attributes, first, failed = _Attributes(order), ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._call(
            "cuMemcpyBatchAsync",
            *(ctypes.c_void_p(column.ctypes.data) for column in columns),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            ctypes.byref(failed),
            ctypes.c_void_p(handle),
        )

    def gather(self, stream: Stream, copies: Copies) -> None:
        if not self._kernel:  # host memory has another address on the device: not on any usual Linux
            self.copy(stream, copies, saving=False, pinned=True)
            return
        for first in range(0, len(copies.sizes), _TABLE_ROWS):
            rows = np.stack([column[first : first + _TABLE_ROWS] for column in copies])
            table = self._table()
            told = table[: rows.size].view(rows.shape)  # [targets, sources, sizes]
            told.copy_(torch.from_numpy(rows))
            with torch.cuda.stream(_torchs(stream)):
                copy_words(told.to(self._device, non_blocking=True))
            self._tables.append((table, stream.record_event()))

    def _table(self) -> torch.Tensor:
        """Pinned memory for what a kernel is told, which no launch reads any more: to pin more takes long.
        Never waits for the device."""
        with contextlib.suppress(IndexError):  # threads take from it at once
            table, read = self._tables.popleft()
            if read.query():
                return table
            self._tables.appendleft((table, read))
        return _new_table()

    def register(self, address: int, nbytes: int) -> int:
        with self._bound():
            error: int = self._driver.cuMemHostRegister_v2(
                ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0)
            )
        return error

    def unregister(self, address: int) -> None:
        with self._bound():
            self._call("cuMemHostUnregister", ctypes.c_void_p(address))


def _new_table() -> torch.Tensor:
    return torch.empty(3 * _TABLE_ROWS, dtype=torch.int64, pin_memory=True)


def _torchs(stream: Stream) -> torch.cuda.Stream:
    assert isinstance(stream, _Stream)
    return stream.torchs
