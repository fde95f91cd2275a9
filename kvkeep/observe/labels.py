"""Which namespaces have figures of their own in metrics: there is no end of them, and labels are bounded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from kvkeep.keeper.keeper import Keeper
from kvkeep.keeper.namespaces import Counters

__all__ = ["MEMORY", "MOST_LABELS", "Labels", "Row"]

MEMORY, MOST_LABELS = "memory", 32
_OTHERS, _MODEL_CHARACTERS = "others", 60
_REST = 600.0  # seconds without a lookup, after which what holds nothing makes room for another
Figures: TypeAlias = "Counter[str | int]"
"""By name; hits by the place that they came from, which is MEMORY or a tier's number."""


class Row(NamedTuple):
    """What metrics tell of one namespace, or of all others."""

    name: str
    figures: Figures
    used_bytes: int


class Labels:
    """Gives labels, to the newest namespaces first; asked once a scrape. No counter ever falls: what was
    counted without a label stays with the others', and with a label that is given up it is told no more."""

    def __init__(self, keeper: Keeper, clock: Callable[[], float] = time.monotonic) -> None:
        self._keeper, self._clock = keeper, clock
        self._before: dict[int, Figures] = {}
        """By number of a namespace that has a label: what it had counted without."""
        self._asked: dict[int, tuple[int, float]] = {}
        """Its lookups, and when they were seen to have grown."""
        self._given_up: Figures = Counter()
        self._told = 0

    def rows(self) -> list[Row]:
        """One for each namespace that has a label, and one for all others where there are any."""
        spaces, used = self._keeper.namespaces, self._keeper.usage()[1]
        self._give(used, self._clock())
        rows = []
        for number in self._before:
            name = f"{spaces[number].fingerprint.hex()[:8]} {spaces[number].label[:_MODEL_CHARACTERS]}"
            rows.append(Row(name, self._own(number), int(used[number])))
        if len(rows) == len(spaces):
            return rows
        rest = _figures(self._keeper.counters)
        for told in (self._given_up, *(row.figures for row in rows)):
            rest.subtract(told)
        return [*rows, Row(_OTHERS, rest, int(used.sum()) - sum(row.used_bytes for row in rows))]

    def _give(self, used: np.ndarray, now: float) -> None:
        spaces, told = self._keeper.namespaces, self._told
        for number, (lookups, _) in self._asked.items():
            if lookups != spaces[number].counters.lookups:
                self._asked[number] = (spaces[number].counters.lookups, now)
        wanting = {*np.flatnonzero(used).tolist(), *range(told, len(spaces))} - self._before.keys()
        for number in sorted(wanting, reverse=True):
            if len(self._before) == MOST_LABELS:
                idle = [n for n, (_, at) in self._asked.items() if not used[n] and now - at >= _REST]
                if not idle:
                    break
                self._given_up.update(self._own(idle[0]))
                del self._before[idle[0]], self._asked[idle[0]]
            self._before[number] = _figures(spaces[number].counters) if number < told else Counter()
            self._asked[number] = (spaces[number].counters.lookups, now)
        self._told = len(spaces)

    def _own(self, number: int) -> Figures:
        figures = _figures(self._keeper.namespaces[number].counters)
        if self._before[number]:
            figures.subtract(self._before[number])
        return figures


def _figures(counters: Counters) -> Figures:
    figures: Figures = Counter(vars(counters))
    del figures["tier_chunks"]
    figures["missed_chunks"] = counters.asked_chunks - counters.hit_chunks
    figures[MEMORY] = counters.hit_chunks - counters.tier_chunks.total()
    figures.update(counters.tier_chunks)
    return figures
