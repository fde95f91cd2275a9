"""Copies by the threads that an engine on a CPU computes with.

Those are a team of OpenMP's, each bound to a core, and after a forward they spin for a while, looking for the
next region. A pool of ours would not do: its threads inherit the one core that the engine's thread is bound
to, and on any other they share it with one that spins. So a copy is a region of that team, begun by
GOMP_parallel: what compilers call for a parallel region, in GNU's runtime and in Intel's and LLVM's.

Always of the whole team, of which some may have nothing to do: for a smaller region the runtime ends threads,
and those that it starts for the engine's next one would all be bound to the engine thread's core.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np

from kvkeep.transfer.base import Offsets

__all__ = ["Copy", "compiled", "share"]

log = logging.getLogger("kvkeep.transfer")

Copy: TypeAlias = Callable[[Offsets, Offsets, Offsets], None]
"""`copy(target addresses, source addresses, sizes)`: int64, contiguous."""
# Bytes. Those that have gone to sleep wake up in 50 µs, or in milliseconds where another process has their
# core by then: 12 MB behind a forward took 2.9 ms by two, 1.7 by one; 91 MB before one 3.1 and 5.8.
_SHARED_FROM = 32 << 20
_RUNTIMES = ("libgomp", "libiomp5", "libomp")


def share(copy: Copy, target: Offsets, source: Offsets, sizes: Offsets, threads: int) -> None:
    """Have pieces copied by so many of the team's threads, 0: all; by the calling one alone where there is no
    team, bytes are few, or it is not the process's main thread, whose team it is. `copy`: `copy_pieces()`."""
    many = threads != 1 and len(sizes) > 1 and int(sizes.sum()) >= _SHARED_FROM
    if many and threading.current_thread() is threading.main_thread() and (run := _tried(copy)) is not None:
        run(target, source, sizes, threads)
    else:
        copy(target, source, sizes)


@cache
def compiled(copy: Copy) -> Callable[[Offsets, Offsets, Offsets, int], None] | None:
    """What runs `copy` on the calling thread's team; None without OpenMP. Compiles once (0.3 s)."""
    if (runtime := _runtime()) is None:
        return None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        entry = ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"kvkeep_{name}", entry)
    number = numba.types.ExternalFunction("kvkeep_omp_get_thread_num", numba.types.int32())
    count = numba.types.ExternalFunction("kvkeep_omp_get_num_threads", numba.types.int32())

    @numba.cfunc("void(CPointer(int64))")  # type: ignore[untyped-decorator]
    def region(job: Any) -> None:
        pieces, most = numba.carray(job, (2,))
        rows = numba.carray(job, (2 + 3 * pieces,))[2:]
        mine, parts = np.int64(number()), min(np.int64(count()), most)
        first, last = pieces * min(mine, parts) // parts, pieces * min(mine + 1, parts) // parts
        source, sizes = rows[pieces:], rows[2 * pieces :]
        copy(rows[first:last], source[first:last], sizes[first:last])

    begin = runtime.GOMP_parallel
    begin.argtypes, begin.restype = [*[ctypes.c_void_p] * 2, *[ctypes.c_uint] * 2], None

    def run(target: Offsets, source: Offsets, sizes: Offsets, threads: int) -> None:
        head = np.array([len(sizes), threads or len(sizes)], np.int64)
        job = np.concatenate((head, target, source, sizes))
        begin(region.address, job.ctypes.data, 0, 0)

    return run


@cache
def _tried(copy: Copy) -> Callable[[Offsets, Offsets, Offsets, int], None] | None:
    """The same, tried before it is relied on: on the main thread, since any other has a team made for it."""
    run = compiled(copy)
    return run if run is not None and _works(run) else None


def _works(run: Callable[[Offsets, Offsets, Offsets, int], None]) -> bool:
    source = np.random.default_rng(0).integers(0, 256, (64, 4096), np.uint8)
    target = np.zeros_like(source)
    rows = np.arange(64, dtype=np.int64) * 4096
    run(target.ctypes.data + rows[::-1], source.ctypes.data + rows, np.full(64, 4096, np.int64), 0)
    if np.array_equal(target[::-1], source):
        return True
    log.warning("kvkeep: this process's OpenMP does not run copies; one thread copies")
    return False


def _runtime() -> ctypes.CDLL | None:
    """The OpenMP that this process computes with: one loaded before all others, or the one of torch."""
    whole = ctypes.CDLL(None)
    if hasattr(whole, "GOMP_parallel"):
        return whole
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if Path(line).name.startswith(_RUNTIMES)}
    for path in sorted(paths, key=lambda path: "torch" not in path):
        try:
            found = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:  # replaced on disk since it was loaded
            continue
        if hasattr(found, "GOMP_parallel"):
            return found
    return None
