"""Around copies that go on while the engine computes: in which order layers are needed, and how a CPU does
them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvkeep.background import GiveWay
from kvkeep.transfer.base import Move, Transfer
from kvkeep.transfer.streams import Pending

__all__ = ["Completions", "LayerOrder", "load_beside"]

log = logging.getLogger("kvkeep.transfer")

_PIECE = 4 << 20
_PAUSE = 0.002


def load_beside(transfer: Transfer, moves: Sequence[Move]) -> float:
    """Arena → paged KV on a thread of its own beside one that computes: some MiB at a time, with a pause
    where somebody waits for the core. Returns the seconds spent on copying when the bytes are there.

    Raises LayoutError.
    """
    give_way, seconds = GiveWay(_PAUSE), 0.0
    for group, offsets, blocks in moves:
        step = max(1, _PIECE // transfer.layouts[group].block_bytes)
        for at in range(0, len(blocks), step):
            began = time.perf_counter()
            transfer.load(group, offsets[at : at + step], blocks[at : at + step])
            seconds += time.perf_counter() - began
            give_way()
    return seconds


class Completions:
    """Waits for copies on a thread of its own, one after the other, and then does what is to follow. So an
    idle engine's last save is reported at once. `attend`: see `Backend`."""

    def __init__(self, attend: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(1, "kvkeep-completions", attend)

    def add(self, pending: Pending, then: Callable[[float], None], failed: Callable[[], None]) -> None:
        """Call `then(seconds on the device)` when the bytes are there, or `failed()`, on that thread."""

        def look(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                log.warning("kvkeep: a copy on the device failed", exc_info=error)
                failed()

        self._pool.submit(lambda: then(pending.wait())).add_done_callback(look)


class LayerOrder:
    """In which order a forward asks for its layers, learned by watching; per way of running it.

    An engine asks for a layer where Python runs between its layers. It does not where a graph of the whole
    model is replayed, and says beforehand which way it goes. To be sure of more than its word, an order is
    used only once two forwards of its kind have asked for the same; and each later one is held against it.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, ...]] = {}
        self._before: dict[str, tuple[str, ...]] = {}
        self._broken: set[str] = set()
        self._asked: dict[str, None] = {}

    def of(self, kind: str) -> tuple[str, ...]:
        """The layers of such a forward; empty while it is not known."""
        return self._known.get(kind, ())

    def ask(self, layer: str) -> None:
        """The forward has come to this layer."""
        self._asked[layer] = None

    def end(self, kind: str) -> bool:
        """The forward is over. False where it has left out a layer: never rely on this kind again."""
        asked, self._asked = tuple(self._asked), {}
        known = self._known.get(kind)
        if known is not None and not set(known) <= set(asked):
            del self._known[kind]
            self._broken.add(kind)
            return False
        if known is None and asked and kind not in self._broken:
            if self._before.get(kind) == asked:
                self._known[kind] = asked
            self._before[kind] = asked
        return True
