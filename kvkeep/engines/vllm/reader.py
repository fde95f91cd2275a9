"""What the keeper has for a request: in memory now, or on its way from a tier, which is waited for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Opened
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.engines.vllm.stats import KVKeepStats
from kvkeep.identity import KEY_BYTES, group_keys
from kvkeep.wire.messages import Miss

__all__ = ["ComputeSpeed", "Reader", "Tickets", "give_back"]

_POLL_EVERY = 0.001  # an engine whose requests all wait asks hundreds of times a second, each request in turn
_REST = 0.002
_PROBING, _DONE = 0, 2
_PROBE_SHARE = 0.01
_DECAY = 0.7
_ENOUGH_TOKENS = 256


class Tickets:
    """All tickets of one engine; polls for them together. The scheduler's thread."""

    def __init__(
        self, config: EngineConfig, stats: KVKeepStats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._stats = stats
        self._clock = clock
        self._waiting: dict[int, Tracked] = {}
        self._polled = 0.0

    def begin(self, tracked: Tracked, ticket: int, patience: float) -> None:
        """The keeper has something under way for a request, which waits `patience` to hear of it."""
        tracked.ticket, tracked.stage, tracked.since = ticket, _PROBING, self._clock()
        tracked.patience = patience
        self._waiting[ticket] = tracked

    @property
    def waiting(self) -> bool:
        """Whether any request waits."""
        return any(one.ticket == number for number, one in self._waiting.items())

    def over(self, tracked: Tracked, poll: Callable[[list[int]], bytes], worth: float) -> bool:
        """Whether a request need not, or may not, wait any longer.

        `poll` asks the keeper; `worth`: seconds after which computing what is missing is as fast.
        """
        now = self._clock()
        if now - self._polled >= _POLL_EVERY:
            self._polled = now
            self._waiting = {number: one for number, one in self._waiting.items() if one.ticket == number}
            for one, stage in zip(self._waiting.values(), poll(list(self._waiting)), strict=False):
                one.stage = stage
        waited = now - tracked.since
        patience = tracked.patience if tracked.stage == _PROBING else self._config.load_wait
        if tracked.stage != _DONE and waited < min(patience, worth):
            return False
        self._waiting.pop(tracked.ticket, None)
        self._stats.add("tier_waits", 1)
        self._stats.add("tier_wait_seconds", waited)
        if tracked.stage != _DONE:
            self._stats.add("tier_timeouts", 1)
        return True


class ComputeSpeed:
    """How long the engine takes to compute a token of prefill: a mean that forgets."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, stats: KVKeepStats) -> None:
        """Take in what workers reported of their forward passes."""
        tokens, seconds = stats.data.get("computed_tokens", 0), stats.data.get("compute_seconds", 0.0)
        if tokens:
            self._tokens = _DECAY * self._tokens + tokens
            self._seconds = _DECAY * self._seconds + seconds

    @property
    def seconds_per_token(self) -> float:
        """0 while too little has been computed to say."""
        return self._seconds / self._tokens if self._tokens >= _ENOUGH_TOKENS else 0.0


class Reader:
    """Looks requests up, on the scheduler's thread. A lost keeper raises: the caller's affair."""

    def __init__(self, config: EngineConfig, stats: KVKeepStats, group: int | None) -> None:
        """`group`: one that attends to all, so that nothing is found where it lacks the first chunk."""
        self._config = config
        self._stats = stats
        self._group = group
        self._missed, self._owed = list[Miss](), list[Miss]()
        self._tickets = Tickets(config, stats)
        self.speed = ComputeSpeed()

    def rest(self, others: bool) -> None:
        """An engine that computes nothing while requests wait asks as fast as it can: leave the cores to
        those who bring the chunks. `others`: whether any waits for something else than tiers."""
        if others or self._tickets.waiting:
            time.sleep(_REST)

    def tell(self, keeper: Opened | None) -> None:
        """Once a step: tell the keeper for whom it was not asked, those of the step before. They have their
        first token, which would have had to wait. Raises KeeperUnavailable."""
        told, self._owed, self._missed = self._owed, self._missed, []
        if keeper is None:
            self._owed = []
        elif told:
            keeper.connection.missed(keeper.namespace, told)

    def tell_all(self, keeper: Opened | None) -> None:
        """The same for all: there may be no next step."""
        self._owed, self._missed = self._owed + self._missed, []
        self.tell(keeper)

    def look(
        self, keeper: Opened | None, tracked: Tracked, first: int, limit: int, chunk_tokens: int
    ) -> bool:
        """Find chunks first … limit-1 of a request; the outcome is in `tracked`. False while more is on its
        way from a tier: ask again. Raises KeeperUnavailable or RequestRefused."""
        recompute = chunk_tokens * self.speed.seconds_per_token
        if tracked.asked != (first, limit):
            self._lookup(keeper, tracked, first, limit, recompute)
        if not tracked.ticket or keeper is None:
            return True
        worth = (limit - first - tracked.found) * recompute if self._config.load == "auto" else 0.0
        if not self._tickets.over(tracked, keeper.connection.poll, worth or math.inf):
            return False
        self._lookup(keeper, tracked, first, limit, recompute, settles=True)
        return True

    def _lookup(
        self,
        keeper: Opened | None,
        tracked: Tracked,
        first: int,
        limit: int,
        recompute: float,
        settles: bool = False,
    ) -> None:
        began = time.perf_counter()
        # Also with nothing to find: a lookup marks what is used, and gives the request its place in time.
        keys = tracked.keys(0, max(first, limit))
        lease, ticket = tracked.lease, tracked.ticket
        if keeper is None or not tracked.cacheable:
            give_back(keeper, tracked)
            return
        rule = {"never": -1.0, "always": 0.0}.get(self._config.load, recompute)
        if not settles and tracked.awaited is None and self._absent(keeper, keys, first):
            give_back(keeper, tracked)
            tracked.asked, tracked.first = (first, limit), first
            self._missed.append(Miss(len(keys) // KEY_BYTES, first, tracked.tenant))
            self._looked_up(began, again=False)
            return
        # Asking what tiers have costs requests that miss: little of what computing them takes anyway.
        patience = max(self._config.probe_wait, _PROBE_SHARE * (limit - first) * recompute)
        if tracked.awaited is not None and rule > 0:  # another engine computes it, so that this one need not
            rule, patience = 0.0, max(patience, self._config.remote_wait / 10)
        terms = (rule, patience, ticket if settles else 0, tracked.trace, tracked.tenant)
        found = keeper.connection.lookup(keeper.namespace, keys, first, *terms)
        if ticket and not settles:
            keeper.connection.forget(ticket)
        if lease:  # after the new one: what was promised stays where it is in between
            keeper.connection.release(lease)
        tracked.forget_claim()
        tracked.epoch = found.epoch
        tracked.asked, tracked.first = (first, limit), first
        tracked.lease, tracked.found, tracked.offsets = found.lease, found.chunks, found.offsets
        if found.ticket:
            self._tickets.begin(tracked, found.ticket, patience)
        again = settles or (tracked.awaited is not None and tracked.awaited.begun is not None)
        self._looked_up(began, again)

    def _absent(self, keeper: Opened, keys: bytes, first: int) -> bool:
        """Whether it is certain, unasked, that nothing of a prompt is held. Neither its first chunk nor the
        first that is looked for: those before that, in the engine's own cache, are used by this request."""
        if self._group is None:
            return False
        ends = keys[:KEY_BYTES] + keys[first * KEY_BYTES : (first + 1) * KEY_BYTES]
        return keeper.connection.absent(group_keys(ends, keeper.fingerprint, self._group))

    def _looked_up(self, began: float, again: bool) -> None:
        self._stats.add("lookups", 0 if again else 1)
        self._stats.add("lookup_seconds", time.perf_counter() - began)


def give_back(keeper: Opened | None, tracked: Tracked) -> None:
    """End a request's lease, and its wait. Raises KeeperUnavailable."""
    lease, ticket = tracked.lease, tracked.ticket
    tracked.forget_claim()
    if keeper is None:
        return
    if lease:
        keeper.connection.release(lease)
    if ticket:
        keeper.connection.forget(ticket)
