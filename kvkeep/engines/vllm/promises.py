"""Loads that the engine was promised: from when it counts on them until the workers have them, or, where
requests wait for theirs, until those are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from kvkeep.engines.vllm.geometry import BlockTable, Geometry
from kvkeep.engines.vllm.metadata import Copies
from kvkeep.engines.vllm.requests import Tracked

__all__ = ["Guard", "Planned", "Promises"]

_T = TypeVar("_T")


class Guard(Protocol):
    """Runs an action; on a fault, logs it and returns `otherwise`."""

    def __call__(self, action: Callable[[], _T], otherwise: _T) -> _T: ...


class _Promise(NamedTuple):
    """`external` tokens behind the first `local`."""

    tracked: Tracked
    blocks: BlockTable
    local: int
    external: int


class Planned(NamedTuple):
    """One step's loads: see `StepMeta`."""

    loads: Copies | None
    apart: dict[str, Copies | None]
    unplanned: list[int]

    def all(self) -> list[Copies]:
        """Those that could be planned."""
        return [copies for copies in (self.loads, *self.apart.values()) if copies is not None]


class Promises:
    """All of one engine. The scheduler's thread."""

    def __init__(self) -> None:
        self.apart = False
        """Whether requests wait for their loads, while the engine computes for others."""
        self._made: list[_Promise] = []
        self._under_way: set[str] = set()

    @property
    def waits(self) -> bool:
        """Whether any request waits for its load."""
        return bool(self._under_way)

    def make(self, tracked: Tracked, blocks: BlockTable, local: int, external: int) -> None:
        """The engine counts on these tokens."""
        self._made.append(_Promise(tracked, blocks, local, external))

    def holds(self, tracked: Tracked) -> bool:
        """Whether what was found for a request is promised, and not yet with the workers."""
        return any(promise.tracked is tracked for promise in self._made)

    def arrived(self, names: Iterable[str]) -> None:
        """The loads of these requests have ended on all ranks."""
        self._under_way.difference_update(names)

    def plan(
        self, geometry: Geometry | None, guard: Guard, met: Callable[[Tracked, int, int], None]
    ) -> Planned:
        """What the workers are to copy for all promises since the last call; `met` hears of their chunks.

        One that cannot be planned goes to the workers as failed: the engine has counted its tokens.
        """
        promised, self._made = self._made, []
        if not promised or geometry is None:
            return Planned(None, {}, [])

        ends = list[tuple[Tracked, int]]()

        def copies(some: list[_Promise]) -> Copies:
            made = Copies()
            for tracked, table, local, external in some:
                geometry.add_load(made, tracked, table, local, external)
                ends.append((tracked, tracked.first + tracked.found))
                tracked.loaded()
                tracked.forget_claim()
            return made

        if self.apart:
            apart = dict[str, Copies | None]()
            for one in promised:
                apart[one.tracked.request.request_id] = guard(partial(copies, [one]), None)
            self._under_way |= apart.keys()
            planned = Planned(None, apart, [])
        else:
            loads = guard(lambda: copies(promised), None)
            lost = [] if loads is not None else promised
            planned = Planned(loads, {}, [block for one in lost for row in one.blocks for block in row])
        for tracked, end in ends:  # apart from planning: a fault here is no load's
            guard(partial(met, tracked, 0, end), None)
        return planned
