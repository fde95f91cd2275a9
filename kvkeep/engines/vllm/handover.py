"""Disaggregated prefill: what `kv_transfer_params` of a request ask for, and what they are answered.

The KV goes through the keeper like all other, chunk by chunk as it is computed. A request that another
engine prefills (`do_remote_prefill`) waits here for chunks on their way, as long as they keep coming; what
does not come is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Opened
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.identity import group_keys

if TYPE_CHECKING:
    from kvkeep.engines.vllm.requests import Tracked

__all__ = ["Arrivals", "Awaited", "answer", "handed_over"]

_POLL_EVERY = 0.003
_WINDOW = 256  # chunks beyond the last that came: far more than an engine computes in that time
_LOOK_FIRST, _LOOK_MOST = 0.1, 1.6  # seconds between looks into tiers, of which no other host tells
_LOOK_LIVE = 0.05  # where one of them is a peer, which is asked in less than a millisecond
_IN_MEMORY = 1
_WHOLE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass
class Awaited:
    """A prompt that another engine prefills. Times are of the monotonic clock, chunks are leading ones."""

    tokens: int | None
    """How many of its tokens that engine has saved, as far as it said."""
    begun: float | None = None
    chunks: int = -1
    """Chunks that have come."""
    came: float = 0.0
    """When one came last."""
    polled: float = 0.0
    looked: float = 0.0
    """When it was looked up last."""
    pause: float = 0.0
    """Until the next look, if nothing comes."""
    expected: int = -1
    """Chunks that had come then."""
    over: bool = False

    @classmethod
    def of(cls, params: Any) -> Awaited | None:
        """What a request's parameters say; None where nobody prefills for it. They are any JSON at all."""
        if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
            return None
        tokens = params.get("remote_num_tokens")
        return cls(max(0, tokens) if type(tokens) is int else None)


def handed_over(params: Any) -> bool:
    """Whether another engine goes on with a request (`do_remote_decode`)."""
    return isinstance(params, dict) and params.get("do_remote_decode") is True


def answer(
    params: Any, status: RequestStatus, engine_id: str, tracked: Tracked | None, chunk_tokens: int
) -> dict[str, Any] | None:
    """Parameters for the engine that goes on with a request; None where none does."""
    if not handed_over(params) or status not in _WHOLE:
        return None
    saved = whole = 0
    if tracked is not None and tracked.cacheable:
        whole = tracked.request.num_prompt_tokens // chunk_tokens
        saved = min(tracked.next_save, tracked.kept, whole)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine_id,
        **dict.fromkeys(("remote_block_ids", "remote_host", "remote_port")),
        "remote_num_tokens": saved * chunk_tokens,
        "remote_all": 0 < whole == saved,
    }


class Arrivals:
    """All requests of one engine that wait for another's prefill. The scheduler's thread."""

    def __init__(
        self,
        config: EngineConfig,
        stats: KVKeepStats,
        group: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = config.remote_wait
        self._stats = stats
        self._group = group
        self._clock = clock
        self._told = False
        self._live: tuple[int, bool] | None = None

    def waits(
        self, keeper: Opened | None, tracked: Tracked, fingerprint: bytes, limit: int, chunk_tokens: int
    ) -> bool:
        """Whether a request, looked up as far as chunk `limit`, is to be asked about again.

        Raises KeeperUnavailable or RequestRefused."""
        awaited, held, now = tracked.awaited, tracked.first + tracked.found, self._clock()
        if awaited is None or awaited.over or keeper is None or not tracked.cacheable:
            return False
        wanted = limit if awaited.tokens is None else min(limit, awaited.tokens // chunk_tokens)
        if held >= wanted:
            return self._end(awaited, now, late=False)
        if awaited.begun is None:
            awaited.begun = awaited.looked = now
        first, most = (_LOOK_LIVE, _LOOK_LIVE) if self._is_live(keeper) else (_LOOK_FIRST, _LOOK_MOST)
        self._came(awaited, held, now, first)
        if now - awaited.polled >= _POLL_EVERY:
            awaited.polled = now
            first_asked = max(held, awaited.chunks)
            last_asked = min(wanted, first_asked + _WINDOW)
            come = first_asked + self._leading(keeper, tracked, fingerprint, first_asked, last_asked)
            self._came(awaited, come, now, first)
            late = now - awaited.came >= self._patience
            if late and come <= held:
                return self._end(awaited, now, late=True)
            if late or come >= wanted > awaited.expected or now - awaited.looked >= awaited.pause:
                awaited.looked, awaited.expected = now, come
                awaited.pause = min(2 * awaited.pause, most)
                tracked.asked = (-1, -1)  # so it is looked up anew
            if late:
                self._end(awaited, now, late=True)
        self._told = True
        return True

    def rests(self) -> bool:
        """Whether a request was told to wait since the last call."""
        told, self._told = self._told, False
        return told

    def _leading(self, keeper: Opened, tracked: Tracked, fingerprint: bytes, first: int, last: int) -> int:
        """How many of the chunks first … last-1 are in memory, before the first that is not."""
        keys = group_keys(tracked.keys(first, last), fingerprint, self._group)
        now = keeper.connection.changes(keeper.namespace, keys.tobytes()).now
        return next((at for at, state in enumerate(now) if not state & _IN_MEMORY), len(now))

    def _came(self, awaited: Awaited, chunks: int, now: float, pause: float) -> None:
        if chunks > awaited.chunks:
            awaited.chunks, awaited.came, awaited.pause = chunks, now, pause

    def _is_live(self, keeper: Opened) -> bool:
        """Whether a tier of the keeper is worth asking often; found out once for each keeper."""
        if self._live is None or self._live[0] != keeper.epoch:
            tiers: Any = keeper.connection.status()["tiers"]
            self._live = (keeper.epoch, any(tier.get("live") for tier in tiers))
        return self._live[1]

    def _end(self, awaited: Awaited, now: float, late: bool) -> bool:
        awaited.over = True
        if awaited.begun is not None:
            self._stats.add("remote_waits", 1)
            self._stats.add("remote_wait_seconds", now - awaited.begun)
            self._stats.add("remote_timeouts", int(late))
        return False
