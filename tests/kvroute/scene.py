"""Stand-in engines, a router in front of them, and a client: real sockets on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp

from benchmarks.stand_in import Shape, StandIn
from kvroute.options import Options, Role, parse_place
from kvroute.server import Router

DOCUMENT = " ".join(f"word{number}" for number in range(400))


class Scene:
    """What a test acts in."""

    def __init__(self, engines: list[StandIn], router: Router, client: aiohttp.ClientSession) -> None:
        self.engines, self.router, self.client = engines, router, client
        self.url = router.url

    def post(self, body: Any, path: str = "/v1/completions", **more: Any) -> Any:
        """A request, as an async context manager."""
        kind = "data" if isinstance(body, str | bytes) else "json"
        more["headers"] = {"Content-Type": "application/json", **more.get("headers", {})}
        return self.client.post(self.url + path, **{kind: body}, **more)

    async def ask(self, prompt: Any, **more: Any) -> dict:
        """A completion without streaming; must succeed."""
        headers = more.pop("headers", {})
        body = {"model": "stand-in", "prompt": prompt, "max_tokens": 2, **more}
        async with self.post(body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def refused(self, body: Any, path: str = "/v1/completions", **more: Any) -> tuple[int, dict]:
        """A request that must fail: its status and error."""
        async with self.post(body, path, **more) as answer:
            assert answer.status >= 400
            return answer.status, (await answer.json())["error"]

    async def metrics(self) -> dict[str, float]:
        async with self.client.get(self.url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    async def fault(self, number: int, *faults: str) -> None:
        engine = list(self.router.pool.backends.values())[number].engine.url
        async with self.client.post(f"{engine}/fault", json={"faults": list(faults)}):
            pass

    async def until(self, holds: Callable[[], object]) -> None:
        for _ in range(1000):
            if holds():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("never came about")

    async def told(self, engine: int, blocks: int) -> None:
        """Wait until the index has heard of so many blocks of an engine."""
        name = list(self.router.pool.backends)[engine]
        await self.until(lambda: self.router.index.blocks(name) >= blocks)


@contextlib.asynccontextmanager
async def scene(
    engines: int = 2,
    *,
    shape: Shape | None = None,
    shapes: list[Shape] | None = None,
    roles: list[Role] | None = None,
    engine_tls: ssl.SSLContext | None = None,
    trust: ssl.SSLContext | bool = True,
    **options: Any,
) -> AsyncIterator[Scene]:
    """Start all of it, and end all of it. `engine_tls`: of the engines; `trust`: of the client."""
    shapes = shapes or [shape or Shape()] * engines
    standing = [StandIn(one) for one in shapes]
    places = []
    for one, role in zip(standing, roles or ["any"] * len(standing), strict=True):
        port = await one.start(tls=engine_tls)
        url = f"{'http' if engine_tls is None else 'https'}://127.0.0.1:{port}"
        places.append(parse_place(url, role, one.publisher.events, one.publisher.replay))
    given = {"listen": "127.0.0.1:0", "log_interval": 0.0, "check_interval": 0.1, **options}
    router = Router(Options(tuple(places), **given))
    await router.start()
    try:
        connector = aiohttp.TCPConnector(ssl=trust)
        async with aiohttp.ClientSession(auto_decompress=False, connector=connector) as client:
            yield Scene(standing, router, client)
    finally:
        await router.close()
        for one in standing:
            await one.close()


def played(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(play(), 30))
