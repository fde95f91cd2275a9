"""From runs to the table: medians and spreads, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from statistics import median
from typing import NamedTuple

from kvbench.compare.plan import Plan
from kvbench.compare.records import Case, Run, Summary

__all__ = ["ANSWERED", "FIGURES", "KNEE", "Figure", "Range", "Reading", "Row", "digits", "rows"]


class Figure(NamedTuple):
    """One number of a run."""

    title: str
    unit: str
    """s, or none where the title has it."""
    of: Callable[[Summary], float | None]
    lower_is_better: bool = True

    def text(self, values: Range) -> str:
        """Median and spread with one unit, to three digits."""
        unit, factor = (self.unit, 1) if self.unit != "s" or values.median >= 1 else ("ms", 1000)
        return f"{Range(*(value * factor for value in values)).text()} {unit}".rstrip()


class Range(NamedTuple):
    """Over rounds: the median, and the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Range | None:
        """None where there are no values."""
        values = list(values)
        return cls(median(values), min(values), max(values)) if values else None

    def text(self) -> str:
        """To three digits."""
        return f"{digits(self.median)} ({digits(self.low)}…{digits(self.high)})"


def digits(value: float) -> str:
    """Three digits, and never as 1e+03."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


KNEE = 0.95
"""A set-up keeps up with a rate where it answers this share of what is offered, or more."""


def _time(title: str, name: str, which: str) -> Figure:
    return Figure(f"{title}, {which}", "s", lambda one: getattr(getattr(one, name), which))


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if whole and part is not None else None


ANSWERED = Figure(
    "answered of offered", "", lambda one: _share(one.requests_per_s, one.rate), lower_is_better=False
)
FIGURES = (
    *(_time("TTFT", "ttft_s", which) for which in ("mean", "p50", "p95", "p99")),
    *(_time("ITL", "itl_s", which) for which in ("mean", "p95", "p99")),
    _time("TPOT", "tpot_s", "mean"),
    *(_time("latency", "latency_s", which) for which in ("p50", "p95")),
    Figure("output tokens/s", "", lambda one: one.output_tokens_per_s, lower_is_better=False),
    ANSWERED,
    Figure("good requests/s", "", lambda one: (one.goodput or {}).get("requests_per_s"), False),
    Figure("cached of prompt tokens", "", lambda one: _share(one.cached_tokens, one.prompt_tokens), False),
)
_VERDICT = 6
"""Rounds from which all ratios on one side are a verdict: chance puts six there in 3 of 100 comparisons,
three in 1 of 4."""


class Reading(Enum):
    """What a ratio's spread lets one say."""

    FIRST = "compared with"
    BETTER = "better"
    WORSE = "worse"
    EACH_BETTER = "better in each round"
    EACH_WORSE = "worse in each round"
    SAME = "covers 1"
    ONCE = "one round"
    NONE = "nothing to compare"


class Row(NamedTuple):
    """One figure of one set-up at one rate."""

    rate: float
    figure: Figure
    setup: str
    values: Range | None
    rounds: int
    """Rounds that have the figure."""
    ratio: Range | None
    """To the first set-up in the same round, over the rounds that have both."""
    reading: Reading


def rows(plan: Plan, runs: Iterable[Run]) -> list[Row]:
    """The table, by rate, figure and set-up. Of runs that were whole, and whose load was sent in time."""
    whole = {(run.case, run.round): run.summary for run in runs if run.summary and run.counts}
    first, found = plan.names()[0], []
    for rate in plan.rates:
        for figure in FIGURES:
            by_setup = {name: _by_round(whole, Case(rate, name), figure) for name in plan.names()}
            base = by_setup[first]
            for name, values in by_setup.items():
                ratios = [value / base[turn] for turn, value in values.items() if base.get(turn)]
                ratio = Range.of(ratios)
                reading = Reading.FIRST if name == first else _reading(figure, ratios)
                found.append(Row(rate, figure, name, Range.of(values.values()), len(values), ratio, reading))
    return found


def _by_round(whole: dict[tuple[Case, int], Summary], case: Case, figure: Figure) -> dict[int, float]:
    found = {turn: figure.of(summary) for (its, turn), summary in whole.items() if its == case}
    return {turn: value for turn, value in found.items() if value is not None}


def _reading(figure: Figure, ratios: list[float]) -> Reading:
    if len(ratios) < 2:
        return Reading.ONCE if ratios else Reading.NONE
    if min(ratios) <= 1.0 <= max(ratios):
        return Reading.SAME
    better = (max(ratios) < 1.0) == figure.lower_is_better
    if len(ratios) < _VERDICT:
        return Reading.EACH_BETTER if better else Reading.EACH_WORSE
    return Reading.BETTER if better else Reading.WORSE
