"""A search in the background: whatever it finds is somebody's, or is let go of."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvkeep.engines import search
from kvkeep.engines.search import Search
from kvkeep.errors import KeeperUnavailable, RequestRefused


class Hasty(Search[str]):
    """Somebody stops it, and sees that there is nothing, in the moment before there is something."""

    @property
    def _found(self) -> str | None:  # type: ignore[override]
        return self.__dict__.get("found")

    @_found.setter
    def _found(self, found: str | None) -> None:
        if found is not None:
            self.stop()
        self.__dict__["found"] = found


@pytest.mark.parametrize("kind", [Search, Hasty])
def test_what_is_found_is_taken_once_or_let_go_of(kind: type[Search[str]], wait_until) -> None:
    left = list[str]()
    one = kind(lambda: "found", left.append, at_once=True)
    wait_until(lambda: left or one._found)
    if kind is Search:
        assert one.take() == "found"
    one.stop()
    assert left == (["found"] if kind is Hasty else [])
    assert one.take() is None


def test_it_tries_again_until_it_is_refused(monkeypatch: pytest.MonkeyPatch, wait_until) -> None:
    monkeypatch.setattr(search, "_RETRY_FIRST", 0.001)
    answers: list[Any] = [
        KeeperUnavailable("away"),
        KeeperUnavailable("still"),
        RequestRefused("another version"),
    ]
    said = list[str]()
    monkeypatch.setattr(search.log, "warning", lambda text, *given: said.append(text % given))
    before = set(threading.enumerate())

    def attempt() -> str:
        raise answers.pop(0)

    one = Search(attempt, print)
    wait_until(lambda: not set(threading.enumerate()) - before)
    assert not answers
    assert ["another version" in text for text in said] == [True]
    assert one.take() is None
