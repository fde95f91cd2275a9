"""A real Mooncake Store for tests: a master, and nodes that give it memory, as processes of ours."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.tiers.place import free_port


def binary(name: str) -> str:
    """A program of the package's own (those in bin/ fork)."""
    found = importlib.util.find_spec("mooncake")
    assert found is not None
    return str(Path(next(iter(found.submodule_search_locations or []))) / name)


class Master:
    """Keeps the books; `port` is its own for good, so that it can be started again."""

    def __init__(self, log: Path, host: str = "127.0.0.1") -> None:
        self.host, self.port, self._log = host, free_port(), log
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        words = [binary("mooncake_master"), f"--rpc_port={self.port}", f"--rpc_address={self.host}"]
        words += ["--metrics_host=127.0.0.1", f"--metrics_port={free_port()}"]
        words += ["--default_kv_lease_ttl=2s"]  # not 10, so that tests need not wait for it
        self._run(words)

    def _run(self, words: list[str]) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection((self.host, self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"{words[0]} does not start: see {self._log}")

    def stop(self) -> None:
        """SIGSTOP: it hangs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Node(Master):
    """A process whose memory the store uses."""

    def __init__(self, master: str, nbytes: int, log: Path, host: str = "127.0.0.1") -> None:
        self._words = [binary("mooncake_client"), f"--master_server_address={master}", f"--host={host}"]
        self._words += ["--metadata_server=P2PHANDSHAKE", f"--global_segment_size={nbytes >> 20}MB"]
        super().__init__(log, host)

    def start(self) -> None:
        self._run([*self._words, f"--port={self.port}"])


def client(master: str) -> Any:
    """A client of Mooncake's own, which gives no memory."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 128 << 20, "tcp", "", master) == 0
    return store
