"""A keeper of a benchmark's own: a real `kvkeep serve`, another process, that ends with the block."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvkeep.errors import KeeperUnavailable
from kvkeep.wire.client import Connection

__all__ = ["own_keeper"]

_ANSWER = 60.0  # seconds


@contextlib.contextmanager
def own_keeper(memory: int, *options: str) -> Iterator[Connection]:
    """A connection to a keeper that was just started, with `memory` bytes and these options of `serve`.

    Raises KeeperUnavailable, with the end of its log, where it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder:
        socket = f"{folder}/keeper.sock"
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", socket, "--memory", str(memory)]
        command += [*options, "--prefault", "no", "--linger", "2"]  # it ends by itself if we are killed
        with (Path(folder) / "log").open("w+") as log:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                with contextlib.closing(_connect(child, socket, log.name)) as connection:
                    yield connection
            finally:
                child.terminate()
                child.wait(10)


def _connect(child: subprocess.Popen[bytes], socket: str, log: str) -> Connection:
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(KeeperUnavailable):
            return Connection.open(socket, f"bench-{os.getpid()}", timeout=_ANSWER)
        time.sleep(0.05)
    raise KeeperUnavailable(f"the bench's keeper did not start: {Path(log).read_text()[-500:]}")
