"""Loads that were promised: each request's for itself, or all of a step's together."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvkeep.engines.vllm.metadata import Copies
from kvkeep.engines.vllm.promises import Promises
from kvkeep.errors import LayoutError

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds


class Asked(SimpleNamespace):
    """A request with a claim, as `Tracked` has it."""

    def __init__(self, name: str) -> None:
        super().__init__(request=SimpleNamespace(request_id=name), first=0, found=2, lease=7, behind=0)

    def loaded(self) -> None:
        self.behind = self.first + self.found

    def forget_claim(self) -> None:
        self.lease = 0


def guard(action: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return action()
    except LayoutError:
        return otherwise


def add_load(copies: Copies, tracked: Asked, table: Any, local: int, external: int) -> None:
    if tracked.request.request_id == "bad":
        raise LayoutError("a table that is too short")
    copies.claims.append(tracked.lease)
    copies.tokens += external


GEOMETRY: Any = SimpleNamespace(add_load=add_load)


def promised(apart: bool, *names: str) -> tuple[Promises, list[Any]]:
    promises, asked = Promises(), [Asked(name) for name in names]
    promises.apart = apart
    for number, one in enumerate(asked):
        promises.make(one, ([number], [10 + number]), 0, 64)  # type: ignore[arg-type]
    return promises, asked


def test_one_that_cannot_be_planned_fails_alone_where_requests_wait() -> None:
    promises, asked = promised(True, "a", "bad", "b")
    met: list[tuple[Any, int, int]] = []
    assert all(promises.holds(one) for one in asked)
    planned = promises.plan(GEOMETRY, guard, lambda *what: met.append(what))
    assert planned.loads is None
    assert planned.unplanned == []
    assert {name: copies and copies.tokens for name, copies in planned.apart.items()} == {
        "a": 64,
        "bad": None,
        "b": 64,
    }
    assert [copies.claims for copies in planned.all()] == [[7], [7]]
    assert [(one.lease, one.behind) for one in asked] == [(0, 2), (7, 0), (0, 2)]
    assert met == [(asked[0], 0, 2), (asked[2], 0, 2)]
    assert not any(promises.holds(one) for one in asked)
    promises.arrived(["a", "unknown"])
    assert promises.waits
    promises.arrived(["bad", "b"])
    assert not promises.waits
    assert promises.plan(GEOMETRY, guard, print) == (None, {}, [])


def test_a_step_that_cannot_be_planned_is_lost_whole() -> None:
    promises, _ = promised(False, "a", "bad")
    planned = promises.plan(GEOMETRY, guard, lambda *_: None)
    assert planned == (None, {}, [0, 10, 1, 11])
    assert planned.all() == []
    promises, _ = promised(False, "a", "b")
    planned = promises.plan(GEOMETRY, guard, lambda *_: None)
    assert planned.loads is not None
    assert (planned.loads.tokens, planned.apart, planned.unplanned) == (128, {}, [])
    assert not promises.waits


@pytest.mark.parametrize("apart", [True, False])
def test_what_publishing_does_costs_no_load(apart: bool) -> None:
    """The events are an option; a load that could not be planned may end an engine."""

    def met(*_: Any) -> None:
        raise LayoutError("events that cannot be kept")

    promises, asked = promised(apart, "a", "b")
    planned = promises.plan(GEOMETRY, guard, met)
    assert planned.unplanned == []
    assert sum(copies.tokens for copies in planned.all()) == 128
    assert [(one.lease, one.behind) for one in asked] == [(0, 2), (0, 2)]
