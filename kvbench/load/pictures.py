"""Pictures of runs as PNG; needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.load.record import Record

__all__ = ["draw_cdf", "draw_rates"]

_PERCENTILES = ("p50", "p90", "p99")


def draw_cdf(path: Path, records: Sequence[Record], title: str) -> None:
    """The share of requests (of gaps, for ITL) that took at most so long. Raises ImportError."""
    good = [one for one in records if one.ok]
    panels = {
        "time to first token (s)": [one.ttft_s for one in good],
        "inter-token latency (s)": [gap for one in good for gap in one.itl_s],
        "end-to-end latency (s)": [one.latency_s for one in good],
    }
    figure, axes = _panels(len(panels), title)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        axis.ecdf(np.array(values or [0.0]))
        axis.set(xlabel=label, ylabel="share of requests" if axis is axes[0] else "", ylim=(0, 1))
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=120)


def draw_rates(path: Path, summaries: Sequence[dict[str, Any]], title: str) -> None:
    """TTFT and ITL against the rate, of runs in the order of their rates. Raises ImportError."""
    figure, axes = _panels(2, title)
    for axis, name, label in zip(axes, ("ttft_s", "itl_s"), ("TTFT (s)", "ITL (s)"), strict=True):
        for percentile in _PERCENTILES:
            points = [(one["rate"], one[name][percentile]) for one in summaries]
            points = [point for point in points if point[1] is not None]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=percentile)
        axis.set(xlabel="requests per second", ylabel=label, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)


def _panels(count: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
