"""Two keepers on two hosts share one store: what one engine prefilled, the other loads; and a cut link."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvbench.engine import VllmServer, connector_args
from kvbench.network import Unavailable
from kvkeep.wire.client import Connection
from tests.cores import engine_cores
from tests.engines.vllm.conftest import tiny_model  # noqa: F401 (a fixture)
from tests.hosts.network import Host, common_address, hosts
from tests.tiers import weed
from tests.tiers.place import Proxy

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ARGS = ["--dtype", "float32", "--max-model-len", "4096", "--block-size", "32"]
ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": engine_cores()}
HIT = 576
LONG = 3500  # tokens, 14 MB of KV: seven seconds on the narrow link
TIERS = ["fs", "redis", "s3", "mooncake"]


def prompt(seed: int, length: int = 700) -> list[int]:
    return [3 + (seed * 7919 + i * (seed + 3) * 31) % 4000 for i in range(length)]


class Store:
    """The URL of a tier as each host writes it."""

    def __init__(self, url: Callable[[Host], str], remote: bool = True) -> None:
        self.url, self.remote = url, remote


@contextlib.contextmanager
def forwarded(port: int, network: list[Host]) -> Iterator[dict[Host, int]]:
    """The port at which each host finds a server of this one."""
    with contextlib.ExitStack() as stack:
        ports = {}
        for host in network:
            proxy = Proxy(("127.0.0.1", port), host.store)
            stack.callback(proxy.close)
            ports[host] = proxy.port
        yield ports


@contextlib.contextmanager
def store(name: str, network: list[Host], folder: Path) -> Iterator[Store]:
    if name == "fs":
        folder.mkdir()
        yield Store(lambda host: f"fs://{folder}/kv?capacity=1GiB", remote=False)
    elif name == "redis":
        from tests.tiers.redis_server import Server

        server = Server()
        try:
            with forwarded(server.port, network) as ports:
                yield Store(lambda host: f"redis://{host.store}:{ports[host]}/0?timeout=1s")
        finally:
            server.close()
    elif name == "s3":
        folder.mkdir()
        with weed.running(folder) as server, forwarded(server.port, network) as ports:
            yield Store(
                lambda host: (
                    f"s3://{weed.KEY}:{weed.SECRET}@{weed.BUCKET}/kv?region=us-east-1&timeout=1s"
                    f"&endpoint=http://{host.store}:{ports[host]}"
                )
            )
    elif name == "mooncake":
        from tests.tiers.moon import Master, Node

        folder.mkdir()
        with common_address() as address, contextlib.ExitStack() as stack:
            master = Master(folder / "master.log", address)
            stack.callback(master.kill)
            stack.callback(Node(master.address, 1 << 30, folder / "node.log", address).kill)
            yield Store(lambda host: f"mooncake://{master.address}?timeout=1s")


class Site:
    """One host with its engine, and its keeper of the moment."""

    def __init__(self, host: Host, folder: Path, engine: VllmServer, socket: str) -> None:
        self.host, self.engine, self.socket, self._folder = host, engine, socket, folder
        self._keeper: subprocess.Popen[bytes] | None = None

    def keep(self, url: str, *options: str) -> None:
        """Start a keeper there, and wait for the engine to find it."""
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", self.socket, "--memory", "256MiB"]
        command += options
        with (self._folder / "keeper.log").open("ab") as log:
            self._keeper = subprocess.Popen(
                self.host.command(*command), stderr=log, env={**os.environ, "KVKEEP_TIERS": url}
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._keeper.poll() is None:
            self.engine.complete([5, 6, 7], 1)
            if self.engine.metric("vllm:kvkeep_attached") == 1:
                return
            time.sleep(0.2)
        log, told = (self._folder / "keeper.log").read_text(), "it has ended"
        if self._keeper.poll() is None:
            told = f"it answers us: {self.status()}"
        raise AssertionError(f"not attached within 60 s to the last of these; {told}\n{log}")

    def leave(self) -> None:
        """End the keeper; it writes what it has to write."""
        if self._keeper is not None:
            self._keeper.terminate()
            self._keeper.wait(60)
            self._keeper = None

    def kill(self) -> None:
        """The keeper is gone, at once."""
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait(60)
            self._keeper = None

    def ask(self, seed: int, length: int = 700) -> tuple[str, float]:
        """The answer without the engine's own cache, and how many tokens were loaded. All is kept by then."""
        self.engine.reset_local_cache()
        before = self.engine.metric("vllm:kvkeep_loaded_tokens_total")
        text = self.engine.complete(prompt(seed, length), 12).text
        deadline = time.monotonic() + 20
        while self._keeper is not None and self.status()["reservations"]:  # the answer may come first
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return text, self.engine.metric("vllm:kvkeep_loaded_tokens_total") - before

    def status(self) -> dict[str, Any]:
        with contextlib.closing(Connection.open(self.socket, "test", timeout=10.0)) as connection:
            return connection.status()

    def tier(self) -> dict[str, Any]:
        return self.status()["tiers"][0]


@pytest.fixture(scope="module")
def sites(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Site]]:  # noqa: F811
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(hosts(2))
        out = []
        for number, host in enumerate(network):
            folder = tmp_path_factory.mktemp(f"host{number}")
            socket = str(folder / "k.sock")
            engine = VllmServer(
                tiny_model,
                # Here a prompt is computed faster than a store answers: load all the same.
                [*ARGS, *connector_args(socket=socket, load="always", probe_wait=5.0)],
                log=folder / "engine.log",
                environ=ENVIRON,
            )
            out.append(Site(host, folder, stack.enter_context(engine), socket))
        yield out
        for site in out:
            site.leave()


@pytest.mark.parametrize("name", TIERS)
def test_hosts_share_a_store(
    name: str, sites: list[Site], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    one, other = sites
    seed = 10 * (1 + TIERS.index(name))
    network = [site.host for site in sites]
    with store(name, network, tmp_path / "store") as shared:
        try:
            for site in sites:
                site.keep(shared.url(site.host))
            cold, nothing = one.ask(seed)
            assert nothing == 0
            wait_until(lambda: one.tier()["stored"] and not one.tier()["waiting_chunks"])
            assert other.ask(seed) == (cold, HIT)
            assert one.ask(seed) == (cold, HIT)
            if shared.remote:
                cut_and_restored(one, other, seed, wait_until)
        finally:
            for site in sites:
                site.host.restore()
                site.leave()


def cut_and_restored(one: Site, other: Site, seed: int, wait_until: Callable[..., None]) -> None:
    new, _ = one.ask(seed + 1)
    wait_until(lambda: not one.tier()["waiting_chunks"])
    other.host.cut()
    # The host that is cut off computes what it lacks, within its deadlines, and serves what it has.
    assert other.ask(seed + 1) == (new, 0)
    cold, loaded = other.ask(seed)
    assert loaded == HIT
    assert one.ask(seed) == (cold, HIT)
    third, _ = other.ask(seed + 2)
    wait_until(lambda: not other.tier()["available"], 60)
    other.host.restore()
    wait_until(lambda: other.tier()["available"] and not other.tier()["waiting_chunks"], 60)
    # What it wrote meanwhile reached the store.
    assert one.ask(seed + 2) == (third, HIT), (one.tier(), other.tier())


@contextlib.contextmanager
def peers(sites: list[Site], folder: Path) -> Iterator[Callable[[Site, Site], None]]:
    """Keepers that read each other, no store between; what it gives starts one anew."""
    token = folder / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    with contextlib.ExitStack() as stack:

        def keep(site: Site, peer: Site) -> None:
            way = Proxy((peer.host.address, 7440), site.host.store)
            stack.callback(way.close)
            url = f"peer://{site.host.store}:{way.port}?token_file={token}&timeout=1s"
            site.keep(url, "--peers", f"{site.host.address}:7440?token_file={token}&plain=yes")

        try:
            keep(sites[0], sites[1])
            keep(sites[1], sites[0])
            yield keep
        finally:
            for site in sites:
                site.host.restore()
                site.leave()


def test_hosts_read_each_other(sites: list[Site], tmp_path: Path, wait_until: Callable[..., None]) -> None:
    """A hit, a cut link, and each keeper killed in turn."""
    one, other = sites
    with peers(sites, tmp_path) as keep:
        cold, nothing = one.ask(90)
        assert nothing == 0
        wait_until(lambda: other.tier()["available"], 60)
        assert other.ask(90) == (cold, HIT)
        cold, _ = other.ask(91)
        wait_until(lambda: one.tier()["available"], 60)
        assert one.ask(91) == (cold, HIT)
        cold, _ = one.ask(92)
        other.host.cut()
        assert other.ask(92) == (cold, 0)
        other.host.restore()
        cold, _ = one.ask(93)
        wait_until(lambda: other.tier()["available"], 60)
        assert other.ask(93) == (cold, HIT)
        cold, _ = one.ask(94)
        one.kill()
        assert other.ask(94) == (cold, 0)
        keep(one, other)
        wait_until(lambda: one.tier()["available"], 60)
        assert one.ask(94) == (cold, HIT)  # of what the other one computed
        other.kill()
        assert one.ask(94) == (cold, HIT)


def test_a_narrow_link_is_cut_while_chunks_come(
    sites: list[Site], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """What has come by then is no prefix of anything yet: all is computed, and the next prompt is read again.

    The last test: the link stays as narrow."""
    one, other = sites
    try:
        other.host.limit("16mbit")
    except Unavailable as error:
        pytest.skip(str(error))
    command = other.host.command("cat", "/sys/class/net/eth0/statistics/rx_bytes")

    def came() -> int:
        return int(subprocess.run(command, check=True, capture_output=True, timeout=20).stdout)

    with peers(sites, tmp_path), ThreadPoolExecutor(1) as pool:
        cold, _ = one.ask(95, LONG)
        wait_until(lambda: other.tier()["available"], 60)
        before = came()
        asked = pool.submit(other.ask, 95, LONG)
        wait_until(lambda: came() > before + (2 << 20), 60)
        assert other.tier()["reading_bytes"] > 0
        other.host.cut()
        text, loaded = asked.result(120)
        assert (text, loaded) == (cold, 0)
        other.host.restore()
        cold, _ = one.ask(96)
        wait_until(lambda: other.tier()["available"], 60)
        assert other.ask(96) == (cold, HIT)
