"""Prefill on one engine, decode on another: what passes between them, and what happens without one."""

import asyncio

import pytest

from benchmarks.stand_in import Shape
from kvroute.index import Index
from tests.kvroute.scene import DOCUMENT, played, scene

ROLES = ["prefill", "decode", "decode"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_computed_by_one_and_answered_by_another(chat: bool) -> None:
    async def play() -> None:
        async with scene(3, roles=ROLES) as s:
            prefill, *decode = s.engines
            body = {"model": "stand-in", "stream": True, "max_tokens": 5, "min_tokens": 2, "n": 1}
            body |= {"stream_options": {"include_usage": True}, "unknown": {"a": 1}}
            body |= {"messages": [{"role": "user", "content": DOCUMENT}]} if chat else {"prompt": DOCUMENT}
            path = "/v1/chat/completions" if chat else "/v1/completions"
            async with s.post(body, path) as answer:
                text = await answer.text()
            assert text.count("data: ") == 7
            asked = prefill.stats.bodies[-1]
            assert asked["kv_transfer_params"]["do_remote_decode"] is True
            assert (asked["max_tokens"], asked["stream"], asked["unknown"]) == (1, False, {"a": 1})
            assert not {"stream_options", "min_tokens", "n"} & asked.keys()
            (there,) = [one for one in decode if one.stats.requests]
            got = there.stats.bodies[-1]
            params = got.pop("kv_transfer_params")
            assert (params["do_remote_prefill"], params["remote_host"]) == (True, "127.0.0.1")
            assert got == body
            assert there.stats.cached_tokens == there.stats.prompt_tokens - 1
            names = [one.stats.headers[-1]["x-request-id"] for one in (prefill, there)]
            assert names[0] == names[1]

    played(play)


def test_engines_that_share_a_store_name_nothing() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], shape=Shape(transfers=False)) as s:
            await s.ask(DOCUMENT)
            assert s.engines[0].stats.requests == 1
            assert "kv_transfer_params" not in s.engines[1].stats.bodies[-1]

    played(play)


@pytest.mark.parametrize("policy", ["kv", "round-robin"])
def test_what_the_decoder_has_little_to_compute_of_is_not_prefilled_elsewhere(policy: str) -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], policy=policy) as s:
            await s.ask("Good morning.")
            assert [one.stats.requests for one in s.engines] == [0, 1]
            await s.ask(DOCUMENT)
            assert [one.stats.requests for one in s.engines] == [1, 2]
            if policy == "kv":  # the decode engine has it by now
                await s.ask(DOCUMENT)
                assert [one.stats.requests for one in s.engines] == [1, 3]
            skipped = (await s.metrics())["kvroute_prefill_skipped_total"]
            assert skipped == (2 if policy == "kv" else 1)

    played(play)


def test_limits_of_chats_are_kept_for_the_decoder() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], prefill_from=0) as s:
            body = {"model": "stand-in", "messages": [{"role": "user", "content": "a"}]}
            async with s.post(body | {"max_completion_tokens": 4}, "/v1/chat/completions") as answer:
                assert (await answer.json())["usage"]["completion_tokens"] == 4
            asked = s.engines[0].stats.bodies[-1]
            assert asked["max_completion_tokens"] == 1
            assert "max_tokens" not in asked

    played(play)


def test_a_prefill_that_fails_is_tried_elsewhere_then_left_to_the_decoder() -> None:
    async def play() -> None:
        async with scene(
            3, roles=["prefill", "prefill", "decode"], policy="round-robin", prefill_from=0
        ) as s:
            await s.fault(0, "cut")
            await s.ask("a")
            assert [one.stats.requests for one in s.engines] == [1, 1, 1]
            assert s.engines[2].stats.bodies[-1]["kv_transfer_params"]["do_remote_prefill"] is True
            for number in (0, 1):
                await s.fault(number, "cut", "cut", "503", "503")
            await s.ask("a")
            assert "kv_transfer_params" not in s.engines[2].stats.bodies[-1]
            assert (await s.metrics())["kvroute_prefill_failed_total"] == 1

    played(play)


def test_a_prefill_that_refuses_is_the_answer() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], prefill_from=0) as s:
            await s.fault(0, "400")
            status, error = await s.refused({"model": "stand-in", "prompt": "a"})
            assert (status, error["message"]) == (400, "as you wished")
            assert s.engines[1].stats.requests == 0

    played(play)


SLOW = Shape(prefill_rate=1.0)  # seven minutes for DOCUMENT


def test_a_prefill_that_takes_too_long_is_left_to_the_decoder_and_its_engine_rests() -> None:
    async def play() -> None:
        roles = ["prefill", "prefill", "decode"]
        shapes = [SLOW, Shape(), Shape()]
        async with scene(
            3, roles=roles, shapes=shapes, policy="round-robin", prefill_from=0, prefill_wait=0.2
        ) as s:
            slow, fast, decode = s.engines
            for number in range(6):
                await s.ask(f"{number} {DOCUMENT}")
            assert (slow.stats.requests, fast.stats.requests, decode.stats.requests) == (2, 4, 6)
            assert sum("kv_transfer_params" in body for body in decode.stats.bodies) == 4
            await s.until(lambda: slow.stats.aborted == 2)
            assert (await s.metrics())["kvroute_prefill_failed_total"] == 2
            backend = next(iter(s.router.pool.backends.values()))
            assert backend.up  # its health is good
            backend.rests = 0.0
            slow.shape = Shape()
            await s.ask("it is well again")
            await s.ask("it is well again")
            assert (slow.stats.requests, backend.late) == (3, 0)

    played(play)


def test_both_at_once_do_not_wait_for_a_prefill_for_ever() -> None:
    async def play() -> None:
        options = {"at_once": True, "prefill_wait": 0.2}
        async with scene(2, roles=["prefill", "decode"], shapes=[SLOW, Shape()], **options) as s:
            decode = s.engines[1]
            decode.arrived.clear()
            await s.ask(DOCUMENT)
            assert (decode.stats.requests, decode.stats.aborted) == (2, 1)
            assert "kv_transfer_params" not in decode.stats.bodies[-1]

    played(play)


def test_an_engine_that_is_stuck_is_asked_where_there_is_no_other() -> None:
    async def play() -> None:
        async with scene(1, shape=SLOW, timeout=0.1) as s:
            for _ in range(4):
                status, _ = await s.refused({"model": "stand-in", "prompt": DOCUMENT})
                assert status == 504
            assert s.engines[0].stats.requests == 4

    played(play)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", [b"\xff", b"\\ud800"])
def test_a_field_whose_name_is_no_text(name: bytes, at_once: bool) -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], prefill_from=0, at_once=at_once) as s:
            status, error = await s.refused(b'{"model": "stand-in", "prompt": "a", "%s": 1}' % name)
            assert (status, error["type"]) == (400, "invalid_request_error")
            assert not any(one.stats.requests for one in s.engines)
            assert not any(one.in_flight for one in s.router.pool.backends.values())
            await s.ask("a")

    played(play)


def test_a_prompt_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Index] = []
    lookup = Index.lookup

    def counted(index: Index, *args: object) -> dict:
        looked.append(index)
        return lookup(index, *args)

    async def play() -> None:
        async with scene(3, roles=ROLES) as s:
            monkeypatch.setattr(Index, "lookup", counted)
            await s.ask(DOCUMENT)
            assert looked.count(s.router.index) == 1
            assert len(looked) == 2  # and what was sent and not told yet
            assert s.router.figures.own.buckets()[-1][1] == 1

    played(play)


def test_a_kind_of_engine_that_is_missing() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"]) as s:
            first, second = s.router.pool.backends.values()
            await s.fault(1, "sick")
            await s.until(lambda: not second.up)
            status, error = await s.refused({"model": "stand-in", "prompt": "a"})
            assert (status, error["type"]) == (503, "engine_unavailable")
            async with s.client.get(s.url + "/health") as answer:
                assert answer.status == 503
            assert first.up

    played(play)


# Both at once


def test_the_decoder_is_asked_while_the_prompt_is_computed() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], shapes=[SLOW, Shape()], at_once=True) as s:
            prefill, decode = s.engines
            assert await s.ask(DOCUMENT)
            assert decode.stats.bodies[-1]["kv_transfer_params"] == {
                "do_remote_prefill": True,
                "do_remote_decode": False,
            }
            names = [one.stats.headers[-1]["x-request-id"] for one in s.engines]
            assert names[0] == names[1]
            await s.until(lambda: prefill.stats.aborted == 1)  # nobody needs it any more
            await s.until(lambda: not any(one.in_flight for one in s.router.pool.backends.values()))

    played(play)


def test_it_waits_for_what_is_kept_and_is_asked_anew_for_the_rest() -> None:
    async def play(keeps: bool) -> None:
        shapes = [Shape(keeps=keeps), Shape()]
        async with scene(2, roles=["prefill", "decode"], shapes=shapes, at_once=True) as s:
            prefill, decode = s.engines
            decode.arrived.clear()
            asked = asyncio.create_task(s.ask(DOCUMENT))
            backend = next(iter(s.router.pool.backends.values()))
            await s.until(lambda: backend.answers.get("2xx"))
            if keeps:
                decode.arrived.set()
            await asked
            assert prefill.stats.requests == 1
            assert (decode.stats.requests, decode.stats.aborted) == ((1, 0) if keeps else (2, 1))
            if not keeps:
                assert decode.stats.bodies[-1]["kv_transfer_params"]["remote_host"] == "127.0.0.1"
                first, again = (headers["x-request-id"] for headers in decode.stats.headers)
                assert first != again
            assert (await s.metrics())["kvroute_retries_total"] == 0

    for keeps in (True, False):
        played(lambda keeps=keeps: play(keeps))


@pytest.mark.parametrize(("faults", "status"), [(["cut"] * 2, 200), (["400"], 400)])
def test_a_prefill_that_fails_or_refuses_while_it_is_waited_for(faults: list[str], status: int) -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], prefill_from=0, at_once=True, retries=1) as s:
            decode = s.engines[1]
            decode.arrived.clear()
            await s.fault(0, *faults)
            async with s.post({"model": "stand-in", "prompt": "a", "max_tokens": 2}) as answer:
                assert answer.status == status
                text = await answer.text()
            await s.until(lambda: decode.stats.aborted == 1)
            if status == 400:
                assert "as you wished" in text
                assert decode.stats.requests == 1
            else:
                assert decode.stats.requests == 2
                assert "kv_transfer_params" not in decode.stats.bodies[-1]
                assert (await s.metrics())["kvroute_prefill_failed_total"] == 1

    played(play)


def test_a_decoder_that_fails_is_followed_by_another_once_the_prompt_is_computed() -> None:
    async def play() -> None:
        async with scene(3, roles=ROLES, at_once=True) as s:
            _, *decode = s.engines
            for number in (1, 2):
                await s.fault(number, "cut")
            await s.ask(DOCUMENT)
            assert sorted(one.stats.requests for one in decode) == [1, 2]
            assert (await s.metrics())["kvroute_retries_total"] == 2
            (last,) = [one for one in decode if one.stats.requests == 2]
            assert last.stats.bodies[-1]["kv_transfer_params"]["remote_block_ids"]

    played(play)


def test_where_the_prompt_would_wait_its_turn_the_decoder_is_asked_later() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], shape=SLOW, at_once=True) as s:
            prefill, decode = s.router.pool.backends.values()
            s.engines[1].arrived.clear()
            asked = [asyncio.create_task(s.ask(DOCUMENT))]
            await s.until(lambda: s.engines[1].stats.requests)
            asked.append(asyncio.create_task(s.ask(f"other {DOCUMENT}")))
            await s.until(lambda: prefill.waiting == 2)
            assert (decode.waiting, s.engines[1].stats.requests) == (1, 1)
            for one in asked:
                one.cancel()

    played(play)


def test_both_are_ended_where_the_client_leaves() -> None:
    async def play() -> None:
        async with scene(2, roles=["prefill", "decode"], shape=SLOW, at_once=True) as s:
            s.engines[1].arrived.clear()
            asked = asyncio.create_task(s.ask(DOCUMENT))
            await s.until(lambda: all(one.stats.requests for one in s.engines))
            asked.cancel()
            await s.until(lambda: all(one.stats.aborted == 1 for one in s.engines))
            await s.until(lambda: not any(one.in_flight for one in s.router.pool.backends.values()))

    played(play)
