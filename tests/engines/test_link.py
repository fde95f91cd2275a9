"""An engine's tie to a keeper: a name that changes while it is away, and want that passes."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest

from kvkeep.config import EngineConfig
from kvkeep.engines import link
from kvkeep.engines import search as search_module
from kvkeep.engines.link import Identity, Link, Opened
from kvkeep.errors import KeeperUnavailable

OLD, NEW = b"o" * 32, b"n" * 32


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, wait_until):
    """Make a tie to this socket, which looks for a keeper at once, and often; ended with the test."""
    monkeypatch.setattr(search_module, "_RETRY_FIRST", 0.001)
    made: list[Link] = []

    def begin(socket: str) -> Link:
        identity = Identity(OLD, "m", [(4096, None)], 1, 1, 16)
        made.append(Link(EngineConfig(socket=socket), "engine", identity))
        made[-1].reopen(1)
        return made[-1]

    yield begin
    for one in made:
        one.stop()


def await_keeper(tie: Link, wait_until) -> Opened:
    found: list[Opened] = []

    def there() -> bool:
        opened = tie.fresh()
        found.extend([opened] if opened else [])
        return bool(found)

    wait_until(there)
    return found[0]


def names(keeper: Any) -> set[str]:
    return {space["fingerprint"] for space in keeper.figures()["namespaces"]}


def test_a_keeper_that_comes_back_is_told_the_new_name(keeper_process, search, wait_until) -> None:
    path = str(keeper_process.directory() / "keeper.sock")
    tie = search(path)
    tie.rename(NEW)
    keeper = keeper_process(socket=path)
    opened = await_keeper(tie, wait_until)
    assert (opened.fingerprint, opened.epoch) == (NEW, 1)
    assert names(keeper) == {NEW.hex()}
    opened.connection.close()


def test_what_was_found_under_the_old_name_is_renamed(keeper_process, search, wait_until) -> None:
    keeper = keeper_process()
    tie = search(keeper.socket)
    wait_until(lambda: tie._search._found is not None)
    tie.rename(NEW)
    old = await_keeper(tie, wait_until)
    new = tie.renew(old)
    assert (old.fingerprint, new.fingerprint) == (OLD, NEW)
    assert names(keeper) == {OLD.hex(), NEW.hex()}
    assert new.namespace != old.namespace
    assert new.connection is old.connection
    assert tie.renew(new) is new
    new.connection.close()


def test_an_engine_that_ends_looks_for_no_keeper_any_more(keeper_process, search, wait_until) -> None:
    before = set(threading.enumerate())
    tie = search(str(keeper_process.directory() / "keeper.sock"))
    tie.stop()
    wait_until(lambda: not set(threading.enumerate()) - before)
    tie.reopen(2)
    assert not set(threading.enumerate()) - before


def test_want_of_descriptors_or_memory_passes(
    keeper_process, search, wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keeper_process()
    wants = [OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENOMEM, errno.EMFILE)]
    real = link.Connection.open

    def scarce(*args: Any, **options: Any) -> Any:
        if wants:
            raise wants.pop()
        return real(*args, **options)

    monkeypatch.setattr(link.Connection, "open", scarce)
    tie = Link(EngineConfig(socket=keeper.socket), "engine", Identity(OLD, "m", [(4096, None)], 1, 1, 16))
    with pytest.raises(KeeperUnavailable, match="Too many open files"):
        tie.open(0)
    await_keeper(search(keeper.socket), wait_until).connection.close()
    assert not wants
