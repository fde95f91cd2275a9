"""The tier bench with few values: what it prints, with and without fio, and that wrong bytes are noticed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvbench import raw
from kvkeep.cli import main
from kvkeep.pages import address
from kvkeep.tiers import fs as fs_module
from kvkeep.tiers import open as tiers
from kvkeep.tiers.base import Got, Put
from kvkeep.tiers.fs import open_fs
from kvkeep.tiers.wrap import Wrapper

FEW = ["--chunk-bytes", "64KiB", "--count", "9", "--rounds", "2", "--depth", "4", "--rest", "0"]


@pytest.mark.parametrize("program", ["fio", "pread"])
def test_json(
    tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if program == "pread":
        monkeypatch.setattr(raw.shutil, "which", lambda _name: None)
    elif not shutil.which("fio"):
        pytest.skip("no fio here")
    assert main(["bench", "tier", f"fs://{tmp_path}/kv", "--json", *FEW]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["raw_put"].startswith(program)
    assert (printed["chunk_bytes"], printed["count"], printed["verified"]) == (65536, 9, True)
    for name in ("put", "get"):
        assert printed[f"{name}_ratio"] == pytest.approx(
            printed[f"{name}_GBps"] / printed[f"raw_{name}_GBps"]
        )
        assert printed[f"cpu_s_per_GB_{name}"] > 0
    held = [path for path in (tmp_path / "kv").rglob("*") if path.is_file()]
    assert sorted(path.name for path in held) == ["kvkeep.json", "members", "usage", "writers"]


def test_a_full_tier_makes_room_and_is_left_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [word if word != "2" else "9" for word in FEW]
    assert main(["bench", "tier", f"fs://{tmp_path}/kv?capacity=2MiB", "--json", "--full", *few]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]
    assert not [
        path for path in (tmp_path / "kv").rglob("*") if path.is_file() and path.stat().st_size > 60000
    ]


def test_of_several_raw_ways_the_fastest_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Way(raw.Raw):
        def __init__(self, name: str, put: float, get: float) -> None:
            self.name, self.put, self.get = name, lambda: put, lambda: get

        def forget(self) -> None: ...

        def close(self) -> None: ...

    ways = [Way("one socket", 2.0, 4.0), Way("two sockets", 4.0, 2.0)]
    monkeypatch.setitem(raw.RAW, "fs", lambda _url, _tier, _bed: ways)
    assert main(["bench", "tier", f"fs://{tmp_path}/kv", "--json", *FEW]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["raw_put"], printed["raw_get"]) == ("one socket", "two sockets")
    assert printed["raw_put_GBps"] == printed["raw_get_GBps"] == 9 * 65536 / 2.0 / 1e9


def test_a_kind_without_a_raw_medium_and_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(*options: str) -> None:
        assert main(["bench", "tier", f"fs://{tmp_path}/kv", "--json", *FEW, *options]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["raw_put_GBps"] is printed["get_ratio"] is printed["raw_get"] is None

    alone("--no-raw")
    monkeypatch.delitem(raw.RAW, "fs")
    alone()
    assert main(["bench", "tier", f"fs://{tmp_path}/kv", *FEW]) == 0
    assert "put" in capsys.readouterr().out


def test_the_tier_is_told_of_the_memory_that_all_values_lie_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[memoryview] = []
    seen: list[memoryview] = []

    class Told(Wrapper):
        def attach(self, memory: memoryview) -> None:
            told.append(memory)

        def put(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[Put]:
            seen.extend(buffers)
            return super().put(keys, buffers)

        def get(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[Got]:
            seen.extend(buffers)
            return super().get(keys, buffers)

    monkeypatch.setattr(tiers, "_kind", lambda _scheme: lambda url: Told(open_fs(url)))
    assert main(["bench", "tier", f"fs://{tmp_path}/kv", "--no-raw", *FEW]) == 0
    (memory,) = told
    span = range(address(memory), address(memory) + len(memory))
    assert len(seen) == 2 * 3 * 9
    assert all(address(view) in span and address(view) + len(view) - 1 in span for view in seen)


def test_wrong_bytes_and_refusals_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "tier", f"fs://{tmp_path}/small?capacity=256KiB", *FEW]) == 2
    assert "were stored: give it more room" in capsys.readouterr().err
    assert main(["bench", "tier", f"faulty+fs://{tmp_path}/kv?fault_flips=1", *FEW]) == 2
    assert "came back" in capsys.readouterr().err
    monkeypatch.setattr(fs_module, "transfer", lambda _call, _fd, view, _direct: len(view))
    assert main(["bench", "tier", f"fs://{tmp_path}/kv", *FEW]) == 2
    assert "came back" in capsys.readouterr().err


def test_options_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--count", "--rounds", "--depth", "--chunk-bytes"):
        assert main(["bench", "tier", f"fs://{tmp_path}/kv", option, "0"]) == 2
        assert "1 or more" in capsys.readouterr().err
