"""What each step saves: chunks that it completes, where the keeper gives them slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Opened
from kvkeep.engines.vllm.events import Events
from kvkeep.engines.vllm.geometry import BlockTable, Geometry
from kvkeep.engines.vllm.metadata import Offered
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.wire.client import first_ticket
from kvkeep.wire.messages import Reservation

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

__all__ = ["Saves"]

_Offer = tuple[Tracked, Reservation, BlockTable]


class Saves:
    """All of one engine. The scheduler's thread. `met`: told of each request's chunks first … last-1 that
    are offered."""

    def __init__(
        self,
        config: EngineConfig,
        stats: KVKeepStats,
        events: Events | None,
        met: Callable[[Tracked, int, int], None],
    ) -> None:
        self._config = config
        self._stats = stats
        self._events = events
        self._met = met
        self._last, self._until = first_ticket(), 0.0
        self._asked = list[tuple[Tracked, int]]()
        """By that ticket: requests, and their first chunks that are offered."""

    def plan(
        self, keeper: Opened, geometry: Geometry, requests: Mapping[str, Tracked], output: SchedulerOutput
    ) -> Offered | None:
        """What the workers are to save in this step, as far as the keeper has room: it is asked now, and they
        hear its answer when they have computed. None: nothing. Raises KeeperUnavailable, RequestRefused."""
        began = time.perf_counter()
        offers = list[_Offer]()
        for name, scheduled in output.num_scheduled_tokens.items():
            if (tracked := requests.get(name)) is not None:
                last = self._complete(tracked.request, scheduled, output) // geometry.chunk_tokens
                if last > tracked.next_save and tracked.cacheable:
                    offers += self._offer(geometry, tracked, last, output)
        if not offers:
            return None
        self._last += 1
        items = [item for _, item, _ in offers]
        self._until = keeper.connection.begin_reserve(keeper.namespace, items, self._last)
        self._asked = [(tracked, item.first) for tracked, item, _ in offers]
        offered, place = Offered(self._last, self._until, geometry.chunk_tokens), 0
        for _, item, table in offers:
            geometry.add_save(offered.blocks, table, item.first, place, item.wanted)
            place += len(item.wanted[0])
        self._stats.add("reserve_seconds", time.perf_counter() - began)
        return offered

    def settle(self, keeper: Opened | None) -> None:
        """What has come of the last plan. Raises KeeperUnavailable or RequestRefused."""
        asked, self._asked = self._asked, []
        if not asked or keeper is None:
            return
        began = time.perf_counter()
        results = keeper.connection.reserved(self._last, self._until)
        for (tracked, first), result in zip(asked, results, strict=True):
            tracked.epoch = result.epoch
            if first <= tracked.kept:
                tracked.kept = first + result.kept()
            if result.reservation and self._events is not None:
                self._events.awaiting(sum(int((row >= 0).sum()) for row in result.offsets))
        self._stats.add("reserve_seconds", time.perf_counter() - began)

    def _complete(self, request: Request, scheduled: int, output: SchedulerOutput) -> int:
        """Tokens whose KV is certain after this step: no draft tokens, no tokens not yet known."""
        drafts = len(output.scheduled_spec_decode_tokens.get(request.request_id, ()))
        end: int = min(request.num_computed_tokens + scheduled - drafts, request.num_tokens)
        return end if self._config.save_decoded else min(end, request.num_prompt_tokens)

    def _offer(
        self, geometry: Geometry, tracked: Tracked, last: int, output: SchedulerOutput
    ) -> list[_Offer]:
        """What the keeper is asked about chunks up to `last`, and the block table behind it; or nothing."""
        first, tracked.next_save = tracked.next_save, last
        table = output.kv_connector_block_state.get_block_ids(tracked.request.request_id)
        item = None if table is None else geometry.offer(tracked, table, first, last)
        if item is None:
            return []
        self._met(tracked, first, last)
        return [(tracked, item, table)]
