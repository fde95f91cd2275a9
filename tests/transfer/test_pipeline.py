"""Loads beside an engine, and in which order layers are asked for."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from kvkeep.transfer import pipeline
from kvkeep.transfer.base import Move
from kvkeep.transfer.pipeline import LayerOrder, load_beside
from kvkeep.transfer.reference import ReferenceTransfer


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
def test_a_load_beside_is_whole_and_gives_way_between_its_pieces(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = list[float]()
    monkeypatch.setattr(pipeline, "_PIECE", piece)
    monkeypatch.setattr(pipeline, "GiveWay", lambda seconds: lambda: pauses.append(seconds))
    groups = [[("a", torch.randn(9, 64)), ("b", torch.randn(9, 64))], [("c", torch.randn(9, 32))]]
    before = [[tensor.clone() for _, tensor in group] for group in groups]
    transfer, moves = ReferenceTransfer(groups, 9, mmap.mmap(-1, 1 << 14)), []
    for number, group in enumerate(groups):
        blocks = np.array([7, 2, 3, 5])
        moves.append(
            Move(number, 8192 * number + np.arange(4) * transfer.layouts[number].block_bytes, blocks)
        )
        transfer.save(*moves[-1])
        for _, tensor in group:
            tensor.zero_()
    assert load_beside(transfer, moves) > 0
    for group, old in zip(groups, before, strict=True):
        for (_, tensor), was in zip(group, old, strict=True):
            assert torch.equal(tensor[[7, 2, 3, 5]], was[[7, 2, 3, 5]])
            assert not tensor[[0, 1, 4, 6, 8]].any()
    assert pauses == [pipeline._PAUSE] * {1: 8, 700: 4 + 1, 1 << 20: 2}[piece]


def forward(order: LayerOrder, kind: str, layers: str) -> bool:
    for layer in layers:
        order.ask(layer)
    return order.end(kind)


def test_an_order_counts_once_two_forwards_agree() -> None:
    order = LayerOrder()
    assert order.of("eager") == ()
    assert forward(order, "eager", "abc")
    assert order.of("eager") == ()
    assert forward(order, "eager", "acb")
    assert order.of("eager") == ()
    assert forward(order, "eager", "acbb")  # twice, as two micro-batches do
    assert order.of("eager") == ("a", "c", "b")
    assert order.of("piecewise") == ()
    assert forward(order, "piecewise", "")
    assert forward(order, "piecewise", "")
    assert order.of("piecewise") == ()


def test_a_forward_that_leaves_layers_out_ends_it_for_good() -> None:
    order = LayerOrder()
    for _ in range(2):
        forward(order, "eager", "abc")
        forward(order, "piecewise", "abc")
    assert forward(order, "eager", "abcd")  # more than was relied on does no harm
    assert not forward(order, "eager", "ab")
    for _ in range(3):
        assert forward(order, "eager", "abc")
        assert order.of("eager") == ()
    assert order.of("piecewise") == ("a", "b", "c")
