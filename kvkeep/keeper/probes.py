"""What tiers hold of a prompt: asked in threads, tier by tier, and without those that do not answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.open import Opened

__all__ = ["Lane", "Probes"]

_THREADS = 4  # of each tier
_PATIENCE = 5.0  # seconds; tiers give up by themselves, but for a dead mount, which may hang for ever


class Lane:
    """A few threads that work off one queue. Daemons: a hung verb does not hold up the process's end."""

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._work, name=f"kvkeep-{name}-{number}", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` on one of the threads; it must not raise."""
        self._jobs.put(job)

    def close(self) -> None:
        """Let the threads end after what is queued."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Probes:
    """Asks tiers, each in threads of its own. All methods are the event loop's; `post` runs a call on it."""

    def __init__(self, tiers: Sequence[Opened], post: Callable[[Callable[[], None]], object]) -> None:
        self._tiers, self._post = tiers, post
        self._lanes = [Lane(f"probe{number}", _THREADS) for number in range(len(tiers))]
        self._asked: list[dict[Callable[[list[bool]], None], float]] = [{} for _ in tiers]
        self._late = [0] * len(tiers)

    def answers(self, tier: int) -> bool:
        """Whether a tier is worth asking: it is not switched off, and owes no answer for long."""
        return self._tiers[tier].guard.available and not self._late[tier]

    def within(self, patience: float) -> tuple[list[int], list[int]]:
        """Tiers that are worth asking, in order: those that together are likely to answer within so many
        seconds, and the others. What a tier has not answered yet counts as long as it takes already."""
        near, far, spent, now = list[int](), list[int](), 0.0, time.monotonic()
        for tier in filter(self.answers, range(len(self._tiers))):
            oldest = next(iter(self._asked[tier].values()), now)
            latency = max(self._tiers[tier].tier.latency or 0.0, now - oldest)
            if spent + latency < patience:
                near.append(tier)
                spent += latency
            else:
                far.append(tier)
        return near, far

    def find(self, keys: list[bytes], then: Callable[[list[int]], None], tiers: Sequence[int]) -> None:
        """Call `then` with the first one of `tiers` that has each key, or -1; before this returns where none
        can be asked."""
        tier, *others = [tier for tier in tiers if self.answers(tier)] or [-1]
        if tier < 0 or not keys:
            then([-1] * len(keys))
            return

        def job() -> None:
            try:
                here = self._tiers[tier].tier.contains(keys)
            except TierUnavailable:
                here = []
            self._post(lambda: self._answered(tier, go_on, here))

        def go_on(here: list[bool]) -> None:
            left = [at for at in range(len(keys)) if not here or not here[at]]

            def below(tiers: list[int]) -> None:
                found = [tier] * len(keys)
                for at, other in zip(left, tiers, strict=True):
                    found[at] = other
                then(found)

            self.find([keys[at] for at in left], below, others)

        self._asked[tier][go_on] = time.monotonic()
        self._lanes[tier].submit(job)

    def _answered(self, tier: int, go_on: Callable[[list[bool]], None], here: list[bool]) -> None:
        if self._asked[tier].pop(go_on, None) is None:
            self._late[tier] -= 1
        else:
            go_on(here)

    def tick(self) -> None:
        """Now and then: go on without answers that are late."""
        late = time.monotonic() - _PATIENCE
        for tier, asked in enumerate(self._asked):
            for go_on in [go_on for go_on, since in asked.items() if since < late]:
                del asked[go_on]
                self._late[tier] += 1
                go_on([])

    def close(self) -> None:
        """End the threads, but for those in a hung verb."""
        for lane in self._lanes:
            lane.close()
