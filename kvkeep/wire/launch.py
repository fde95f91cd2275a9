"""The embedded keeper: a child process that an adapter starts, and that ends with its engine.

Scheduler and workers of an engine are separate processes and any may come first, so each calls
`ensure_keeper` and one of them, under a file lock, starts the child. The child ends by itself
when its last client is gone, however the engine died.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kvkeep.config import EngineConfig, child_environment, runtime_dir
from kvkeep.errors import CONFIG_EXIT, ConfigError, KeeperUnavailable
from kvkeep.wire.client import Connection

__all__ = ["embedded_socket", "ensure_keeper"]

_LINGER = 5.0
_START_DEADLINE = 20.0


def embedded_socket(engine_id: str) -> str:
    """Socket of the private keeper of one engine instance."""
    name = hashlib.blake2s(engine_id.encode(), digest_size=8).hexdigest()
    return str(runtime_dir() / f"engine-{name}.sock")


def ensure_keeper(socket: str, config: EngineConfig) -> None:
    """Start a keeper on `socket` unless one answers there.

    Returns when it answers. Raises KeeperUnavailable if it does not within 20 s, and ConfigError if
    it refuses its options. The child logs to the engine's standard error.
    """
    path = Path(socket)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        if _alive(socket):
            return
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", socket, "--linger", str(_LINGER)]
        command += ["--memory", str(config.memory), "--policy", config.policy]
        # A session of its own: Ctrl-C at the engine must not end the keeper before the engine.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            # Not as arguments, which everybody on the machine can read: URLs may hold passwords.
            env=child_environment({"KVKEEP_TIERS": " ".join(config.tiers)}),
        )
        _await(child, socket)


def _await(child: subprocess.Popen[bytes], socket: str) -> None:
    deadline = time.monotonic() + _START_DEADLINE
    while time.monotonic() < deadline:
        if _alive(socket):
            return
        if child.poll() == CONFIG_EXIT:
            # No keeper will ever start with these options: the operator must hear of it, at start-up.
            raise ConfigError(
                "the private keeper refuses its options (memory, policy): see its message above"
            )
        if child.poll() is not None:
            raise KeeperUnavailable(f"the private keeper ended with status {child.returncode}; see above")
        time.sleep(0.02)
    child.kill()
    raise KeeperUnavailable(f"the private keeper did not answer within {_START_DEADLINE:g} s")


def _alive(socket: str) -> bool:
    try:
        Connection.open(socket, f"probe-{os.getpid()}").close()
    except KeeperUnavailable:
        return False
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
