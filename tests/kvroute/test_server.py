"""The router in front of stand-in engines: what clients get, and what they get when something is wrong."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import zmq
from aiohttp import web

from benchmarks.stand_in import Shape, tokens_of
from kvkeep.tls import client_context, server_context
from kvroute.backends import Engine
from kvroute.events import Stored, pack
from kvroute.policy import Ask
from tests.kvroute.scene import DOCUMENT, Scene, played, scene
from tests.pem import Pem


def test_an_answer_comes_back_as_the_engine_gave_it() -> None:
    async def play() -> None:
        async with scene(1) as s:
            engine = next(iter(s.router.pool.backends.values())).engine.url
            for stream in (False, True):
                body = {"model": "stand-in", "prompt": "a b c", "max_tokens": 5, "stream": stream, "x": [1]}
                async with s.client.post(f"{engine}/v1/completions", json=body) as direct:
                    wanted, kind = await direct.read(), direct.content_type
                raw = json.dumps(body, indent=3)
                async with s.post(raw) as answer:
                    assert (answer.status, answer.content_type) == (200, kind)
                    assert await answer.read() == wanted
                assert s.engines[0].stats.bodies[-1] == body
                assert s.engines[0].stats.headers[-1]["content-length"] == str(len(raw))

    played(play)


def test_a_stream_is_passed_on_as_it_comes() -> None:
    async def play() -> None:
        async with scene(1, shape=Shape(itl=30.0)) as s:
            body = {"model": "stand-in", "prompt": "a", "max_tokens": 2, "stream": True}
            async with s.post(body) as answer:
                first = await answer.content.readany()
                assert first == b'data: {"choices":[{"text":" w0"}]}\n\n'  # the next one is half a minute off
            # The client has gone: so the engine need not go on.
            await s.until(lambda: s.engines[0].stats.aborted == 1)
            assert (await s.metrics())["kvroute_left_total"] == 1

    played(play)


def test_headers_pass_but_for_those_of_the_connection() -> None:
    async def play() -> None:
        async with scene(1) as s:
            trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            given = {"traceparent": trace, "tracestate": "a=b", "x-own": "1", "authorization": "Bearer mine"}
            await s.ask("a", headers={**given, "Connection": "keep-alive, X-Hop", "X-Hop": "1", "TE": "x"})
            got = s.engines[0].stats.headers[-1]
            assert given.items() <= got.items()
            assert not {"x-hop", "te"} & got.keys()
            assert len(got["x-request-id"]) == 32
            await s.ask("a", headers={"X-Request-Id": "theirs"})
            assert s.engines[0].stats.headers[-1]["x-request-id"] == "theirs"

    played(play)


def test_a_packed_body_is_unpacked() -> None:
    async def play() -> None:
        async with scene(1, max_body=100_000) as s:
            body = json.dumps({"model": "stand-in", "prompt": "a b"}).encode()
            async with s.post(gzip.compress(body), headers={"Content-Encoding": "gzip"}) as answer:
                assert answer.status == 200
            assert s.engines[0].stats.bodies[-1]["prompt"] == "a b"
            bomb = gzip.compress(b" " * 50_000_000)
            assert (await s.refused(bomb, headers={"Content-Encoding": "gzip"}))[0] == 413

    played(play)


def test_models_of_all_engines_and_requests_to_those_that_serve_them() -> None:
    async def play() -> None:
        shapes = [Shape(models=("stand-in",)), Shape(models=("other",), adapters=("french",))]
        async with scene(shapes=shapes) as s:
            async with s.client.get(s.url + "/v1/models") as answer:
                cards = (await answer.json())["data"]
            assert [card["id"] for card in cards] == ["stand-in", "other", "french"]
            for model, engine in (("stand-in", 0), ("other", 1), ("french", 1)):
                before = [one.stats.requests for one in s.engines]
                await s.ask("a", model=model)
                before[engine] += 1
                assert [one.stats.requests for one in s.engines] == before
            status, error = await s.refused({"model": "third", "prompt": "a"})
            assert (status, error["type"]) == (404, "not_found_error")

    played(play)


@pytest.mark.parametrize(
    ("body", "path", "said"),
    [
        ("", "/v1/completions", "no JSON"),
        ("{", "/v1/completions", "no JSON"),
        ("[1]", "/v1/completions", "no JSON"),
        ('{"prompt": "a"}', "/v1/completions", "model"),
        ('{"model": 7, "prompt": "a"}', "/v1/completions", "model"),
        ('{"model": "stand-in"}', "/v1/completions", "no prompt"),
        ('{"model": "stand-in", "prompt": 7}', "/v1/completions", "no prompt"),
        ('{"model": "stand-in", "prompt": "a"}', "/v1/chat/completions", "no list of messages"),
        ('{"model": "stand-in", "messages": {}}', "/v1/chat/completions", "no list of messages"),
        ('{"model": "stand-in", "prompt": ' + "[" * 100_000, "/v1/completions", "no JSON"),
        ('{"model": "stand-in", "prompt": "a", "kv_transfer_params": {}}', "/v1/completions", "leave it out"),
        (b'{"model": "\xff", "prompt": "a"}', "/v1/completions", "no JSON"),
        ('{"model": "stand-in", "prompt": "a", "cache_salt": 7}', "/v1/completions", "cache_salt"),
    ],
)
def test_malformed_bodies(body: str | bytes, path: str, said: str) -> None:
    async def play() -> None:
        async with scene(1) as s:
            status, error = await s.refused(body, path)
            assert status == 400
            assert said in error["message"]
            assert s.engines[0].stats.requests == 0

    played(play)


def test_other_things_that_are_refused() -> None:
    async def play() -> None:
        async with scene(1, max_body=1000) as s:
            body = {"model": "stand-in", "prompt": "a " * 1000}
            assert (await s.refused(body))[0] == 413
            text = {"Content-Type": "text/plain"}  # what a web page could send without being asked
            assert (await s.refused("{}", headers=text))[0] == 415
            assert (await s.refused("{}", headers={"Host": "evil.example"}))[0] == 403
            assert (await s.refused("{}", "/v1/embeddings"))[0] == 404
            async with s.client.get(s.url + "/v1/completions") as answer:
                assert answer.status == 405
            assert (await s.metrics())['kvroute_refused_total{kind="too_large"}'] == 1

    played(play)


def test_an_engine_s_own_refusal_is_passed_on() -> None:
    """An oversized prompt, say: only the engine knows."""

    async def play() -> None:
        async with scene(2) as s:
            await s.fault(0, "400")
            await s.fault(1, "400")
            status, error = await s.refused({"model": "stand-in", "prompt": "a"})
            assert (status, error) == (400, {"message": "as you wished"})
            assert sum(one.stats.requests for one in s.engines) == 1

    played(play)


@pytest.mark.parametrize("fault", ["cut", "503"])
def test_before_the_first_byte_another_engine_is_tried(fault: str) -> None:
    async def play() -> None:
        async with scene(2, policy="round-robin") as s:
            await s.fault(0, fault)
            await s.ask("a")
            assert [one.stats.requests for one in s.engines] == [1, 1]
            assert (await s.metrics())["kvroute_retries_total"] == 1

    played(play)


def test_where_all_engines_fail_the_client_hears_why() -> None:
    async def play() -> None:
        async with scene(2) as s:
            await s.fault(0, "503", "503")
            await s.fault(1, "503", "503")
            status, error = await s.refused({"model": "stand-in", "prompt": "a"})
            assert (status, error["type"]) == (503, "engine_unavailable")
            assert "says 503" in error["message"]
            assert sum(one.stats.requests for one in s.engines) == 3  # the retries that the options allow

    played(play)


def test_an_engine_that_takes_too_long_is_not_waited_for() -> None:
    async def play() -> None:
        async with scene(2, shape=Shape(prefill_rate=0.01), timeout=0.2, policy="round-robin") as s:
            status, error = await s.refused({"model": "stand-in", "prompt": "a b c"})
            assert status == 504
            assert "takes too long" in error["message"]
            assert sum(one.stats.requests for one in s.engines) == 1

    played(play)


def test_an_engine_that_breaks_off_is_an_error_that_the_client_sees() -> None:
    async def play() -> None:
        async with scene(1) as s:
            await s.fault(0, "break")
            body = {"model": "stand-in", "prompt": "a", "max_tokens": 9, "stream": True}
            received = b""
            async with s.post(body) as answer:
                assert answer.status == 200
                try:
                    while chunk := await answer.content.readany():
                        received += chunk
                except aiohttp.ClientPayloadError:
                    received += b"(cut)"
            assert received.startswith(b'data: {"choices":[{"text":" w0"}]}\n\n')
            assert b"broke off" in received
            assert received.endswith(b"(cut)")
            assert b"[DONE]" not in received
            metrics = await s.metrics()
            assert (metrics["kvroute_cut_total"], metrics["kvroute_retries_total"]) == (1, 0)
            await s.ask("a")

    played(play)


def test_an_engine_that_is_sick_gets_no_requests_until_it_is_well() -> None:
    async def play() -> None:
        async with scene(2, policy="round-robin") as s:
            first = next(iter(s.router.pool.backends.values()))
            await s.fault(0, "sick")
            await s.until(lambda: not first.up)
            for _ in range(4):
                await s.ask("a")
            assert [one.stats.requests for one in s.engines] == [0, 4]
            await s.fault(0)
            await s.until(lambda: first.up)
            await s.ask("a")
            assert s.engines[0].stats.requests == 1

    played(play)


async def health(s: Scene) -> int:
    async with s.client.get(s.url + "/health") as answer:
        return answer.status


def test_without_an_engine() -> None:
    async def play() -> None:
        async with scene(1) as s:
            assert await health(s) == 200
            await s.engines[0]._runner.cleanup()
            first = next(iter(s.router.pool.backends.values()))
            await s.until(lambda: not first.up)
            assert await health(s) == 503
            status, error = await s.refused({"model": "stand-in", "prompt": "a"})
            assert (status, error["type"]) == (503, "engine_unavailable")

    played(play)


KEY, OTHER = "0123456789abcdef-client", "0123456789abcdef-engine"


def test_api_keys(tmp_path: Path) -> None:
    keys, ours = tmp_path / "keys", tmp_path / "ours"
    keys.write_text(f"{'x' * 20}\n{KEY}\n")
    ours.write_text(OTHER)

    async def play() -> None:
        options = {"api_keys": str(keys), "backend_key": str(ours)}
        async with scene(1, shape=Shape(key=OTHER), **options) as s:
            body = {"model": "stand-in", "prompt": "a"}
            for header in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}):
                status, error = await s.refused(body, headers=header)
                assert (status, error["type"]) == (401, "authentication_error")
            async with s.client.get(s.url + "/metrics") as answer:
                assert answer.status == 401
            assert await health(s) == 200
            await s.ask("a", headers={"Authorization": f"Bearer {KEY}"})
            assert s.engines[0].stats.headers[-1]["authorization"] == f"Bearer {OTHER}"

    played(play)


def test_keys_that_are_bound_to_a_cache_salt(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY} tenant-a\n{OTHER} tenant-b\n{'free' * 5}\n")

    async def play() -> None:
        async with scene(1, api_keys=str(keys)) as s:

            def salt() -> str | None:
                return s.engines[0].stats.bodies[-1].get("cache_salt")

            bound, free = ({"Authorization": f"Bearer {key}"} for key in (KEY, "free" * 5))
            for given in ({}, {"cache_salt": None}, {"cache_salt": "tenant-a"}):
                await s.ask(DOCUMENT, headers=bound, **given)
                assert salt() == "tenant-a"
            twice = '{"model": "stand-in", "prompt": "a", "cache_salt": "tenant-b", "cache_salt": "tenant-a"}'
            async with s.post(twice, headers=bound) as answer:
                assert answer.status == 200
            assert salt() == "tenant-a"
            for headers, given in ((bound, "tenant-b"), (bound, "mine"), (free, "tenant-b")):
                body = {"model": "stand-in", "prompt": "a", "cache_salt": given}
                status, error = await s.refused(body, headers=headers)
                assert (status, error["type"]) == (403, "permission_error")
            for given in (None, "mine"):
                await s.ask("a", headers=free, cache_salt=given)
                assert salt() == given
            # What one tenant has is not looked for under another's.
            await s.told(0, 25)
            lookup, tokens = s.router.index.lookup, tokens_of(DOCUMENT)
            assert [bool(lookup(tokens, extra=one)) for one in ("tenant-a", "tenant-b", None)] == [1, 0, 0]

    played(play)


def test_tokens_of_one_tenant_s_prompt_are_not_remembered_for_another() -> None:
    async def play() -> None:
        async with scene(1) as s:
            for salt, asked in (("a", 1), ("a", 1), ("b", 2), (None, 3)):
                await s.ask(DOCUMENT, cache_salt=salt)
                assert s.engines[0].stats.tokenized == asked

    played(play)


def test_what_was_sent_to_an_engine_that_is_down_or_gone_does_not_count() -> None:
    async def play() -> None:
        async with scene(2, policy="kv") as s:
            ask = Ask(b"", tokens=np.array(tokens_of(DOCUMENT), np.uint32))
            backends, expected = list(s.router.pool.backends.values()), s.router.expected
            for number, backend in enumerate(backends):
                expected.promise(ask, backend.name)
                assert list(expected.lookup(ask)) == [backend.name]
                if number == 0:
                    await s.fault(0, "sick")
                    await s.until(lambda: not backends[0].up)
                else:
                    for place in list(s.router.pool._found):
                        s.router.pool.found(place, [])
                assert expected.lookup(ask) == {}

    played(play)


def test_an_engine_that_answers_nonsense_does_not_end_the_checks_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b'{"x": ' + b"[" * 100_000)

    async def play() -> None:
        app = web.Application()
        app.router.add_get("/health", answer)
        app.router.add_get("/v1/models", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with scene(1) as s:
                name = f"127.0.0.1:{runner.addresses[0][1]}"
                s.router.pool.found("there", [Engine(name, f"http://{name}")])
                nonsense, first = s.router.pool.backends[name], next(iter(s.router.pool.backends.values()))
                await s.until(lambda: f"{name} cannot be checked" in caplog.text)
                assert not nonsense.up
                before = first.checks
                await s.until(lambda: first.checks > before + 2)
        finally:
            await runner.cleanup()

    played(play)


def test_bodies_take_no_more_memory_than_they_may() -> None:
    async def play() -> None:
        async with scene(1, shape=Shape(itl=60.0), max_body=1000, max_bodies=2500, queue_wait=0.2) as s:
            gate = s.router._gate
            body = json.dumps({"model": "stand-in", "prompt": "a " * 400, "max_tokens": 1})

            async def parts() -> AsyncIterator[bytes]:  # so its length is known when it has come
                yield body.encode()

            running = [asyncio.create_task(s.post(body).__aenter__()) for _ in range(2)]
            await s.until(lambda: s.engines[0].stats.requests == 2)
            assert gate.bytes == 2 * len(body)
            status, error = await s.refused(body)
            assert (status, error["type"]) == (503, "overloaded")
            async with s.client.post(
                s.url + "/v1/completions", data=parts(), headers={"Content-Type": "application/json"}
            ) as answer:
                assert answer.status == 503
            small = json.dumps({"model": "stand-in", "prompt": "a"})
            running.append(asyncio.create_task(s.post(small).__aenter__()))
            await s.until(lambda: gate.bytes == 2 * len(body) + len(small))
            assert (await s.metrics())["kvroute_bodies_bytes"] == gate.bytes
            for one in running:
                one.cancel()
            await s.until(lambda: gate.bytes == 0)

    played(play)


def test_tls_on_both_sides(pem: Pem) -> None:
    """The client shows a certificate in place of a key, and so does the router to its engines."""

    async def play() -> None:
        engines, known = server_context(*pem.server), client_context(*pem.client)
        options = {"listen": "127.0.0.1:0", "tls": pem.server, "backend_tls": pem.client}
        async with scene(1, engine_tls=engines, trust=known, **options) as s:
            assert s.url.startswith("https:")
            await s.ask("a b c")
            body = {"model": "stand-in", "prompt": "a", "stream": True, "max_tokens": 3}
            async with s.post(body) as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
            stranger = aiohttp.TCPConnector(ssl=client_context(pem.ca))
            async with aiohttp.ClientSession(connector=stranger) as client:
                async with client.get(s.url + "/health") as answer:
                    assert answer.status == 200
                async with client.get(s.url + "/metrics") as answer:
                    assert (answer.status, "certificate" in await answer.text()) == (401, True)

    played(play)


def test_an_engine_of_an_unknown_ca_is_down(pem: Pem) -> None:
    async def play() -> None:
        async with scene(1, engine_tls=server_context(pem.cert, pem.key), backend_tls=(pem.other_ca,)) as s:
            assert await health(s) == 503
            assert not s.engines[0].stats.requests

    played(play)


def test_limits() -> None:
    async def play() -> None:
        shape = Shape(prefill_rate=10.0)
        async with scene(1, shape=shape, max_requests=1, queue=1, queue_wait=0.2) as s:
            running = asyncio.create_task(s.ask("a b c d e f g h"))
            await s.until(lambda: s.engines[0].stats.requests)
            waiting = asyncio.create_task(s.refused({"model": "stand-in", "prompt": "a"}))
            await s.until(lambda: s.router._gate.waiting)
            status, error = await s.refused({"model": "stand-in", "prompt": "a"})
            assert (status, error["type"]) == (503, "overloaded")
            assert "too many" in error["message"]
            status, error = await waiting
            assert status == 503
            assert "no turn" in error["message"]
            await running
            await s.ask("a")  # the turn was handed on

    played(play)


def test_sessions_stay_together() -> None:
    async def play() -> None:
        async with scene(4, policy="session") as s:
            for number in range(12):
                before = [one.stats.requests for one in s.engines]
                for _ in range(3):
                    await s.ask("a", headers={"X-Session-Id": f"session {number}"})
                await s.ask("a", session_id=f"session {number}")
                grown = [one.stats.requests - was for one, was in zip(s.engines, before, strict=True)]
                assert sorted(grown) == [0, 0, 0, 4]
            assert sum(one.stats.requests > 0 for one in s.engines) > 1

    played(play)


def test_prompts_that_begin_alike_stay_together() -> None:
    async def play() -> None:
        async with scene(4, policy="prefix-hash") as s:
            for number in range(8):
                before = [one.stats.requests for one in s.engines]
                for question in range(3):
                    await s.ask(f"{number} {DOCUMENT} {question}")
                grown = [one.stats.requests - was for one, was in zip(s.engines, before, strict=True)]
                assert sorted(grown) == [0, 0, 0, 3]
            assert sum(one.stats.requests > 0 for one in s.engines) > 1

    played(play)


@pytest.mark.parametrize("chat", [False, True])
def test_kv_goes_where_the_prompt_is_held(chat: bool) -> None:
    async def play() -> None:
        async with scene(3) as s:
            # The engines know what a client asked them past us; we hear of it by their events.
            url = list(s.router.pool.backends.values())[1].engine.url
            body = {"model": "stand-in", "prompt": DOCUMENT, "max_tokens": 1}
            path = "/v1/completions"
            if chat:
                body["messages"], path = [{"role": "system", "content": DOCUMENT}], "/v1/chat/completions"
                del body["prompt"]
            async with s.client.post(url + path, json=body) as answer:
                assert answer.status == 200
            await s.told(1, 25)
            more = {"role": "user", "content": "and now?"}
            longer = (
                {**body, "messages": [*body["messages"], more]}
                if chat
                else {**body, "prompt": f"{DOCUMENT} x"}
            )
            async with s.post(longer, path) as answer:
                assert (await answer.json())["usage"]["prompt_tokens_details"]["cached_tokens"] >= 400
            metrics = await s.metrics()
            assert metrics["kvroute_held_tokens_total"] == 400
            name = list(s.router.pool.backends)[1]
            assert metrics[f'kvroute_engine_blocks{{engine="{name}"}}'] >= 25

    played(play)


def test_engines_may_send_their_events_to_the_router() -> None:
    async def play() -> None:
        async with scene(2, events_listen="tcp://127.0.0.1:0") as s:
            for number, name in enumerate(s.router.pool.backends):
                s.router._subscriber.leave(name)  # so that only what it sends is known
                with zmq.Context() as context, context.socket(zmq.PUB) as pub:
                    pub.setsockopt(zmq.LINGER, 0)
                    pub.connect(s.router.events)
                    event = Stored([1], None, [number] * 16, 16)
                    for sequence in range(500):
                        for topic in (f"kv@{name}@m", "kv@127.0.0.1@m", "kv@10.0.0.1:1@m", "kv@", "other"):
                            pub.send_multipart(pack(topic, sequence, 1.0, [event]))
                        await asyncio.sleep(0.01)
                        if s.router.index.blocks(name):
                            break
                assert list(s.router.index.lookup([number] * 16)) == [name]
            # A host stands for its only engine; here it has two.
            assert sorted(s.router.index.engines()) == sorted(s.router.pool.backends)

    played(play)
