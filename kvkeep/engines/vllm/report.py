"""The periodic line in the engine's log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.errors import KVKeepError

if TYPE_CHECKING:
    from kvkeep.engines.link import Opened

__all__ = ["Reporter"]

log = logging.getLogger("kvkeep.vllm")


class Reporter:
    """Sums figures and says them once per `interval` seconds (0: never), if anything happened."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._sums = KVKeepStats()
        self._due = time.monotonic() + interval
        self._evicted = 0

    def add(self, stats: KVKeepStats | None) -> None:
        """Count a rank's or the scheduler's figures."""
        if stats is not None:
            self._sums.aggregate(stats)

    def maybe_log(self, keeper: Opened | None) -> None:
        """Log the line when it is due and there is something to say."""
        if not self._interval or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._interval
        sums: dict[str, Any] = self._sums.data
        self._sums.reset()
        if not any(
            sums.get(name) for name in ("lookups", "saved_bytes", "loaded_bytes", "errors", "keeper_losses")
        ):
            return
        asked, hit = sums.get("asked_tokens", 0), sums.get("hit_tokens", 0)
        log.info(
            "kvkeep: %d lookups, hit %d of %d tokens (%.0f %%); loaded %s; saved %d tokens, %s; %s",
            sums.get("lookups", 0),
            hit,
            asked,
            100 * hit / asked if asked else 0,
            _moved(sums.get("loaded_bytes", 0), sums.get("load_seconds", 0)),
            sums.get("saved_tokens", 0),
            _moved(sums.get("saved_bytes", 0), sums.get("save_seconds", 0)),
            self._keeper_line(keeper),
        )

    def _keeper_line(self, keeper: Opened | None) -> str:
        if keeper is None:
            return "no keeper"
        try:
            figures: dict[str, Any] = keeper.connection.status()
        except KVKeepError:
            return "keeper does not answer"
        evicted = figures["counters"]["evicted_chunks"]
        new, self._evicted = evicted - self._evicted, evicted
        used, total = figures["used_bytes"], figures["memory_bytes"]
        return f"keeper holds {used / 1e9:.2f} of {total / 1e9:.2f} GB, evicted {new} chunks"


def _moved(nbytes: float, seconds: float) -> str:
    return f"{nbytes / 1e6:.0f} MB at {nbytes / seconds / 1e9:.1f} GB/s" if seconds else "0 MB"
