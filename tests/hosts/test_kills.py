"""Each part of a disaggregated fleet dies, or its link is cut, in mid-stream: no wrong token, errors in time,
and all others go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.vllm.conftest import tiny_model  # noqa: F401 (a fixture)
from tests.hosts.fleet import CHUNK, Fleet, Question, Stream, fleet_on, until
from tests.hosts.network import hosts

pytestmark = [pytest.mark.alone, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

READERS = [Question(1, 300, 900), Question(2, 200, 900)]
LATE = [Question(3, 2000, 8), Question(4, 1900, 8)]
ERRORS_WITHIN = 45.0  # seconds; a host that falls silent is given up after ten


@pytest.fixture(scope="module")
def fleet(
    tiny_model: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    with hosts(2) as network:
        folder = tmp_path_factory.mktemp("fleet")
        with fleet_on(network, tiny_model, folder, [*READERS, *LATE]) as one:
            yield one


def whole(fleet: Fleet, questions: list[Question]) -> int:
    """Ask one by one: all answers are whole and right; how many tokens of them were loaded."""
    before = fleet.loaded()
    for question in questions:
        (stream,) = fleet.ask([question])
        stream.end(60)
        assert (stream.whole, stream.error, fleet.right(stream)) == (True, "", True)
    return fleet.loaded() - before


def in_chunks(questions: list[Question]) -> int:
    return sum((question.length - 1) // CHUNK * CHUNK for question in questions)


def all_is_loaded(fleet: Fleet) -> bool:
    """In one of a few tries: the engine that decodes may have waited for some of it too long."""
    return any(whole(fleet, LATE) == in_chunks(LATE) for _ in range(3))


@pytest.mark.parametrize("prefills", [1, 2])
@pytest.mark.parametrize("mode", [(), ("--at-once",)], ids=["in turn", "at once"])
def test_one_keeper_for_all(fleet: Fleet, prefills: int, mode: tuple[str, ...]) -> None:
    if not fleet.shared:
        fleet.share()
    fleet.route(*mode, prefills=prefills)
    assert all_is_loaded(fleet) if mode else whole(fleet, LATE) == in_chunks(LATE)
    fleet.settle()


def both_kinds(fleet: Fleet, victim: str) -> list[Stream]:
    """Two answers are read and two prompts computed, as a part dies. All of them, ended."""
    for _ in range(3):
        readers = fleet.ask(READERS)
        until(lambda readers=readers: all(stream.begun() for stream in readers))
        stored = fleet.figures(fleet.near)["counters"]["stored_chunks"]
        late = fleet.ask(LATE)
        until(lambda stored=stored: fleet.figures(fleet.near)["counters"]["stored_chunks"] > stored + 2)
        # Not afterwards: until a killed engine's memory is given back, the others may have answered.
        amid = not any(stream.whole for stream in readers) and not any(stream.text for stream in late)
        fleet.kill(victim)
        deadline = time.monotonic() + ERRORS_WITHIN
        if amid:
            break
        for stream in (*readers, *late):  # it came too late to be in mid-stream
            stream.end(60)
        fleet.mend()
    else:
        pytest.fail("in three tries nothing was in mid-stream")
    return [stream.end(deadline - time.monotonic()) for stream in (*readers, *late)]


@pytest.mark.parametrize("victim", ["near", "far", "link of near", "prefill"])
def test_nobody_notices(fleet: Fleet, victim: str) -> None:
    """What a keeper or an engine that prefills would have given is computed."""
    fleet.part()
    assert [(stream.error, fleet.right(stream)) for stream in both_kinds(fleet, victim)] == [("", True)] * 4
    go_on(fleet)


@pytest.mark.parametrize("victim", ["router", "link of far", "decode"])
def test_who_asked_is_told(fleet: Fleet, victim: str) -> None:
    """Streams through it end as errors, none of them with a wrong token; the other parts serve on."""
    fleet.part()
    streams = both_kinds(fleet, victim)
    assert all(stream.error and not stream.whole and fleet.right(stream) for stream in streams)
    go_on(fleet)


def go_on(fleet: Fleet) -> None:
    """Nothing is held for anybody any more, and once what died is there again all is loaded again."""
    fleet.mend()
    fleet.settle()
    assert all_is_loaded(fleet)
    assert [engine.metric("vllm:kvkeep_errors_total") for engine in fleet.engines] == [0, 0, 0]
