"""Real keepers for tests: started as a user would, ended by pid, in directories that vanish."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kvkeep.errors import KeeperUnavailable
from kvkeep.wire.client import Connection
from tests.pem import Pem, make

settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")

_START = "from kvkeep.cli import main; raise SystemExit(main())"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with engines first: where tests run side by side, the longest file must not begin last."""
    engines = {item.path for item in items if item.get_closest_marker("vllm")}
    longest = ("test_equality.py", "test_preemption.py")
    items.sort(key=lambda item: (item.path not in engines, item.path.name not in longest))


def _wait_until(predicate: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _quiet_after_engines() -> Iterator[None]:
    """An engine in this process gives our loggers its own level and handlers: not for the next test."""
    ours = logging.getLogger("kvkeep")
    level, handlers, propagate = ours.level, list(ours.handlers), ours.propagate
    yield
    ours.setLevel(level)
    ours.handlers[:], ours.propagate = handlers, propagate


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory for sockets, whose paths may have 107 bytes; those of `tmp_path` have the test's name."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as folder:
        yield Path(folder)


class KeeperProcess:
    """One `kvkeep serve` and the connections that a test opened to it."""

    def __init__(self, process: subprocess.Popen[str], socket: str, log: Path) -> None:
        self.process = process
        self.socket = socket
        self.log = log
        self._connections: list[Connection] = []

    def connect(self, session: str = "test", *, timeout: float = 20.0, **shared: bool) -> Connection:
        connection = Connection.open(self.socket, session, timeout=timeout, **shared)
        self._connections.append(connection)
        return connection

    def figures(self) -> dict:
        """Status, by a connection that is gone again before anyone counts."""
        connection = Connection.open(self.socket, "figures", timeout=20.0)
        try:
            return connection.status()
        finally:
            connection.close()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)  # a stopped one would not hear SIGTERM
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


class KeeperFactory:
    """Starts keepers; all of them end, and their files go, with `close`."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def directory(self) -> Path:
        """A new directory with a path short enough for a socket."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvkeep-")))

    def __call__(
        self, *options: str, memory: str = "16MiB", socket: str | None = None, patch: str = ""
    ) -> KeeperProcess:
        """Start one and wait until it answers. `patch`: Python to run before it, to shorten its limits."""
        path = socket or str(self.directory() / "keeper.sock")
        log = self.directory() / "log"
        start = ["-c", f"{patch}\n{_START}"] if patch else ["-m", "kvkeep.cli"]
        command = [sys.executable, *start, "serve", "--socket", path, "--memory", memory, *options]
        with log.open("w") as file:
            process = subprocess.Popen(command, stderr=file, stdout=file, text=True)
        keeper = KeeperProcess(process, path, log)
        self._stack.callback(keeper.close)
        _wait_until(lambda: _answers(keeper))
        return keeper

    def close(self) -> None:
        self._stack.close()


def _answers(keeper: KeeperProcess) -> bool:
    assert keeper.process.poll() is None, keeper.log.read_text()
    try:
        keeper.figures()
    except KeeperUnavailable:
        return False
    return True


def _factory() -> Iterator[KeeperFactory]:
    factory = KeeperFactory()
    try:
        yield factory
    finally:
        factory.close()


keeper_process = pytest.fixture(_factory, name="keeper_process")
module_keeper_process = pytest.fixture(_factory, name="module_keeper_process", scope="module")


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    """Certificates."""
    return make(tmp_path_factory.mktemp("pem"))


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object], float], None]:
    """Poll a predicate until it holds; fail when it does not in time."""
    return _wait_until


class ChildProcess:
    """A Python script with a line-wise conversation: its stdout, and our lines on its stdin."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """Its next line; blocks until there is one, or fails if it ends without."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait(20)}"
        return line.strip()

    def say(self, line: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(20)

    def finish(self) -> int:
        """Wait for its own end."""
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@pytest.fixture
def child_process() -> Iterator[Callable[..., ChildProcess]]:
    """Start scripts as processes of their own; what is left of them is killed."""
    children: list[ChildProcess] = []

    def start(script: str, *arguments: str) -> ChildProcess:
        children.append(ChildProcess(script, *arguments))
        return children[-1]

    yield start
    for child in children:
        child.close()
