"""An engine for production-stack's router, as a process: completions, /tokenize with a token per word, and KV
events of what it was asked. Answers with its own host and how many of the prompt's tokens it held.

    stack_engine.py HOST PORT EVENTS_PORT
"""

import json
import sys
import zlib

import zmq
from aiohttp import web

from kvroute.events import Stored, pack

BLOCK = 16
_ANSWER = {"id": "x", "object": "text_completion", "model": "llama"}


class Engine:
    def __init__(self, host: str, events_port: int) -> None:
        self.host = host
        self.held: set[int] = set()
        self.sequence = 0
        self.pub = zmq.Context().socket(zmq.PUB)
        self.pub.bind(f"tcp://{host}:{events_port}")

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": tokens((await request.json())["prompt"])})

    async def complete(self, request: web.Request) -> web.Response:
        held = self.compute(tokens((await request.json())["prompt"]))
        choice = {"index": 0, "text": f"{self.host} {held}", "finish_reason": "stop"}
        return web.json_response({**_ANSWER, "choices": [choice]})

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response(text="")

    def compute(self, ids: list[int]) -> int:
        """Hold a prompt's whole blocks, and announce them; returns how many tokens were held before."""
        names = list[int]()
        for at in range(BLOCK, len(ids) + 1, BLOCK):
            names.append(zlib.crc32(json.dumps(ids[:at]).encode()))
        old = sum(name in self.held for name in names)
        if names[old:]:
            new = ids[old * BLOCK : len(names) * BLOCK]
            event = Stored(names[old:], names[old - 1] if old else None, new, BLOCK, medium="GPU")
            self.pub.send_multipart(pack("", self.sequence, 0.0, [event]))
            self.sequence += 1
            self.held.update(names)
        return old * BLOCK


def tokens(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) % 50_000 for word in text.split()]


def main() -> None:
    host, port, events_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine, app = Engine(host, events_port), web.Application()
    app.router.add_post("/tokenize", engine.tokenize)
    app.router.add_post("/v1/completions", engine.complete)
    app.router.add_get("/health", engine.healthy)
    app.router.add_get("/metrics", engine.healthy)
    web.run_app(app, host=host, port=port, print=None)


if __name__ == "__main__":
    main()
