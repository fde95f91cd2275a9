"""Two keepers, each on a host of its own, one reading the other: hits, a cut link, deaths, both ways."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.network import Unavailable
from kvkeep.errors import KeeperUnavailable
from kvkeep.wire.client import Connection
from tests.hosts.network import Host, hosts
from tests.tiers.peer_place import CHUNKS, Engine
from tests.tiers.place import Proxy
from tests.tiers.test_peer_nixl import needs_nixl

PORT = 7440


class Here:
    """This machine, at the other end of every link."""

    def command(self, *words: str) -> list[str]:
        return list(words)


class Site:
    """A keeper on one host, and an engine that writes and reads real bytes."""

    def __init__(self, host: Host | Here, folder: Path, token: Path) -> None:
        folder.mkdir()
        self.host, self.socket, self._log = host, str(folder / "k.sock"), folder / "log"
        self._token = token
        self.way = 0
        self._keeper: subprocess.Popen[bytes] | None = None

    def keep(self, way: int) -> None:
        """`way`: port of the store's host at which the other one's keeper is reached from here."""
        assert isinstance(self.host, Host)
        tier = f"peer://{self.host.store}:{way}?token_file={self._token}&timeout=1s"
        self.start(
            "--peers", f"{self.host.address}:{PORT}?token_file={self._token}&plain=yes", "--tier", tier
        )

    def start(self, *options: str) -> None:
        """A keeper with these options, and its engine."""
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", self.socket, "--memory", "128MiB"]
        with self._log.open("ab") as log:
            self._keeper = subprocess.Popen(self.host.command(*command, *options), stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(KeeperUnavailable):
                self.engine = Engine(Connection.open(self.socket, "engine", arena=True, timeout=20.0))
                break
            assert self._keeper.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def peers(self) -> dict[str, Any]:
        """What the keeper says of its peers."""
        figures: Any = self.engine.link.status()
        return figures["peers"]

    def kill(self, how: int = signal.SIGKILL) -> None:
        """End the keeper; `ip netns exec` becomes what it runs."""
        if self._keeper is not None:
            self.engine.link.close()
            os.kill(self._keeper.pid, how)
            self._keeper.wait(60)
            self._keeper = None


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[list[Site]]:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    with hosts(2) as network:
        out = []
        for number, host in enumerate(network):
            out.append(Site(host, tmp_path / str(number), token))
        ways = [
            Proxy((to.address, PORT), here.store) for here, to in zip(network, network[::-1], strict=True)
        ]
        for site, proxy in zip(out, ways, strict=True):
            site.way = proxy.port
            site.keep(site.way)
        yield out
        for site in out:
            site.host.restore()
            site.kill()
        for proxy in ways:
            proxy.close()


def test_what_one_holds_the_other_gives_both_ways(sites: list[Site], wait_until: Callable[..., None]) -> None:
    one, other = sites
    one.engine.save(1)
    other.engine.save(2)
    wait_until(lambda: one.engine.tier()["available"] and other.engine.tier()["available"], 40)
    assert other.engine.ask(1) == CHUNKS
    assert one.engine.ask(2) == CHUNKS
    assert one.engine.ask(3) == 0
    assert other.engine.tier()["hits"] == CHUNKS
    assert other.engine.tier()["put_bytes"] == 0


def test_a_cut_link_and_its_mending(sites: list[Site], wait_until: Callable[..., None]) -> None:
    one, other = sites
    for document in range(1, 4):
        one.engine.save(document)
    wait_until(lambda: other.engine.tier()["available"], 40)
    assert other.engine.ask(1) == CHUNKS
    other.host.cut()
    began = time.monotonic()
    assert other.engine.ask(2, wait=2.0) == 0
    assert time.monotonic() - began < 10
    assert other.engine.ask(1) == CHUNKS  # what came before the cut is here
    wait_until(lambda: not other.engine.tier()["available"] or other.engine.ask(2, wait=1.0) < 0, 60)
    other.host.restore()
    wait_until(lambda: other.engine.tier()["available"], 60)
    wait_until(lambda: other.engine.ask(3) == CHUNKS, 20)


@pytest.mark.parametrize("which", ["giver", "taker"])
def test_either_keeper_is_killed_in_mid_stream(
    sites: list[Site], which: str, wait_until: Callable[..., None]
) -> None:
    one, other = sites
    for document in range(3):
        one.engine.save(document)
    wait_until(lambda: other.engine.tier()["available"], 40)
    assert 0 not in [other.engine.begin(document) for document in range(3)]
    victim, left = (one, other) if which == "giver" else (other, one)
    time.sleep(0.02)
    victim.kill()
    if which == "giver":
        for document in range(3):
            assert left.engine.ask(document, wait=2.0) <= CHUNKS  # `ask` looks at each byte
    wait_until(lambda: not left.peers()["lent_bytes"], 30)
    assert left.engine.ask(0, wait=2.0) in range(CHUNKS + 1)
    victim.keep(victim.way)
    if which == "giver":
        victim.engine.save(7)
        wait_until(lambda: left.engine.ask(7) == CHUNKS, 60)
    else:
        wait_until(lambda: victim.engine.ask(0) == CHUNKS, 60)


@needs_nixl
def test_a_link_is_cut_while_nixl_reads(
    tmp_path: Path, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being read cannot be called back; requests, the other tier and the keeper go on meanwhile."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    with hosts(1) as (host,), contextlib.ExitStack() as stack:
        try:
            host.limit("200mbit")  # a second for a document
        except Unavailable as error:
            pytest.skip(str(error))
        giver, taker = Site(Here(), tmp_path / "giver", token), Site(host, tmp_path / "taker", token)
        for site in (giver, taker):
            stack.callback(site.kill)
        at = f"{host.store}:{PORT}?token_file={token}&plain=yes&transport=nixl&device="
        giver.start("--peers", f"{at}{host.link}")
        taker.start(
            "--tier",
            f"peer://{at}eth0&timeout=1s",
            "--tier",
            f"fs://{tmp_path}/fs?capacity=1GiB&write=through",
        )
        for document in range(1, 5):
            giver.engine.save(document)
        wait_until(lambda: taker.engine.tier()["available"], 40)
        assert taker.engine.ask(1) == CHUNKS
        for document in range(10, 16):  # more than memory holds
            taker.engine.save(document)
        wait_until(lambda: taker.engine.link.status()["tiers"][1]["stored"] >= 6 * CHUNKS, 60)
        assert taker.engine.begin(2)
        wait_until(lambda: taker.engine.tier()["reading_bytes"], 20)
        host.cut()
        assert taker.engine.ask(3, wait=2.0) == 0
        assert taker.engine.tier()["reading_bytes"] > 0
        assert taker.engine.ask(10) == CHUNKS  # from the directory
        taker.engine.save(20)
        assert taker.engine.ask(20) == CHUNKS
        host.restore()
        wait_until(lambda: taker.engine.ask(4, wait=2.0) == CHUNKS, 90)
        wait_until(lambda: not taker.engine.tier()["reading_bytes"], 60)
        wait_until(lambda: not giver.peers()["lent_bytes"], 90)
