"""A small server that speaks the OpenAI streaming protocol, with faults by the name of the model.

Prints its port, and serves until its stdin ends. A token is a word; a prompt has as many tokens as words.
Requests of two words or fewer of asked answer (the probes) and /v1/models are never at fault, except where
the fault is about all that the server can do.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from aiohttp import web

PROBE_TOKENS = 2


class Fake:
    """The server's state: what it was asked, and how it misbehaves."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.held = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/asked", self.asked)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/listless/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "plain"}]})

    async def asked(self, request: web.Request) -> web.Response:
        return web.json_response(self.bodies)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["model"] == "no-tokenize":
            raise web.HTTPNotFound
        return web.json_response({"count": len(body["prompt"].split())})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append({**body, "authorization": request.headers.get("Authorization")})
        fault, asked = body["model"], body["max_tokens"]
        probing = asked <= PROBE_TOKENS
        if fault == "no-stream":
            return web.json_response({"choices": [{"text": "all at once"}], "usage": {}})
        if fault == "refuses" and not probing:
            return web.Response(status=500, text="out of memory")
        if fault == "dies" and not probing and len(self.bodies) > 4:
            os._exit(0)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = request.path.endswith("chat/completions")
        if chat:
            await self.event(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if fault == "hangs" and not probing:
            await asyncio.sleep(3600)
        count = asked - 3 if fault == "short" and not probing else asked
        for number in range(count):
            if fault == "breaks" and not probing and number == 2:
                request.transport.close()  # in the middle of the answer
                return response
            if fault == "errs" and not probing and number == 2:
                await self.event(response, {"error": {"message": "engine died"}})
                return response
            word = f" w{number}"
            choice = {"delta": {"content": word}} if chat else {"text": word}
            finish = {"finish_reason": "length"} if number == count - 1 else {}
            await self.event(response, {"choices": [{**choice, **finish}]})
        if fault != "no-usage" and body.get("stream_options", {}).get("include_usage"):
            await self.event(response, {"choices": [], "usage": self.usage(body, count)})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def event(self, response: web.StreamResponse, event: dict) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def usage(self, body: dict, count: int) -> dict:
        texts = [body["prompt"]] if "prompt" in body else [m["content"] for m in body["messages"]]
        words = sum(len(text.split()) for text in texts)
        return {
            "prompt_tokens": words + 7,  # as a template adds some
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": words // 2},
        }


async def main() -> None:
    runner = web.AppRunner(Fake().application(), shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
