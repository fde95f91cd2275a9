"""A real Mooncake Store for tests: a master, and nodes that give it memory, as processes of ours."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.tiers.place import free_port

_NODE = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 0, "tcp", "", sys.argv[1]) == 0
print("ready", flush=True)
sys.stdin.read()
"""


class Master:
    """Keeps the books; `port` is its own for good, so that it can be started again."""

    def __init__(self, log: Path) -> None:
        self.port, self._log = free_port(), log
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        found = importlib.util.find_spec("mooncake")
        assert found is not None
        binary = Path(next(iter(found.submodule_search_locations or []))) / "mooncake_master"
        words = [str(binary), f"--rpc_port={self.port}", "--rpc_address=127.0.0.1"]
        words += ["--metrics_host=127.0.0.1", f"--metrics_port={free_port()}"]
        words += ["--default_kv_lease_ttl=2s"]  # not 10, so that tests need not wait for it
        with self._log.open("a") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"mooncake_master does not start: see {self._log}")

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

    def __init__(self, master: str, nbytes: int, log: Path) -> None:
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _NODE, master, str(nbytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self.kill()
            raise RuntimeError(f"a node does not start: see {log}")

    def kill(self) -> None:
        super().kill()
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def client(master: str) -> Any:
    """A client of Mooncake's own, which gives no memory."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 128 << 20, "tcp", "", master) == 0
    return store
