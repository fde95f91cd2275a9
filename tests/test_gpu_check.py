"""`make gpu-check` runs here too, without a GPU: so that it does when there is one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from kvkeep.transfer.cuda import CudaTransfer

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SHAPES = module.SHAPES[:3]
    return module


def test_a_dry_run_shows_every_part(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["x", "--dry", "--json", str(out)])
    assert script.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[-1] == {"what": "wrong", "count": 0}
    told = [row["what"].split(",")[0].split(":")[0] for row in rows]
    assert set(told) >= {
        *("machine", "ceiling", "registration", "LBNHC", "BLHNC", "load of 16 KiB pieces", "overlap"),
        *("kernel with PROGRAMS 8", "kernel with _WORDS 512", "kernel with _WARPS 8"),
        *("load of 16 pieces", "submitted behind a forward", "graphs captured beside a registration"),
        "time to first token",
        *(f"waits in one step with a {one} (the profiler's own end adds one)" for one in ("load", "save")),
    }
    assert all(row["equal"] for row in rows if "equal" in row)

    first = [row for row in rows if row["what"].startswith("time to first token")]
    assert [(row["tokens"], "disk_s" in row) for row in first] == [
        *((500, False), (800, False), (500, True), (800, True))
    ]
    assert all(row["same_token"] and row["pinned"] == 1 for row in first)
    assert all(row["loaded_bytes"] > 0 for row in first[:2])


@pytest.mark.parametrize("lacking", ["seconds", "memory", "memory after all"])
def test_counts_that_do_not_fit_are_left_out(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks.gpu import ttft

    left, first_token = iter([1 << 30, 1 << 30, 0]), ttft.first_token  # for the weights and the first count

    def out_of_memory(model, ids, cache):
        if ids.shape[1] == 800:
            raise torch.OutOfMemoryError("no more")
        return first_token(model, ids, cache)

    if lacking == "memory":
        monkeypatch.setattr(ttft, "room", lambda device: next(left))
    if lacking == "memory after all":
        monkeypatch.setattr(ttft, "first_token", out_of_memory)
    rows = list(ttft.gpu_rows(torch.device("cpu"), -1.0 if lacking == "seconds" else 600.0, dry=True))
    found = {"seconds": [None], "memory": [500, 500, None], "memory after all": [500, None, None]}
    assert [row.get("tokens") for row in rows] == found[lacking]
    assert rows[-1]["left_out"] == ("500, 800" if lacking == "seconds" else "800")


def test_what_time_to_first_token_lacks_takes_no_other_figure_away(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(script, "SHAPES", ())
    monkeypatch.setattr(sys, "argv", ["x", "--dry", "--ttft", "benchmarks.gpu.missing:rows"])
    assert script.main() == 0
    assert "failed ModuleNotFoundError: No module named 'benchmarks.gpu.missing'" in capsys.readouterr().out


def test_a_table_that_saves_and_loads_share_hides_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Blocks saved to and loaded from wrong places come back as they were."""
    places = CudaTransfer._places

    def swapped(self, group, offsets, blocks, *pieces):
        return places(self, group, offsets, blocks[::-1], *pieces)

    monkeypatch.setattr(CudaTransfer, "_places", swapped)
    monkeypatch.setattr(sys, "argv", ["x", "--dry", "--ttft", ""])
    assert script.main() == 1
    assert "WRONG" in capsys.readouterr().err


def test_wrong_bytes_are_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(CudaTransfer, "_load", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["x", "--dry", "--ttft", ""])
    assert script.main() == 1
    assert "WRONG" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    assert script.main() == 2
    assert "no GPU here" in capsys.readouterr().err
