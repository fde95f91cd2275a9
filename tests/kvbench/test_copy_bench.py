"""The copy bench at a tiny size: what it prints, and that it would notice wrong bytes."""

import json

import pytest
import torch

from kvbench import copy as bench
from kvkeep.cli import main
from kvkeep.errors import KVKeepError
from kvkeep.transfer.reference import ReferenceTransfer

TINY = bench.Geometry("tiny", 2, 3, 8, 4)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_json(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "copy", "--json", "--repeat", "2", "--size", "1MiB", "--threads", threads]) == 0
    printed = json.loads(capsys.readouterr().out)
    cases = printed["cases"]
    assert [(case["name"], case["direction"]) for case in cases] == [
        (geometry.name, direction) for geometry in bench.GEOMETRIES for direction in ("save", "load")
    ]
    assert all(case["bytes"] > 0 and case["seconds"] > 0 and case["memcpy_GBps"] > 0 for case in cases)
    assert printed["worst_ratio"] == min(case["ratio"] for case in cases)
    assert [case["block_bytes_per_layer"] for case in cases[::2]] == [12288, 98304, 65536, 524288]


def test_the_table_has_the_reference_beside_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "GEOMETRIES", (TINY,))
    assert main(["bench", "copy", "--repeat", "1", "--size", "64KiB"]) == 0
    printed = capsys.readouterr().out
    assert "reference" in printed
    assert "tiny" in printed


def test_threads_of_torch_are_left_as_they_were(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "GEOMETRIES", (TINY,))
    before = torch.get_num_threads()
    main(["bench", "copy", "--json", "--repeat", "1", "--size", "64KiB", "--threads", str(before + 1)])
    capsys.readouterr()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("direction", ["save", "load"])
def test_one_wrong_byte_is_noticed(direction: str) -> None:
    bed = bench.Bed(TINY, 64 << 10)
    bed.fill(torch.Generator().manual_seed(1))
    with pytest.raises(KVKeepError, match="differ"):
        bed.verify()
    transfer = ReferenceTransfer([bed.layers], bed.num_blocks, bed.arena)
    bed.mover(transfer, direction)()
    bed.verify()
    bed.slots[-1] ^= 1
    with pytest.raises(KVKeepError, match=r"layer\.1"):
        bed.verify()


def test_memcpy_copies_all_bytes_between_the_same_ends() -> None:
    bed = bench.Bed(TINY, 64 << 10)
    bed.memcpy("save", None, 1)()
    assert (bed.slots == 1).all()
    bed.slots[:] = 7
    bed.memcpy("load", None, 1)()
    assert int((bed.flat == 7).sum()) == bed.nbytes


@pytest.mark.parametrize("option", ["--threads", "--repeat"])
def test_options_out_of_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "copy", option, "0"]) == 2
    assert "1 or more" in capsys.readouterr().err
