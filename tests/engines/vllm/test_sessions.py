"""Which session a rank is in, what it commits there, and when it leaves; with real keepers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

from kvkeep.engines import search
from kvkeep.engines.vllm import joined
from kvkeep.engines.vllm.metadata import NOWHERE, Offered, Session, StepMeta
from kvkeep.errors import RequestRefused
from kvkeep.wire.messages import Reservation
from tests.engines.vllm.test_device import CHUNKS, KEYS, LAYERS, PER_CHUNK, Rank

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds


def test_a_keeper_that_took_the_place_of_another_is_another(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies between a worker's start and the scheduler's: both count their sessions from 0."""
    rank = Rank(keeper_process(), monkeypatch, 0)
    first = rank.side.handshake().place
    rank.keeper.process.kill()
    rank.keeper.process.wait(20)
    second = (keeper_process(socket=rank.keeper.socket).figures()["keeper"], 0)
    assert first != second
    meta = StepMeta(0, session=Session(second, {(0, 0): [0]}, {(0, 0): 0}))

    def in_it() -> bool:
        rank.side._follow(meta)
        return rank.side.report(meta).joined == {(0, 0): second}

    assert rank.side.report(meta).joined == {(0, 0): first}, "which is not what the scheduler waits for"
    wait_until(in_it)
    rank.side.leave()


def test_a_keeper_of_another_host_is_not_joined(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread tries, whatever the steps, and says why once."""
    rank = Rank(keeper_process(), monkeypatch, 0)
    tries, said, join = list[Any](), list[Any](), rank.side._join
    monkeypatch.setattr(rank.side._joining, "_join", lambda *place: (tries.append(place), join(*place)))
    monkeypatch.setattr(joined.log, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr(search, "_RETRY_FIRST", 0.001)
    elsewhere = ("keeper of another host", 0)
    meta = StepMeta(0, session=Session(elsewhere, {(0, 0): [0]}, {(0, 0): 0}))
    before = set(threading.enumerate())
    for _ in range(100):
        rank.side._follow(meta)
    wait_until(lambda: len(tries) >= 4)
    assert len(set(threading.enumerate()) - before) == 1
    assert rank.side.report(meta).joined != {(0, 0): elsewhere}
    assert len(said) == 1
    assert "is this another host?" in said[0]
    rank.side.leave()


def test_a_session_that_is_not_wanted_any_more_is_left(wait_until) -> None:
    """It was joined too late, or nobody took it: its connection would keep its claims."""
    slow, left = threading.Event(), list[str]()

    def join(keeper: str, epoch: int) -> Any:
        assert keeper != "slow" or slow.wait(20)
        return SimpleNamespace(close=lambda: left.append(keeper))

    joining = joined.Joining(join)
    joining.begin(("slow", 0))
    joining.begin(("never taken", 1))
    wait_until(lambda: joining._search._found)
    joining.begin(("taken", 2))
    wait_until(lambda: joining.take(("taken", 2)))
    assert left == ["never taken"]
    slow.set()
    wait_until(lambda: left == ["never taken", "slow"])
    joining.begin(("last", 3))
    wait_until(lambda: joining._search._found)
    joining.stop()
    assert left[2:] == ["last"]
    assert joining.take(("slow", 0)) is joining.take(("last", 3)) is None


def test_a_replica_commits_what_another_rank_writes(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before what its step loaded has come: its part of the sums has gone into what is written."""
    rank = Rank(keeper_process(), monkeypatch, 1)
    rank.session.replicas.add((0, 0))
    rank.step()
    saves = rank.offer(list(range(1, 9)))
    [reserved] = rank.link.reserved(saves.ticket)
    rank.backend._lock.acquire()  # the device stands still
    try:
        rank.step(saves=saves)
        assert rank.figure("reservations") == 1
    finally:
        rank.backend._lock.release()
    wait_until(lambda: not rank.figure("reservations"), 20)
    assert rank.figure("chunks") == CHUNKS
    arena = rank.keeper.connect(arena=True).map_arena()
    size = LAYERS * 4096 * PER_CHUNK
    assert not any(any(arena[at : at + size]) for at in reserved.offsets[0].tolist())
    assert "saved_bytes" not in rank.side.stats.data
    rank.side.leave(wait=20)


def test_a_replica_whose_load_failed_commits_nothing(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(keeper_process(), monkeypatch, 1)
    rank.session.replicas.add((0, 0))
    saves = rank.offer(list(range(1, 9)))
    assert rank.link.reserved(saves.ticket)
    rank.side.fail_blocks([1])
    rank.step(saves=saves)
    rank.side.stop(wait=20)
    assert rank.figure("reservations") == 1
    rank.link.close()
    wait_until(lambda: not rank.figure("reservations"), 20)
    assert rank.figure("chunks") == 0


def test_a_scheduler_that_is_off_ends_its_workers_claims(
    keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(keeper_process(), monkeypatch, 0)
    rank.keep(list(range(8)))
    wait_until(lambda: rank.figure("reservations") == 0)
    rank.link.reserve(rank.space, [Reservation(KEYS[::-1], [b"\1" * CHUNKS], 0, 0)])
    rank.link.close()  # as the scheduler side's is, when it is off
    assert rank.figure("reservations") == 1
    rank.side.end_step(StepMeta(0, leave=True))
    wait_until(lambda: rank.figure("reservations") == 0)
    assert rank.side.report(StepMeta(0, session=rank.session)).joined == {(0, 0): NOWHERE}


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "device"])
def test_a_keeper_that_dies_before_it_says_what_it_reserved(
    on_cpu: bool, keeper_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is lost, as at any other time: nothing that the engine's figures call an error."""
    rank = Rank(keeper_process(), monkeypatch, 0, on_cpu=on_cpu)
    rank.step()
    rank.keeper.process.kill()
    rank.keeper.process.wait(20)
    offered = Offered(1, math.inf, PER_CHUNK)
    assert rank.step(saves=offered)
    assert rank.side._joined.closed
    assert "saved_bytes" not in rank.side.stats.data
    assert rank.side.report(None).joined == {(0, 0): NOWHERE}
    rank.side.leave(wait=20)


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "device"])
def test_a_load_that_a_request_waits_for_when_the_keeper_dies(
    on_cpu: bool, keeper_process: Callable[..., Any], wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not count, and that is no error: the request is computed."""
    rank = Rank(keeper_process(), monkeypatch, 0, on_cpu=on_cpu)
    rank.keep(list(range(1, 9)))
    wait_until(lambda: not rank.figure("reservations"), 20)
    found, copied = rank.link.lookup(rank.space, KEYS), threading.Event()
    copies = rank.copies(found.offsets[0], list(range(12, 20)), found.lease)
    held = rank.side.apart._pool.submit(copied.wait)  # what it has to do before
    rank.step(apart={"r": copies})
    rank.keeper.process.kill()
    rank.keeper.process.wait(20)
    rank.step(saves=Offered(9, math.inf, PER_CHUNK))  # the engine's thread hears of it
    copied.set()
    wait_until(rank.side.apart.ended, 20)
    assert held.result()
    assert not rank.side.settle("r")
    assert "loaded_tokens" not in rank.side.stats.data
    rank.side.leave(wait=20)


def test_a_reservation_that_is_refused(
    keeper_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler side is told too, and ends what is to be ended."""
    rank = Rank(keeper_process(), monkeypatch, 0)
    space, rank.space = rank.space, 999
    assert rank.step(saves=rank.offer(list(range(8))))
    assert "saved_bytes" not in rank.side.stats.data
    with pytest.raises(RequestRefused, match="no namespace 999"):
        rank.link.reserved(rank.ticket)
    rank.space = space
    rank.keep(list(range(8)))
    assert rank.side.stats.data["saved_bytes"] > 0
    rank.side.leave(wait=20)
