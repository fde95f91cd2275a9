"""Which cores an engine gets: its share, where several workers test side by side (pytest-xdist)."""

from __future__ import annotations

import os

__all__ = ["engine_cores"]


def engine_cores() -> str:
    """As VLLM_CPU_OMP_THREADS_BIND wants them: threads of two engines on one core would wait in turns."""
    cores = sorted(os.sched_getaffinity(0))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = cores[number * len(cores) // workers : (number + 1) * len(cores) // workers]
    return ",".join(map(str, mine or cores))
