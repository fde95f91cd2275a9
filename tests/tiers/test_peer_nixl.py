"""Keepers that read each other by NIXL: real processes, over what UCX takes on one machine, and TCP."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvkeep.tiers.open import open_raw
from kvkeep.tiers.url import TierURL
from tests.tiers.peer_place import CHUNKS, Engine
from tests.tiers.place import free_port

needs_nixl = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("nixl_cu12", "nixl_cu13"))), reason="NIXL is not installed"
)
MEMORY = "256MiB"


@pytest.fixture(params=["all", "tcp"])
def wires(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX may use: anything, or TCP as between hosts without RDMA."""
    if request.param != "all":
        monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


class Pair:
    """A keeper that gives, and one that takes from it by NIXL."""

    def __init__(self, start: Any) -> None:
        self._start, self.port = start, free_port()
        self.give()
        url = f"peer://127.0.0.1:{self.port}?transport=nixl&timeout=2s"
        self.taker = start("--tier", url, memory=MEMORY)
        self.to = Engine(self.taker.connect("engine", arena=True))

    def give(self) -> None:
        """Start the giver, with nothing in it."""
        self.giver = self._start("--peers", f"{self.port}?transport=nixl", memory=MEMORY)
        self.source = Engine(self.giver.connect("engine", arena=True))

    def given(self) -> dict[str, Any]:
        figures: dict[str, Any] = self.giver.figures()["peers"]
        return figures


def under_way(keeper_process: Any) -> Pair:
    """Of four documents one has come, and the others are being read."""
    pair = Pair(keeper_process)
    for document in range(4):
        pair.source.save(document)
    assert pair.to.ask(0) == CHUNKS
    assert 0 not in [pair.to.begin(document) for document in range(1, 4)]
    return pair


@needs_nixl
def test_what_one_holds_the_other_gives(
    keeper_process: Any, wires: str, wait_until: Callable[..., None]
) -> None:
    pair = Pair(keeper_process)
    for document in range(3):
        pair.source.save(document)
    assert [pair.to.ask(document) for document in range(4)] == [CHUNKS] * 3 + [0]
    assert pair.given()["given_chunks"] == 3 * CHUNKS
    wait_until(lambda: not pair.given()["lent_bytes"])
    pair.to.link.clear()
    pair.source.link.clear()
    assert pair.to.ask(0) == 0
    pair.giver.process.send_signal(signal.SIGTERM)
    assert pair.giver.process.wait(20) == 0


@needs_nixl
def test_neither_spins(keeper_process: Any) -> None:
    """NIXL's own progress thread takes a core; ours none to speak of."""
    pair = Pair(keeper_process)
    pair.source.save(0)
    assert pair.to.ask(0) == CHUNKS

    def busy() -> float:
        ticks = 0
        for keeper in (pair.giver, pair.taker):
            fields = Path(f"/proc/{keeper.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def spins() -> bool:
        before = busy()
        time.sleep(2)
        return busy() - before > 0.5

    # A keeper has other work behind a start, in its arena's memory; a thread that spins goes on for ever.
    assert not all(spins() for _ in range(5))


@needs_nixl
def test_nothing_listens_beyond_loopback(keeper_process: Any) -> None:
    pair = Pair(keeper_process)
    for keeper in (pair.giver, pair.taker):
        sockets = {os.readlink(fd) for fd in Path(f"/proc/{keeper.process.pid}/fd").iterdir()}
        for table, loopback in (("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")):
            for row in Path(f"/proc/{keeper.process.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    assert fields[1].startswith(loopback)


@needs_nixl
@pytest.mark.parametrize("which", ["giver", "taker"])
def test_either_is_killed_in_mid_stream(
    keeper_process: Any, wires: str, which: str, wait_until: Callable[..., None]
) -> None:
    pair = under_way(keeper_process)
    time.sleep(0.01)
    victim = pair.giver if which == "giver" else pair.taker
    victim.process.kill()
    victim.process.wait(20)
    if which == "taker":
        wait_until(lambda: not pair.given()["lent_bytes"], 30)
        assert pair.giver.figures()["leases"] == 0
        return
    for document in range(4):
        assert pair.to.ask(document, wait=2.0) <= CHUNKS  # `ask` looks at each byte
    pair.give()
    pair.source.save(9)
    wait_until(lambda: pair.to.ask(9, wait=2.0) == CHUNKS, 60)


@needs_nixl
def test_a_giver_that_stops_and_goes_on(
    keeper_process: Any, wires: str, wait_until: Callable[..., None]
) -> None:
    """Requests give up in time; a read that was under way ends when it can, and writes to nobody's slot."""
    pair = under_way(keeper_process)
    os.kill(pair.giver.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    for document in range(3):
        assert pair.to.ask(document, wait=2.0) <= CHUNKS
    assert time.monotonic() - began < 15
    assert pair.to.ask(0) == CHUNKS
    os.kill(pair.giver.process.pid, signal.SIGCONT)
    wait_until(lambda: pair.to.ask(3, wait=2.0) == CHUNKS, 60)
    assert [pair.to.ask(document) for document in range(3)] == [CHUNKS] * 3


@needs_nixl
def test_a_keeper_without_nixl_is_told_of(keeper_process: Any) -> None:
    giver = keeper_process("--peers", "0", memory=MEMORY)
    source = Engine(giver.connect("engine", arena=True))
    source.save(0)
    url = f"peer://{giver.figures()['peers']['address']}?transport=nixl"
    to = Engine(keeper_process("--tier", url, memory=MEMORY).connect("engine", arena=True))
    assert to.ask(0) == 0
    assert "serve with --peers '…?transport=nixl'" in to.tier()["last_error"]


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkeep.tiers.peer_nixl._PACKAGES", ("no_such_nixl",))
    from kvkeep.errors import ConfigError

    with pytest.raises(ConfigError, match=r"pip install 'kvkeep\[nixl\]'"):
        open_raw(TierURL("peer://127.0.0.1:1?transport=nixl"))
