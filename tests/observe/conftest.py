"""Keepers with a web page."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from kvkeep.identity import tenant_of
from tests.observe.traffic import Engine, traffic

SOON = "import kvkeep.observe.watch as watch; watch.SAMPLE_EVERY = 0.1"


class Watched:
    """A keeper, its HTTP side, and an engine."""

    def __init__(self, keeper: Any) -> None:
        self.keeper = keeper
        found = re.search(r"http://127\.0\.0\.1:\d+", keeper.log.read_text())
        assert found, keeper.log.read_text()
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=20.0)
        self.engine = Engine(keeper.connect("engine-0123456789abcdef:1"))

    @functools.cached_property
    def other(self) -> Engine:
        return Engine(self.engine.connection, "Qwen3-8B bfloat16 tp1", 8)

    def token(self) -> dict[str, str]:
        with open(f"{self.keeper.socket}.token") as file:
            return {"Authorization": f"Bearer {file.read().strip()}"}

    def state(self) -> dict[str, Any]:
        return self.client.get("/api/state").raise_for_status().json()

    def act(self, name: str, **about: object) -> dict[str, Any]:
        return self.client.post(f"/api/{name}", json=about, headers=self.token()).raise_for_status().json()

    def tenants(self) -> None:
        """Requests of two tenants, of another model."""
        for number in (1, 1, 2):
            self.other.request(700 + number, 4, tenant=tenant_of(f"salt {number}"))

    def text(self) -> str:
        return self.client.get("/metrics").raise_for_status().text


def _watched(factory: Callable[..., Any]) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def start(*options: str, memory: str = "4MiB", tier: bool = False, patch: str = SOON) -> Watched:
        below = ["--tier", f"fs://{factory.directory()}?capacity=64MiB"] if tier else []
        keeper = factory("--http", "127.0.0.1:0", *below, *options, memory=memory, patch=patch)
        made.append(Watched(keeper))
        return made[-1]

    yield start
    for one in made:
        one.client.close()


@pytest.fixture
def watched(keeper_process: Callable[..., Any]) -> Iterator[Callable[..., Watched]]:
    """Start a keeper with `--http`."""
    yield from _watched(keeper_process)


@pytest.fixture(scope="module")
def busy(module_keeper_process: Callable[..., Any], wait_until: Callable[..., None]) -> Iterator[Watched]:
    """One whose memory is too small for its traffic, and whose tier is not. Peers may read it."""
    starting = _watched(module_keeper_process)
    one = next(starting)("--peers", "0", "--tenant-quota", "default=1MiB", tier=True)
    one.tenants()

    def written() -> bool:
        return not one.engine.connection.status()["tiers"][0]["waiting_chunks"]

    traffic(one.engine, rounds=4, documents=8, after=lambda: wait_until(written))
    yield one
    for _ in starting:
        pass
