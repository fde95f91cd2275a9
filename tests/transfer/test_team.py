"""Copies by an engine's own OpenMP threads."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kvkeep.transfer import team
from kvkeep.transfer.cpu import copy_pieces

PIECES, PIECE = 700, 4096 + 96  # with a rest behind the last 128 bytes


@pytest.fixture(autouse=True)
def shared_from_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_SHARED_FROM", 0)


def copied(threads: int) -> None:
    """Pieces at chance places, none of which may touch its neighbours."""
    draw = np.random.default_rng(threads)
    source = draw.integers(1, 256, (PIECES, PIECE), np.uint8)
    target = np.zeros((2 * PIECES + 1, PIECE), np.uint8)
    places = draw.permutation(2 * PIECES)[:PIECES].astype(np.int64)
    sizes = draw.integers(PIECE // 2, PIECE + 1, PIECES)
    rows = source.ctypes.data + np.arange(PIECES, dtype=np.int64) * PIECE
    team.share(copy_pieces(), target.ctypes.data + places * PIECE, rows, sizes, threads)
    expected = np.zeros_like(target)
    for place, size, row in zip(places, sizes, source, strict=True):
        expected[place, :size] = row[:size]
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7])
def test_every_piece_comes_to_its_place(threads: int) -> None:
    assert team._tried(copy_pieces()) is not None
    copied(threads)


@pytest.mark.parametrize("threads", [0, 2, 3, 7])
def test_the_team_stays_as_it_is(threads: int) -> None:
    """The one that torch computes with: a region of another size would end threads of it, or start some that
    are not where the engine has bound its own."""

    def alive() -> set[str]:
        torch.ones(1 << 20).add_(1)
        return set(os.listdir("/proc/self/task"))

    assert team._tried(copy_pieces()) is not None
    many = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        before = alive()
        copied(threads)
        assert set(os.listdir("/proc/self/task")) == before
        assert alive() == before
    finally:
        torch.set_num_threads(many)


def test_few_bytes_are_copied_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_SHARED_FROM", PIECES * PIECE + 1)
    monkeypatch.setattr(team, "_tried", lambda _: pytest.fail("asked for the team"))
    copied(0)


def test_another_thread_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The team is the main thread's; another one would have a second made for itself."""
    monkeypatch.setattr(team, "_tried", lambda _: pytest.fail("asked for the team"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(copied, 0).result(60)


@pytest.mark.parametrize("without", ["runtime", "a copy that works"])
def test_without_openmp_one_thread_copies(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "runtime":
        monkeypatch.setattr(team, "_runtime", lambda: None)
    else:
        monkeypatch.setattr(team, "_works", lambda _: False)
    team.compiled.cache_clear()
    team._tried.cache_clear()
    try:
        assert team._tried(copy_pieces()) is None
        copied(0)
    finally:
        team.compiled.cache_clear()
        team._tried.cache_clear()


def test_a_runtime_that_only_this_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's is not among the process's global names, it is found by what is mapped."""
    real = ctypes.CDLL

    def named_only(name: str | None, *args: int, **more: int) -> object:
        return object() if name is None else real(name, *args, **more)

    monkeypatch.setattr(ctypes, "CDLL", named_only)
    found = team._runtime()
    assert found is not None
    assert found.omp_get_max_threads() == torch.get_num_threads()
