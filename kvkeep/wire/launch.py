"""The embedded keeper: a process that an adapter starts, and that ends with its engine.

Scheduler and workers of an engine are separate processes and any may come first, so each calls
`ensure_keeper` and one of them, under a file lock, starts the keeper. It ends by itself when its
last client is gone, however the engine died. It is no descendant of the engine's: an engine that
shuts down kills all of those, and a killed keeper leaves its socket behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvkeep.config import EngineConfig, child_environment, default_socket, runtime_dir
from kvkeep.errors import CONFIG_EXIT, ConfigError, KeeperUnavailable, KVKeepError
from kvkeep.wire.client import Connection
from kvkeep.wire.listen import discard, locked

__all__ = ["embedded_socket", "ensure_keeper"]

log = logging.getLogger("kvkeep.engines")

_LINGER = 5.0
_START_DEADLINE = 20.0
# Between us and the keeper while it starts, to pass on the status that it ends with; ended then, so
# that the keeper is an orphan.
_STARTER = """
import os, sys
pid = os.fork()
if not pid:
    os.execv(sys.argv[1], sys.argv[1:])
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
os._exit(code if code >= 0 else 128 - code)
"""


def embedded_socket(engine_id: str) -> str:
    """Socket of the private keeper of one engine instance."""
    name = hashlib.blake2s(engine_id.encode(), digest_size=8).hexdigest()
    return str(runtime_dir() / f"engine-{name}.sock")


def ensure_keeper(socket: str, config: EngineConfig) -> None:
    """Start a keeper on `socket` unless one answers there.

    Returns when it answers. Raises KeeperUnavailable if it does not within 20 s, ConfigError if it
    refuses its options, and OSError if another process has been starting it for 30 s. The keeper logs to the
    engine's standard error.
    """
    path = Path(socket)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if _alive(socket):
            return
        _sweep(path.parent)
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", socket, "--linger", str(_LINGER)]
        command += ["--memory", str(config.memory), "--policy", config.policy]
        # A session of its own: Ctrl-C at the engine must not end the keeper before the engine.
        with subprocess.Popen(
            [sys.executable, "-c", _STARTER, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # what it says when it refuses
            start_new_session=True,
            # Not as arguments, which everybody on the machine can read: URLs may hold passwords.
            env=child_environment({"KVKEEP_TIERS": " ".join(config.tiers)}),
        ) as starter:
            _await(starter, socket)
    with contextlib.suppress(KVKeepError):
        if _alive(shared := default_socket()):
            said = "kvkeep: a private keeper was started; a shared one answers at %s, with KVKEEP_SOCKET=%s"
            log.warning(said, shared, shared)


def _await(starter: subprocess.Popen[bytes], socket: str) -> None:
    deadline = time.monotonic() + _START_DEADLINE
    while time.monotonic() < deadline:
        if _alive(socket):
            starter.kill()
            starter.wait()
            return
        if starter.poll() == CONFIG_EXIT:
            # No keeper will ever start with these options: the operator must hear of it, at start-up.
            assert starter.stdout is not None
            said = starter.stdout.read().decode(errors="replace").strip()
            raise ConfigError(f"the private keeper refuses its options (memory, policy, tiers): {said}")
        if starter.poll() is not None:
            raise KeeperUnavailable(f"the private keeper ended with status {starter.returncode}; see above")
        time.sleep(0.02)
    os.killpg(starter.pid, signal.SIGKILL)  # its own session: it and the keeper are all there is
    starter.wait()
    raise KeeperUnavailable(f"the private keeper did not answer within {_START_DEADLINE:g} s")


def _sweep(folder: Path) -> None:
    """Remove what private keepers that were killed have left: sockets that refuse, locks that are free."""
    for path in folder.glob("engine-*.sock"):
        with contextlib.suppress(OSError), locked(path.with_suffix(".lock"), wait=False):
            discard(path)
    for path in folder.glob("engine-*.lock"):
        with contextlib.suppress(OSError), locked(path, wait=False):
            pass  # a lock that is let go of is removed


def _alive(socket: str) -> bool:
    try:
        Connection.open(socket, f"probe-{os.getpid()}").close()
    except KeeperUnavailable:
        return False
    return True
