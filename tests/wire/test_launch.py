"""The private keeper: one for an engine, however many processes ask, and gone when they are."""

import fcntl
import os
import socket as sockets
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.config import EngineConfig
from kvkeep.errors import KeeperUnavailable
from kvkeep.wire import launch, listen

ENGINE = """
import sys
from kvkeep.config import EngineConfig
from kvkeep.wire import launch, listen
from kvkeep.wire.client import Connection

launch._LINGER = float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
launch.ensure_keeper(sys.argv[1], EngineConfig(memory=16 << 20))
connection = Connection.open(sys.argv[1], "engine", timeout=30.0)
print(connection.status()["pid"], flush=True)
sys.stdin.readline()
connection.close()
"""


@pytest.fixture
def socket(keeper_process):
    """A path for a private keeper; whatever serves it at the end of a test is killed, by its pid."""
    path = str(keeper_process.directory() / "private" / "engine.sock")
    yield path
    for pid in servers(path):
        os.kill(pid, 9)


def servers(path: str) -> list[int]:
    """Processes that were started to serve this socket and still run (a zombie has no command line)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if path.encode() in words and b"serve" in words:
                found.append(int(entry.name))
    return found


def gone(path: str) -> bool:
    """Whether nobody serves it and nothing is left: no socket, no lock."""
    return not servers(path) and not any(Path(path).parent.iterdir())


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found


def dead_socket(path: Path) -> Path:
    """What a keeper leaves that was killed."""
    with sockets.socket(sockets.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def test_processes_that_start_at_once_share_one_keeper(socket: str, child_process, wait_until) -> None:
    engines = [child_process(ENGINE, socket, "0.5") for _ in range(4)]
    for engine in engines:
        assert engine.line() == "ready"
    for engine in engines:
        engine.say()
    pids = {int(engine.line()) for engine in engines}
    assert list(pids) == servers(socket)
    for engine in engines[1:]:
        engine.say()
        assert engine.finish() == 0
    engines[0].say()
    assert engines[0].finish() == 0
    wait_until(lambda: gone(socket))


def test_the_keeper_ends_when_its_engine_was_killed(socket: str, child_process, wait_until) -> None:
    engine = child_process(ENGINE, socket, "0.5")
    engine.say()
    assert engine.line() == "ready"
    pid = int(engine.line())
    assert servers(socket) == [pid]
    engine.kill()
    wait_until(lambda: gone(socket))


def test_the_keeper_is_no_descendant_of_its_engine(socket: str, child_process, wait_until) -> None:
    """vLLM kills all of those when it shuts down: the keeper is to end by itself, and clean up."""
    engine = child_process(ENGINE, socket, "0.5")
    engine.say()
    assert engine.line() == "ready"
    pid = int(engine.line())
    assert os.getpid() in ancestors(engine.pid)
    assert not {os.getpid(), engine.pid} & set(ancestors(pid))
    assert not any(Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split())
    engine.kill()
    wait_until(lambda: gone(socket))


def test_what_dead_keepers_left_is_swept_at_the_next_start(
    keeper_process, socket: str, child_process, wait_until
) -> None:
    folder = Path(socket).parent
    folder.mkdir()
    living = keeper_process(socket=str(folder / "engine-living.sock"))
    dead = [dead_socket(folder / f"engine-dead{number}.sock") for number in range(2)]
    for name in ("engine-dead0.lock", "engine-dead0.sock.lock", "engine-none.lock"):
        (folder / name).touch()
    starting = dead_socket(folder / "engine-starting.sock")
    lock = starting.with_suffix(".lock")
    not_private = dead_socket(folder / "keeper.sock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        engine = child_process(ENGINE, socket, "0.5")
        engine.say()
        assert engine.line() == "ready"
        engine.line()
    assert not any(path.exists() for path in dead)
    kept = {Path(living.socket), starting, lock, not_private, Path(socket)}
    assert set(folder.iterdir()) == kept
    assert living.figures()["keeper"]


@pytest.mark.parametrize(
    ("script", "status"), [("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_starter_ends_as_the_keeper_did(script: str, status: int) -> None:
    command = [sys.executable, "-c", launch._STARTER, sys.executable, "-c", script]
    assert subprocess.run(command, timeout=60, check=False).returncode == status


def test_a_killed_keeper_is_started_anew(socket: str, child_process, wait_until) -> None:
    first, second = child_process(ENGINE, socket, "0.5"), child_process(ENGINE, socket, "0.5")
    first.say()
    assert first.line() == "ready"
    pid = int(first.line())
    os.kill(pid, 9)
    wait_until(lambda: not servers(socket))
    second.say()
    assert second.line() == "ready"
    successor = int(second.line())
    assert [successor] == servers(socket) != [pid]


def test_the_keeper_stays_while_a_client_does(socket: str, child_process, wait_until) -> None:
    """Idle, not unused, is what ends it: its linger is shorter than two looks of this test."""
    engine = child_process(ENGINE, socket, "0.01")
    engine.say()
    assert engine.line() == "ready"
    pid = int(engine.line())
    other = child_process(ENGINE, socket, "0.01")
    other.say()
    assert other.line() == "ready"
    assert int(other.line()) == pid
    other.say()
    assert other.finish() == 0
    third = child_process(ENGINE, socket, "0.01")
    third.say()
    assert third.line() == "ready"
    assert int(third.line()) == pid


def test_options_that_no_keeper_takes_are_an_error_not_an_outage(keeper_process) -> None:
    script = """
import sys
from kvkeep.config import EngineConfig
from kvkeep.errors import ConfigError
from kvkeep.wire.launch import ensure_keeper
try:
    ensure_keeper(sys.argv[1], EngineConfig(memory=1000))
except ConfigError as error:
    print(error)
"""
    path = keeper_process.directory() / "s"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "refuses its options" in done.stdout
    assert "too small" in done.stdout, "a log collector may not show the keeper's own message beside it"
    assert "too small" in done.stderr
    assert not path.exists()


def test_who_starts_a_private_keeper_hears_of_the_shared_one(
    keeper_process, monkeypatch: pytest.MonkeyPatch, socket: str
) -> None:
    said = list[str]()
    monkeypatch.setattr(launch.log, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.delenv("KVKEEP_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(keeper_process.directory()))
    launch.ensure_keeper(socket, EngineConfig(memory=16 << 20))
    assert said == []
    os.kill(servers(socket)[0], 9)
    shared = keeper_process(socket=launch.default_socket()).socket
    launch.ensure_keeper(f"{socket}2", EngineConfig(memory=16 << 20))
    launch.ensure_keeper(f"{socket}2", EngineConfig(memory=16 << 20))
    os.kill(servers(f"{socket}2")[0], 9)
    assert [f"KVKEEP_SOCKET={shared}" in text for text in said] == [True], "once"


def test_a_starter_that_stands_still_does_not_hold_up_others(
    socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped, or hangs, with the lock that says who starts the keeper."""
    monkeypatch.setattr(launch, "locked", lambda path: listen.locked(path, 0.1))
    lock = Path(socket).with_suffix(".lock")
    lock.parent.mkdir()
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process holds"):
            launch.ensure_keeper(socket, EngineConfig())
    assert not servers(socket)


def test_a_keeper_that_answers_is_used(keeper_process) -> None:
    keeper = keeper_process()
    launch.ensure_keeper(keeper.socket, EngineConfig())
    assert servers(keeper.socket) == [keeper.process.pid]


def test_each_engine_has_a_socket_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    one, two = launch.embedded_socket("engine-1"), launch.embedded_socket("engine-2")
    assert one != two
    assert one == launch.embedded_socket("engine-1")
    assert launch.embedded_socket("x" * 1000).startswith("/run/user/1/kvkeep/engine-")
    assert len(launch.embedded_socket("x" * 1000)) == len(one)


def test_what_is_not_started_is_not_waited_for_in_vain(monkeypatch, wait_until) -> None:
    """A keeper that neither answers nor ends is killed, and who started it."""
    monkeypatch.setattr(launch, "_START_DEADLINE", 0.5)
    monkeypatch.setattr(launch, "_alive", lambda socket: False)
    name = f"serve {os.getpid()}"
    command = [sys.executable, "-c", launch._STARTER, sys.executable, "-c", "input()", "serve", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as starter:
        wait_until(lambda: len(servers(name)) == 2)
        with pytest.raises(KeeperUnavailable, match="did not answer"):
            launch._await(starter, name)
        assert starter.returncode == -9
        wait_until(lambda: not servers(name))
