"""The redis tier against real servers."""

from __future__ import annotations

import pytest

from tests.tiers.conformance import TierConformance
from tests.tiers.place import Place, Proxy
from tests.tiers.redis_server import RedisPlace, Server


@pytest.fixture(scope="module")
def server() -> Server:
    server = Server()
    yield server
    server.close()


class TestRedis(TierConformance):
    @pytest.fixture
    def place(self, server: Server) -> Place:
        proxy = Proxy(("127.0.0.1", server.port))
        place = RedisPlace(server, f"redis://127.0.0.1:{proxy.port}/0", proxy)
        yield place
        place.close()


class TestUnixSocket(TierConformance):
    @pytest.fixture
    def place(self, server: Server) -> Place:
        place = RedisPlace(server, f"redis+unix://{server.socket}?connections=3")
        yield place
        place.close()
