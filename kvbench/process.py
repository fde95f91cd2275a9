"""A server as a child process in a process group of its own, which ends with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from kvkeep.config import child_environment
from kvkeep.errors import KVKeepError

__all__ = ["EngineFailed", "ServerProcess", "ended", "free_port", "signal_group", "tail", "without_passwords"]

_START_S = 240.0
_STOP_S, _KILL_S = 20.0, 5.0


_S = TypeVar("_S", bound="ServerProcess")


class EngineFailed(KVKeepError):
    """A server did not start or did not answer; the message ends with its log's last lines."""


class ServerProcess:
    """A command that runs until the `with` block is left, however that is; entered once `ready` says so.

    `ready` is asked several times a second; `log` gets what the command prints, after what it holds.
    Raises EngineFailed where the command ends first, or is not ready within `start_s` seconds.
    """

    def __init__(
        self,
        command: Sequence[str],
        ready: Callable[[], bool],
        *,
        log: Path,
        name: str,
        environ: Mapping[str, str] | None = None,
        start_s: float = _START_S,
        stop_s: float | None = None,
    ) -> None:
        self.log, self.name = log, name
        self._command, self._ready, self._environ = list(command), ready, dict(environ or {})
        self._start_s, self._stop_s = start_s, stop_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self: _S) -> _S:
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=child_environment(self._environ),
                    start_new_session=True,
                )
            except OSError as error:
                raise EngineFailed(f"{self.name} cannot be started: {error}") from error
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids of the server and its descendants, without Python's resource tracker."""
        assert self._process is not None
        found = [self._process.pid, *_descendants(self._process.pid)]
        return [pid for pid in found if not _is_tracker(pid)]

    @property
    def status(self) -> int | None:
        """Exit status, once it has ended by itself."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """End the server and all its processes: asked first, killed after a while.

        Python's resource tracker is left to end by itself: when the others are gone it removes what
        they have left in /dev/shm.
        """
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        if not ended(process.pid, _STOP_S if self._stop_s is None else self._stop_s):
            for pid in _members(process.pid):
                if not _is_tracker(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if not ended(process.pid, _KILL_S):
                signal_group(process.pid, signal.SIGKILL)
        process.wait(20)

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            if self.status is not None:
                raise EngineFailed(f"{self.name} ended at start with status {self.status}; {tail(self.log)}")
            if self._ready():
                return
            time.sleep(0.1)
        raise EngineFailed(f"{self.name} was not ready within {self._start_s:g} s; {tail(self.log)}")


def tail(log: Path, lines: int = 15) -> str:
    """A log's last lines, for a message."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * lines))
        last = file.read().decode(errors="replace").splitlines()[-lines:]
    return "its log ends with:\n" + without_passwords("\n".join(last))


def without_passwords(text: str) -> str:
    """Text whose URLs have none."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(group: int, seconds: float) -> bool:
    """Wait until nobody of a process group runs any more; False if that takes longer."""
    deadline = time.monotonic() + seconds
    while _members(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def signal_group(group: int, number: int) -> None:
    """Send a signal to all of a process group that is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _members(group: int) -> list[int]:
    """Processes of a process group that still run. An engine's group is its own: nobody else is in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(folder.name))
    return found


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
