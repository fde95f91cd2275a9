"""Pictures of runs as PNG; needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.load.record import Record

__all__ = ["draw_cdf", "draw_rates", "panes"]

_PERCENTILES = ("p50", "p90", "p99")


def draw_cdf(path: Path, records: Sequence[Record], title: str) -> Any:
    """The share of requests (of gaps, for ITL) that took at most so long; the figure. Raises ImportError."""
    good = [one for one in records if one.ok]
    panels = {
        "time to first token (s)": [one.ttft_s for one in good],
        "inter-token latency (s)": [gap for one in good for gap in one.itl_s],
        "end-to-end latency (s)": [one.latency_s for one in good],
    }
    figure, axes = panes(len(panels), title)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        if values:
            axis.ecdf(np.array(values))
        else:
            axis.text(0.5, 0.5, "nothing was answered", transform=axis.transAxes, ha="center")
        axis.set(xlabel=label, ylabel="share of requests" if axis is axes[0] else "", ylim=(0, 1))
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=120)
    return figure


def draw_rates(path: Path, summaries: Sequence[dict[str, Any]], title: str) -> None:
    """TTFT and ITL against the rate, of runs in the order of their rates. Raises ImportError."""
    figure, axes = panes(2, title)
    for axis, name, label in zip(axes, ("ttft_s", "itl_s"), ("TTFT (s)", "ITL (s)"), strict=True):
        for percentile in _PERCENTILES:
            points = [(one["rate"], one[name][percentile]) for one in summaries]
            points = [point for point in points if point[1] is not None]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=percentile)
        axis.set(xlabel="requests per second", ylabel=label, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)


def panes(count: int, title: str) -> tuple[Any, Any]:
    """A figure with axes side by side. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
