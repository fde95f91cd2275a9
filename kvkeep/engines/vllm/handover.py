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
from kvkeep.identity import KEY_BYTES, group_keys

if TYPE_CHECKING:
    from kvkeep.engines.vllm.requests import Tracked

__all__ = ["Arrivals", "Awaited", "answer", "handed_over"]

_POLL_EVERY = 0.003
_WINDOW, _LEAST = 256, 16  # chunks beyond the last that came: far more than an engine computes in that time
_MOST = 4096  # of all requests together: what the keeper looks up in 0.2 ms
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
    told: int | None = None
    """Chunks that had come when the keeper was asked last, until that has been looked at."""
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
        self._polled = 0.0
        self._asking: dict[str, tuple[Tracked, Awaited, int]] = {}
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
        self._asking[tracked.request.request_id] = tracked, awaited, wanted
        if now - self._polled >= _POLL_EVERY:
            self._poll(keeper, fingerprint, now)
        if awaited.told is not None:
            come, awaited.told = awaited.told, None
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

    def _poll(self, keeper: Opened, fingerprint: bytes, now: float) -> None:
        """One question for all that have asked since the last: how far are they in memory without a gap?"""
        asking, self._asking, self._polled = self._asking, {}, now
        window = min(_WINDOW, max(_LEAST, _MOST // len(asking)))
        runs = [
            tracked.keys(awaited.chunks, min(wanted, awaited.chunks + window))
            for tracked, awaited, wanted in asking.values()
        ]
        keys = group_keys(b"".join(runs), fingerprint, self._group).tobytes()
        states, at = keeper.connection.changes(keeper.namespace, keys).now, 0
        for (_, awaited, _), run in zip(asking.values(), runs, strict=True):
            its, at = states[at : at + len(run) // KEY_BYTES], at + len(run) // KEY_BYTES
            leading = next((place for place, state in enumerate(its) if not state & _IN_MEMORY), len(its))
            awaited.told = awaited.chunks + leading

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
