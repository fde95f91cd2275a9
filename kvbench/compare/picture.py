"""The picture: TTFT and ITL by rate, a mark for each run and a bar at each median."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from kvbench.compare.figures import FIGURES, Figure, Range
from kvbench.compare.plan import Plan
from kvbench.compare.records import Case, Run, Summary

__all__ = ["PANELS", "draw"]

PANELS = tuple(one for one in FIGURES if one.title in ("TTFT, p50", "ITL, mean"))
# Okabe and Ito's colours: told apart by those who see fewer of them, and by their marks in grey.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "os^Dv<>P"
_WIDTH = 0.8  # of a rate's place, for its set-ups


def draw(plan: Plan, runs: Iterable[Run], title: str) -> bytes:
    """PNG."""
    whole = [(run.case, run.summary) for run in runs if run.summary and run.counts]
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        canvas = Canvas(figsize=(9.6, 4.2), layout="constrained")
        canvas.suptitle(title, parse_math=False)
        for panel, axes in zip(PANELS, canvas.subplots(1, len(PANELS)), strict=True):
            _panel(axes, plan, whole, panel)
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        if handles:
            legend = canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
            for text in legend.get_texts():
                text.set_parse_math(False)
        out = io.BytesIO()
        canvas.savefig(out, format="png", dpi=144)
    return out.getvalue()


def _panel(axes: Any, plan: Plan, whole: list[tuple[Case, Summary]], panel: Figure) -> None:
    names, least = plan.names(), []
    step = _WIDTH / len(names)
    for number, name in enumerate(names):
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        label: str | None = name.lstrip("_") or name  # a leading underscore would hide it
        for place, rate in enumerate(plan.rates):
            found = [panel.of(summary) for case, summary in whole if case == Case(rate, name)]
            values = [value for value in found if value is not None]
            middle = Range.of(values)
            if middle is None:
                continue
            least.append(middle.low)
            x = place + (number - (len(names) - 1) / 2) * step
            axes.plot([x] * len(values), values, mark, color=colour, alpha=0.6, ms=6, label=label)
            axes.hlines(middle.median, x - step * 0.4, x + step * 0.4, color=colour, lw=2.5)
            label = None  # once in the legend
    if least and min(least) > 0:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    axes.set_xticks(range(len(plan.rates)), [f"{rate:g}" for rate in plan.rates])
    axes.set_xlim(-0.6, len(plan.rates) - 0.4)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("seconds")
    axes.set_title(panel.title, fontsize=10)
    axes.grid(axis="y", which="both", alpha=0.25)
