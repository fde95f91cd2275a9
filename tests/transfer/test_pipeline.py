"""What follows a copy, and in which order layers are asked for."""

from __future__ import annotations

import random
import threading

import pytest

from kvbench.host_device import HostBackend
from kvkeep.errors import DeviceError
from kvkeep.transfer.pipeline import Completions, LayerOrder
from kvkeep.transfer.streams import Pending


def test_what_follows_comes_after_the_bytes_on_another_thread() -> None:
    backend, done = HostBackend(random.Random(0)), list[tuple[str, bool, bool]]()
    completions, copied = Completions(), list[int]()
    own = threading.get_ident()

    def then(name: str, count: int) -> None:
        done.append((name, len(copied) >= count, threading.get_ident() != own))

    for number in range(1, 4):
        stream = backend.stream()
        began = stream.record_event()
        stream.submit([lambda number=number: copied.append(number)])
        pending = Pending(1, began, stream.record_event())
        completions.add(
            pending, lambda seconds, n=number: then("there", n if seconds >= 0 else -1), lambda: None
        )
    completions.close()
    assert [name for name, _, _ in done] == ["there"] * 3
    assert all(elsewhere for _, _, elsewhere in done)
    assert done[-1][1]


def test_a_copy_that_fails_is_not_reported_as_done(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Pending):
        def wait(self) -> float:
            raise DeviceError("refused")

    backend, said = HostBackend(), list[str]()
    completions = Completions()
    event = backend.engine.record_event()
    completions.add(Broken(1, event, event), lambda _: said.append("done"), lambda: said.append("failed"))
    completions.add(Pending(1, event, event), lambda _: said.append("next"), lambda: said.append("failed"))
    completions.close()
    assert said == ["failed", "next"]
    assert "refused" in caplog.text


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
