"""Handing a prompt from engine to engine, without engines: real requests of vLLM and a real keeper."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Opened
from kvkeep.engines.vllm import handover
from kvkeep.engines.vllm.handover import Arrivals, Awaited, answer
from kvkeep.engines.vllm.reader import Reader, give_back
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.wire.messages import Reservation

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds

CHUNK, PRINT = 16, b"f" * 32
WAIT = 2.0
PROMPT = list(range(10 * CHUNK + 5))
WHOLE = 10


def request(tokens: list[int], params: Any, name: str = "r") -> Request:
    extra = {"kv_transfer_params": params}
    return Request(name, tokens, SamplingParams(max_tokens=1, extra_args=extra), None)


def watched(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks each question is about that is asked of the keeper from now on."""
    asked, changes = [], pair.opened.connection.changes

    def noted(space: int, keys: bytes, after: int | None = None) -> Any:
        asked.append(len(keys) // 16)
        return changes(space, keys, after)

    monkeypatch.setattr(pair.opened.connection, "changes", noted)
    return asked


class Pair:
    """A producer that saves chunk by chunk, and the decode engine's side of requests."""

    def __init__(self, keeper: Any, other: Any = None) -> None:
        self.now = 100.0
        self.producer, link = keeper.connect("producer:0"), (other or keeper).connect("decode:0")
        shape = (PRINT, "test", [(4096, None)], 1, 1)
        self.space = self.producer.open_namespace(*shape)
        self.opened = Opened(link, link.open_namespace(*shape), 0, PRINT)
        self.stats = KVKeepStats()
        config = EngineConfig(socket=keeper.socket, remote_wait=WAIT, probe_wait=5.0)
        self.reader = Reader(config, self.stats, 0)
        self.arrivals = Arrivals(config, self.stats, 0, lambda: self.now)

    def save(self, first: int, last: int, tokens: list[int] = PROMPT) -> None:
        keys = Tracked(request(tokens, None), PRINT, CHUNK).keys(0, last)[first * 16 :]
        [done] = self.producer.reserve(self.space, [Reservation(keys, [b"\1" * (last - first)], first, 0)])
        self.producer.commit(done.reservation, 0)
        self.producer.status()  # answered in turn: the commit, which is not, has been heard

    def begin(self, params: Any, tokens: list[int] = PROMPT, name: str = "r") -> Tracked:
        return Tracked(request(tokens, params, name), PRINT, CHUNK)

    def ask(self, tracked: Tracked) -> int | None:
        """One `get_num_new_matched_tokens`: chunks, or None to be asked again."""
        if not self.reader.look(self.opened, tracked, 0, WHOLE, CHUNK):
            return None
        waits = self.arrivals.waits(self.opened, tracked, PRINT, WHOLE, CHUNK)
        return None if waits else tracked.found

    def until_answered(self, tracked: Tracked, step: float = 0.01, rest: float = 0.0) -> tuple[int, float]:
        """Chunks, and how long the engine had to ask. `rest`: real seconds between, for keepers at work."""
        began = self.now
        for _ in range(2000):
            got = self.ask(tracked)
            if got is not None:
                give_back(self.opened, tracked)
                return got, self.now - began
            self.now += step
            time.sleep(rest)
        raise AssertionError("it waits for ever")


@pytest.fixture(scope="module")
def keeper(module_keeper_process: Any) -> Any:
    return module_keeper_process(memory="16MiB")


@pytest.fixture
def pair(keeper: Any) -> Pair:
    pair = Pair(keeper)
    pair.producer.clear()
    return pair


REMOTE = {"do_remote_prefill": True, "do_remote_decode": False}


@pytest.mark.parametrize(
    "params", [None, {}, {"do_remote_prefill": False}, {"do_remote_prefill": 1}, "x", [1], 7]
)
def test_who_asks_for_nothing_does_not_wait(pair: Pair, params: Any) -> None:
    assert pair.until_answered(pair.begin(params)) == (0, 0)
    assert not pair.stats.data.get("remote_waits")


@pytest.mark.parametrize("extra", [{}, {"remote_num_tokens": 10 * CHUNK}, {"remote_num_tokens": "many"}])
def test_what_is_there_is_taken_at_once(pair: Pair, extra: dict[str, Any]) -> None:
    pair.save(0, WHOLE)
    assert pair.until_answered(pair.begin(REMOTE | extra)) == (WHOLE, 0)


def test_chunks_on_their_way_are_waited_for_as_long_as_they_come(pair: Pair) -> None:
    tracked = pair.begin(REMOTE)
    for chunk in range(WHOLE):  # each comes well within the wait, all of them do not
        assert pair.ask(tracked) is None
        assert pair.arrivals.rests()
        pair.now += 0.6 * WAIT
        pair.save(chunk, chunk + 1)
    assert pair.until_answered(tracked)[0] == WHOLE
    pair.arrivals.rests()
    assert not pair.arrivals.rests()
    assert pair.stats.data["remote_waits"] == 1
    assert pair.stats.data["remote_timeouts"] == 0


def test_what_is_asked_often_is_what_may_have_come_since(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_WINDOW", 3)
    asked = watched(pair, monkeypatch)
    tracked = pair.begin(REMOTE)
    for chunk in range(0, WHOLE, 2):
        assert pair.ask(tracked) is None
        pair.save(chunk, chunk + 2)
        pair.now += 0.01
    assert pair.until_answered(tracked)[0] == WHOLE
    assert set(asked) <= {1, 2, 3}


def test_many_that_wait_ask_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question in each round of the engine, however many wait; each hears of its own chunks."""
    prompts = [[number, *PROMPT] for number in range(40)]
    waiting = [pair.begin(REMOTE, tokens, f"r{at}") for at, tokens in enumerate(prompts)]
    asked = watched(pair, monkeypatch)
    for _ in range(10):
        pair.now += 0.01
        assert [pair.ask(tracked) for tracked in waiting] == [None] * 40
    assert len(asked) == 10
    for tokens in prompts[::2]:
        pair.save(0, WHOLE, tokens)
    for _ in range(2):  # all hear of it, and the others wait on
        pair.now += 0.01
        answers = [pair.ask(tracked) if tracked.found < WHOLE else WHOLE for tracked in waiting]
    assert answers == [WHOLE, None] * 20
    assert len(asked) == 12
    pair.now += WAIT
    assert [pair.ask(tracked) for tracked in waiting[1::2]] == [0] * 20
    assert pair.stats.data["remote_timeouts"] == 20
    for tracked in waiting:
        give_back(pair.opened, tracked)


def test_who_was_not_asked_about_meanwhile_is_not_late(pair: Pair) -> None:
    """A step took longer than the wait: what came in it counts."""
    tracked = pair.begin(REMOTE)
    assert pair.ask(tracked) is None
    pair.now += 2 * WAIT
    pair.save(0, 3)
    assert pair.ask(tracked) is None
    assert pair.stats.data.get("remote_timeouts", 0) == 0
    give_back(pair.opened, tracked)


def test_what_does_not_come_is_not_waited_for_longer(pair: Pair) -> None:
    pair.save(0, 3)
    tracked = pair.begin(REMOTE)
    assert pair.ask(tracked) is None
    pair.now += 0.5 * WAIT
    pair.save(3, 4)
    chunks, waited = pair.until_answered(tracked)
    assert chunks == 4
    assert waited == pytest.approx(WAIT, abs=0.1)
    assert pair.stats.data["remote_timeouts"] == 1
    assert pair.until_answered(tracked) == (4, 0)  # and not again


def test_nothing_at_all_costs_the_wait_once(pair: Pair) -> None:
    chunks, waited = pair.until_answered(pair.begin(REMOTE))
    assert (chunks, round(waited, 1)) == (0, WAIT)


@pytest.mark.parametrize(("said", "there"), [(0, 0), (3 * CHUNK, 3), (3 * CHUNK + 5, 3), (-7, 0)])
def test_no_more_is_waited_for_than_was_saved(pair: Pair, said: int, there: int) -> None:
    if there:
        pair.save(0, there)
    assert pair.until_answered(pair.begin(REMOTE | {"remote_num_tokens": said})) == (there, 0)


def test_a_lease_holds_what_came_while_the_rest_is_waited_for(pair: Pair) -> None:
    pair.save(0, 3)
    tracked = pair.begin(REMOTE)
    assert pair.ask(tracked) is None
    pair.producer.clear()
    assert pair.opened.connection.status()["leases"] == 1
    assert tracked.found == 3
    give_back(pair.opened, tracked)


def test_chunks_come_through_a_shared_tier_too(keeper_process: Any, tmp_path: Path) -> None:
    """Two keepers, as on two hosts; what is written below after the first look is found by a later one."""
    tier = ("--tier", f"fs://{tmp_path}/tier?capacity=1GiB")
    pair = Pair(*(keeper_process(*tier, memory="16MiB") for _ in range(2)))
    pair.save(0, 3)
    tracked = pair.begin(REMOTE)
    for _ in range(20):
        assert pair.ask(tracked) is None
    pair.save(3, WHOLE)
    deadline = time.monotonic() + 20
    while (got := pair.ask(tracked)) is None and time.monotonic() < deadline:
        time.sleep(0.002)
        pair.now += 0.002
    assert got == WHOLE
    give_back(pair.opened, tracked)


def test_a_peer_is_asked_soon_again(keeper_process: Any) -> None:
    """Chunk by chunk as they are saved on the other host: at each look what is there by then, 50 ms apart."""
    other = keeper_process("--peers", "0", memory="16MiB")
    address = other.figures()["peers"]["address"]
    pair = Pair(other, keeper_process("--tier", f"peer://{address}", memory="16MiB"))
    tracked = pair.begin(REMOTE)
    for chunk in range(WHOLE):
        began = pair.now
        while tracked.first + tracked.found < chunk:
            assert pair.ask(tracked) is None
            pair.now += 0.002
            time.sleep(0.002)
            assert pair.now < began + 1.0
        assert tracked.awaited is None or tracked.awaited.pause <= 0.05
        pair.save(chunk, chunk + 1)
    assert pair.until_answered(tracked, 0.002, rest=0.005)[0] == WHOLE


def test_what_another_engine_has_computed_is_loaded_however_fast_this_one_is(keeper_process: Any) -> None:
    other = keeper_process("--peers", "0", memory="16MiB")
    address = other.figures()["peers"]["address"]
    pair = Pair(other, keeper_process("--tier", f"peer://{address}", memory="16MiB"))
    before = PROMPT[::-1]
    pair.save(0, WHOLE, before)
    assert pair.until_answered(pair.begin(REMOTE, before), 0.002, rest=0.005)[0] == WHOLE
    speed = pair.reader.speed
    speed._tokens, speed._seconds = 10**9, 1e-3  # reading takes longer, as is known by now
    pair.save(0, WHOLE)
    assert pair.until_answered(pair.begin(None), 0.002, rest=0.005)[0] == 0
    assert pair.until_answered(pair.begin(REMOTE), 0.002, rest=0.005)[0] == WHOLE


ASKED = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_host": None}


def test_the_answer_is_what_the_decode_side_takes() -> None:
    tracked = Tracked(request(PROMPT, ASKED), PRINT, CHUNK)
    tracked.next_save = tracked.kept = WHOLE + 1  # with a token that was generated
    told = answer(ASKED, RequestStatus.FINISHED_LENGTH_CAPPED, "engine", tracked, CHUNK)
    assert told is not None
    assert (told["remote_engine_id"], told["remote_host"], told["remote_block_ids"]) == ("engine", None, None)
    awaited = Awaited.of(told)
    assert awaited is not None
    assert (awaited.tokens, told["remote_all"]) == (WHOLE * CHUNK, True)
    tracked.kept = 7  # the keeper had no room for the next one
    some = answer(ASKED, RequestStatus.FINISHED_LENGTH_CAPPED, "engine", tracked, CHUNK)
    assert some is not None
    assert (some["remote_num_tokens"], some["remote_all"]) == (7 * CHUNK, False)
    nothing = answer(ASKED, RequestStatus.FINISHED_STOPPED, "engine", None, CHUNK)
    assert nothing is not None
    assert (nothing["remote_num_tokens"], nothing["remote_all"]) == (0, False)


@pytest.mark.parametrize(("params", "next_save"), [(None, 5), (REMOTE, 5), (ASKED, 0)])
def test_a_prompt_that_is_handed_over_is_offered_whole(params: Any, next_save: int) -> None:
    """Three chunks were in the engine's own cache, of which the keeper says nothing; two are loaded."""
    tracked = Tracked(request(PROMPT, params), PRINT, CHUNK)
    tracked.first, tracked.found = 3, 2
    tracked.loaded()
    assert tracked.next_save == next_save


@pytest.mark.parametrize("params", [None, {}, REMOTE, {"do_remote_decode": "yes"}, [ASKED]])
def test_who_did_not_ask_is_told_nothing(params: Any) -> None:
    assert answer(params, RequestStatus.FINISHED_STOPPED, "engine", None, CHUNK) is None
    assert answer(ASKED, RequestStatus.FINISHED_ABORTED, "engine", None, CHUNK) is None
