"""Engines that compute nothing: OpenAI's API as vLLM has it, KV accounted block by block, real events.

    python -m benchmarks.stand_in --engines 3 --blocks 4096     # prints a JSON line, serves until stdin ends

A word is a token. Prefill takes its time, one prompt after the other; what is held takes none. What must go
from the GPU stays on the CPU while there is room. Faults are asked for by POST /fault, one per request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import ssl
import sys
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from xxhash import xxh3_64_intdigest, xxh32_intdigest

from benchmarks.publisher import Publisher
from kvroute.events import Event, Removed, Stored

BLOCK = 16
SERVE_EVERY = 0.02
TOKENS: dict = {}


@dataclass
class Shape:
    """What an engine is like: room for blocks on GPU and CPU, prompt tokens per second, seconds per token."""

    blocks: int = 4096
    cpu_blocks: int = 0
    prefill_rate: float = 1e9
    itl: float = 0.0
    models: tuple[str, ...] = ("stand-in",)
    adapters: tuple[str, ...] = ()
    key: str | None = None
    transfers: bool = True
    keeps: bool = True
    """Whether what it prefills for another engine is all kept for that."""


@dataclass
class Stats:
    """What it was asked, and what it held of that."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokenized: int = 0
    aborted: int = 0
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)


def tokens_of(text: str) -> list[int]:
    """A word is a token."""
    return [xxh32_intdigest(word.encode()) >> 1 for word in text.split()]


class Cache:
    """Blocks on one medium, the least recently used going first; says what has changed as events."""

    def __init__(self, room: int, medium: str) -> None:
        self._room, self._medium = room, medium
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def holds(self, name: int) -> bool:
        """Whether a block is there; it counts as used."""
        if name in self._blocks:
            self._blocks.move_to_end(name)
            return True
        return False

    def store(self, chain: list[int], tokens: list[int], lora: str | None, salt: str | None) -> list[Event]:
        """Take all blocks of a prompt that are not there; its tail is the first to go."""
        events: list[Event] = []
        for number, name in enumerate(chain[: self._room]):
            if not self.holds(name):
                parent = chain[number - 1] if number else None
                ids = tokens[BLOCK * number : BLOCK * (number + 1)]
                extra = [key for key in (lora, None if number else salt) if key is not None]
                stored = Stored([name], parent, ids, BLOCK, medium=self._medium, lora_name=lora)
                stored.extra_keys = [extra] if extra else None
                events.append(stored)
                self._blocks[name] = None
        for name in reversed(chain[: self._room]):
            self._blocks.move_to_end(name)
        gone = [self._blocks.popitem(last=False)[0] for _ in range(len(self._blocks) - self._room)]
        return [*events, Removed(list(gone), self._medium)] if gone else events


class StandIn:
    """One engine. All on the running event loop."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.stats = shape, Stats()
        self.publisher = Publisher()
        self._caches = [Cache(shape.blocks, "GPU"), Cache(shape.cpu_blocks, "CPU")]
        self._computing = asyncio.Lock()
        self._faults: list[str] = []
        self.tokenized: dict | None = TOKENS
        """What /tokenize answers instead of tokens; None: there is no such path."""
        self.arrived = asyncio.Event()
        """Not set: what another engine has not handed over yet is waited for."""
        self.arrived.set()

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> int:
        """Serve; returns the port."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/stats", self._stats)
        app.router.add_post("/fault", self._fault)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port, backlog=8192, ssl_context=tls).start()
        self._serving = asyncio.create_task(self._serve_replays())
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        self._serving.cancel()
        await self._runner.cleanup()
        self.publisher.close()

    async def _serve_replays(self) -> None:
        while True:
            self.publisher.serve()
            await asyncio.sleep(SERVE_EVERY)

    def _refuses(self, request: web.Request) -> bool:
        return (
            self.shape.key is not None and request.headers.get("Authorization") != f"Bearer {self.shape.key}"
        )

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if "sick" in self._faults else 200)

    async def _models(self, request: web.Request) -> web.Response:
        if self._refuses(request):
            raise web.HTTPUnauthorized
        cards = [{"id": name, "object": "model", "parent": None} for name in self.shape.models]
        cards += [
            {"id": name, "object": "model", "parent": self.shape.models[0]} for name in self.shape.adapters
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _stats(self, request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.stats), content_type="application/json")

    async def _fault(self, request: web.Request) -> web.Response:
        self._faults = (await request.json())["faults"]
        return web.Response()

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.stats.tokenized += 1
        tokens = self._prompt(msgspec.json.decode(await request.read()))
        answer = {"count": len(tokens), "max_model_len": 1 << 20, "tokens": tokens}
        if self.tokenized is not TOKENS:
            if self.tokenized is None:
                raise web.HTTPNotFound
            answer = self.tokenized
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    def _prompt(self, body: dict) -> list[int]:
        if "messages" in body:
            return tokens_of(" ".join(f"<{one['role']}> {one['content']}" for one in body["messages"]))
        return tokens_of(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self._refuses(request):
            raise web.HTTPUnauthorized
        body = msgspec.json.decode(await request.read())
        self.stats.requests += 1
        self.stats.bodies.append(body)
        self.stats.headers.append({name.lower(): value for name, value in request.headers.items()})
        del self.stats.bodies[:-50], self.stats.headers[:-50]
        fault = self._faults.pop(0) if self._faults and self._faults[0] != "sick" else ""
        if fault == "cut":
            request.transport.close()
            return web.Response()
        if fault.isdecimal():
            return web.json_response({"error": {"message": "as you wished"}}, status=int(fault))
        try:
            return await self._compute(request, body, fault)
        except (ConnectionError, asyncio.CancelledError):
            self.stats.aborted += 1
            raise

    async def _compute(self, request: web.Request, body: dict, fault: str) -> web.StreamResponse:
        tokens, handed = self._prompt(body), body.get("kv_transfer_params") or {}
        if handed.get("do_remote_prefill") and not handed.get("remote_block_ids"):
            await self.arrived.wait()
        cached, params = await self._prefill(body, tokens)
        count = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        usage = {"prompt_tokens": len(tokens), "completion_tokens": count}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        chat = request.path.endswith("/chat/completions")
        if not body.get("stream"):
            await asyncio.sleep(count * self.shape.itl)
            text = "".join(f" w{number}" for number in range(count))
            choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            return web.json_response({"choices": [choice], "usage": usage, "kv_transfer_params": params})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(count):
            if fault == "break" and number == 2:
                request.transport.close()
                return response
            word = f" w{number}"
            await event(response, {"choices": [{"delta": {"content": word}} if chat else {"text": word}]})
            await asyncio.sleep(self.shape.itl)
        if (body.get("stream_options") or {}).get("include_usage"):
            await event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _prefill(self, body: dict, tokens: list[int]) -> tuple[int, dict | None]:
        """Compute what is not held; what it hands to another engine, where it was asked to."""
        lora = body["model"] if body["model"] in self.shape.adapters else None
        salt, wanted = body.get("cache_salt"), body.get("kv_transfer_params") or {}
        chain, key = [], xxh3_64_intdigest(repr((lora, salt)).encode())
        for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = xxh3_64_intdigest(msgspec.msgpack.encode(tokens[at : at + BLOCK]), key)
            chain.append(key)
        async with self._computing:
            held = 0
            for name in chain:
                if not any(cache.holds(name) for cache in self._caches):
                    break
                held += BLOCK
            if wanted.get("do_remote_prefill") and wanted.get("remote_block_ids"):
                held = len(tokens)
            held = min(held, len(tokens) - 1)
            self.stats.prompt_tokens += len(tokens)
            self.stats.cached_tokens += held
            await asyncio.sleep((len(tokens) - held) / self.shape.prefill_rate)
            for cache in self._caches:
                if events := cache.store(chain, tokens, lora, salt):
                    self.publisher.publish(*events)
        if not (wanted.get("do_remote_decode") and self.shape.transfers):
            return held, None
        ids = list(range(len(chain)))
        return held, {
            "do_remote_prefill": True,
            "remote_engine_id": str(os.getpid()),
            "remote_block_ids": ids,
            "remote_all": self.shape.keeps,
        }


async def event(response: web.StreamResponse, value: dict) -> None:
    await response.write(b"data: " + msgspec.json.encode(value) + b"\n\n")


async def serve(count: int, port: int, shape: Shape) -> None:
    """Serve until stdin ends; print where."""
    engines = [StandIn(shape) for _ in range(count)]
    ports = [await one.start(port) for one in engines]
    addresses = [
        {"url": f"http://127.0.0.1:{port}", "events": one.publisher.events, "replay": one.publisher.replay}
        for one, port in zip(engines, ports, strict=True)
    ]
    print(json.dumps(addresses), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for one in engines:
        await one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--cpu-blocks", type=int, default=0)
    parser.add_argument("--prefill-rate", type=float, default=1e9)
    parser.add_argument("--itl", type=float, default=0.0)
    args = vars(parser.parse_args())
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(args.pop("engines"), args.pop("port"), Shape(**args)))


if __name__ == "__main__":
    main()
