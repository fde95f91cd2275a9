"""Prefill on one engine, decode on another: what passes between them, and what happens without one."""

import pytest

from benchmarks.stand_in import Shape
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
