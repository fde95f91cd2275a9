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
    monkeypatch.setattr(
        sys, "argv", ["x", "--dry", "--json", str(out), "--ttft", "tests.test_gpu_check:more"]
    )
    assert script.main() == 0
    figures = json.loads(out.read_text())
    assert figures["wrong"] == 0
    told = [row["what"].split(",")[0].split(":")[0] for row in figures["rows"]]
    assert {"ceiling", "registration", "LBNHC", "BLHNC", "load of 16 KiB pieces", "overlap", "more"} <= set(
        told
    )
    assert all(row["equal"] for row in figures["rows"] if "save_ratio" in row)


def more(device: torch.device, seconds: float, dry: bool) -> list[dict[str, object]]:
    """What `--ttft` takes."""
    assert device.type == "cpu"
    return [{"what": "more", "seconds": seconds, "dry": dry}]


def test_wrong_bytes_are_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(CudaTransfer, "_load", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["x", "--dry"])
    assert script.main() == 1
    assert "WRONG" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    assert script.main() == 2
    assert "no GPU here" in capsys.readouterr().err
