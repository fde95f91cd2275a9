"""The command: figures for people and for programs; mistakes in one line on stderr, exit code 2."""

import json
import subprocess
import sys

import pytest

from kvkeep import __version__
from kvkeep.cli import main
from kvkeep.identity import tenant_of
from kvkeep.wire import messages as msg


def kvkeep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvkeep.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def keeper(module_keeper_process):
    """A keeper that holds three chunks of one model, of which two were asked for again."""
    keeper = module_keeper_process()
    client = keeper.connect("engine")
    namespace = client.open_namespace(b"\xab" * 32, "llama", [(4096, None)], 1, 1)
    keys = bytes(range(48))
    [done] = client.reserve(namespace, [msg.Reservation(keys, [b"\1" * 3], 0, 0)])
    client.commit(done.reservation, 0)
    client.release(client.lookup(namespace, keys[:32]).lease)
    return keeper


def test_version() -> None:
    done = kvkeep("--version")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"kvkeep {__version__}", "")


def test_status_for_programs(keeper, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--socket", keeper.socket, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pid"] == keeper.process.pid
    assert figures["used_bytes"] == 3 * 4096
    assert figures["counters"]["hit_chunks"] == 2
    assert [space["label"] for space in figures["namespaces"]] == ["llama"]


def test_status_for_people(
    keeper, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["status", "--socket", keeper.socket]) == 0
    out = capsys.readouterr().out
    for said in (f"pid {keeper.process.pid}", "policy lru", "12 KiB of 16 MiB", "100.0 %", "3 stored"):
        assert said in out
    row = next(line for line in out.splitlines() if "llama" in line)
    assert "abababababab" in row
    assert "12 KiB" in row


def test_status_for_people_with_tiers(
    keeper_process, tmp_path, wait_until, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"fs://{tmp_path}/a?capacity=1GiB", f"faulty+fs://{tmp_path}/b?fault_errors=1&fault_verbs=put"]
    keeper = keeper_process("--tier", urls[0], "--tier", urls[1])
    client = keeper.connect("engine")
    namespace = client.open_namespace(b"\xab" * 32, "llama", [(4000, None)], 1, 1)
    [done] = client.reserve(namespace, [msg.Reservation(bytes(range(48)), [b"\1" * 3], 0, 0)])
    client.commit(done.reservation, 0)

    def moved() -> bool:
        one, two = keeper.figures()["tiers"]
        return one["stored"] == 3 and not two["writable"]

    wait_until(moved, 20)
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["status", "--socket", keeper.socket]) == 0
    one, two = (line for line in capsys.readouterr().out.splitlines() if "fs://" in line)
    assert [cell.strip() for cell in one.strip("│").split("│")] == [
        *(urls[0], "on", "0 of 0", "0 B", "12 KiB", *"0000")
    ]
    assert "read only: fault injection: it failed" in two


def test_clear(keeper_process, capsys: pytest.CaptureFixture[str]) -> None:
    keeper = keeper_process()
    client = keeper.connect("engine")
    for number in range(2):
        namespace = client.open_namespace(bytes([number]) * 32, "m", [(4096, None)], 1, 1)
        [done] = client.reserve(namespace, [msg.Reservation(bytes(16), [b"\1"], 0, 0)])
        client.commit(done.reservation, 0)
    client.status()
    assert main(["clear", "--socket", keeper.socket, "--namespace", "1"]) == 0
    assert capsys.readouterr().out == "1 chunks forgotten\n"
    assert client.status()["chunks"] == 1
    assert main(["clear", "--socket", keeper.socket]) == 0
    assert capsys.readouterr().out == "1 chunks forgotten\n"
    assert client.status()["used_bytes"] == 0


def test_a_tenant_by_its_salt(keeper_process, capsys: pytest.CaptureFixture[str]) -> None:
    acme = tenant_of("acme")
    keeper = keeper_process("--tenant-quota", "default=8MiB", "--tenant-quota", f"{acme.hex()}=1MiB")
    client = keeper.connect("engine")
    namespace = client.open_namespace(bytes(32), "m", [(4096, None)], 1, 1)
    items = [msg.Reservation(bytes(16), [b"\1"], 0, 0, acme), msg.Reservation(b"\1" * 16, [b"\1"], 0, 0)]
    for done in client.reserve(namespace, items):
        client.commit(done.reservation, 0)
    client.status()
    where = ["--socket", keeper.socket]
    assert main(["status", *where, "--tenant", "acme"]) == 0
    said = capsys.readouterr().out
    assert acme.hex() in said
    assert "1 MiB" in said
    assert "acme" not in said.replace(acme.hex(), "")
    assert main(["status", *where, "--tenant", "other"]) == 0
    assert f"tenant {tenant_of('other').hex()}: nothing is known" in capsys.readouterr().out
    assert main(["clear", *where, "--tenant", "acme"]) == 0
    assert capsys.readouterr().out == "1 chunks forgotten\n"
    assert client.status()["chunks"] == 1


def test_there_is_nothing_that_compresses_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--namespace", "0"]) == 0
    said = capsys.readouterr()
    assert (said.out, "no codecs yet" in said.err) == ("", True)
    assert main(["compress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"keepers": []}


def test_the_socket_may_come_from_the_environment(
    keeper, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVKEEP_SOCKET", keeper.socket)
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["socket"] == keeper.socket


@pytest.mark.parametrize("number", ["7", "-1"])
def test_a_namespace_that_is_not_there(keeper, capsys: pytest.CaptureFixture[str], number: str) -> None:
    assert main(["clear", "--socket", keeper.socket, f"--namespace={number}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("kvkeep: ")
    assert said.err.count("\n") == 1
    assert keeper.figures()["chunks"] == 3


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["clear"]])
def test_no_keeper(command: list[str], keeper_process, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(keeper_process.directory() / "none.sock")
    assert main([*command, "--socket", path]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"kvkeep: no keeper answers at {path}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "lots"], "not a size: 'lots'"),
        (["--memory", "900TiB"], "more than this machine's"),
        (["--memory", "9" * 20 + "TiB"], "more than this machine's"),
        (["--memory", "1k"], "too small"),
        (["--memory", "16MiB", "--policy", "random"], "choose one of lru, arc, s3fifo"),
        (["--memory", "16MiB", "--prefault", "perhaps"], "prefault='perhaps'"),
        (["--memory", "16MiB", "--linger", "-1"], "linger"),
        (["--memory", "16MiB", "--tenant-quota", "acme=1GiB"], "'acme' is no tenant"),
        (["--memory", "16MiB", "--http", "127.0.0.1:0?cert=cert"], "give a key too"),
        (["--memory", "16MiB", "--socket", "/tmp/" + "x" * 200], "longer than 107 bytes"),
    ],
)
def test_serve_says_what_is_wrong(
    arguments: list[str], said: str, keeper_process, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keeper_process.directory() / "s"
    assert main(["serve", "--socket", str(path), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kvkeep: ")
    assert said in err
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["status", "--colour"], "--colour"),
        (["serve", "--memroy", "1GiB"], "--memroy"),
        (["clear", "--namespace", "all"], "invalid int value"),
        (["bench"], "WHAT"),
    ],
)
def test_what_the_command_does_not_know(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err


def test_an_error_is_no_traceback() -> None:
    done = kvkeep("status", "--socket", "/nonexistent/keeper.sock")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvkeep: no keeper answers")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["serve", "status", "clear", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage: kvkeep" in capsys.readouterr().out
