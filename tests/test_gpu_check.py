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
    figures = json.loads(out.read_text())
    assert figures["wrong"] == 0
    told = [row["what"].split(",")[0].split(":")[0] for row in figures["rows"]]
    assert set(told) >= {
        *("ceiling", "registration", "LBNHC", "BLHNC", "load of 16 KiB pieces", "overlap"),
        *("kernel with PROGRAMS 8", "kernel with _WORDS 512", "load of 16 pieces"),
        *("submitted behind a forward", "time to first token"),
        *(f"waits in one step with a {one} (the profiler's own end adds one)" for one in ("load", "save")),
    }
    assert all(row["equal"] for row in figures["rows"] if "save_ratio" in row)

    first = [row for row in figures["rows"] if row["what"].startswith("time to first token")]
    assert [row["tokens"] for row in first] == [500, 800], first
    assert all(row["same_token"] and row["loaded_bytes"] > 0 for row in first)


@pytest.mark.parametrize("lacking", ["seconds", "memory"])
def test_counts_that_do_not_fit_are_left_out(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks.gpu import ttft

    left = iter([1 << 30, 1 << 30, 0])  # of the device: for the weights and the first count
    if lacking == "memory":
        monkeypatch.setattr(ttft, "room", lambda device: next(left))
    rows = list(ttft.gpu_rows(torch.device("cpu"), 0.0 if lacking == "seconds" else 600.0, dry=True))
    assert [row.get("tokens") for row in rows] == ([None] if lacking == "seconds" else [500, None])
    assert rows[-1]["left_out"] == ("500, 800" if lacking == "seconds" else "800")


def test_what_time_to_first_token_lacks_takes_no_other_figure_away(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(script, "SHAPES", ())
    monkeypatch.setattr(sys, "argv", ["x", "--dry", "--ttft", "benchmarks.gpu.missing:rows"])
    assert script.main() == 0
    assert "failed ModuleNotFoundError: No module named 'benchmarks.gpu.missing'" in capsys.readouterr().out


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
