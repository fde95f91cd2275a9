"""Long prompts among streams: what those who are reading notice of somebody else's prefill."""

from __future__ import annotations

from kvbench.workloads.base import Given, Request, Workload
from kvbench.workloads.prose import Passage

__all__ = ["MIXED"]


def _build(given: Given) -> list[Request]:
    scale = given.scale
    long = (scale.tokens(8000, 256), scale.tokens(8, 4), scale.count(100))
    short = (scale.tokens(100, 16), scale.tokens(200, 8), scale.count(300))
    kinds = [(name, *kind) for name, kind in (("long", long), ("short", short)) for _ in range(kind[2])]
    given.draw.shuffle(kinds)
    return [
        Request(user, 0, name, (), (Passage(f"{name} {user}", length),), answer)
        for user, (name, length, answer, _) in enumerate(kinds)
    ]


MIXED = Workload(
    "mixed",
    "100 prompts of 8,000 tokens with 8-token answers among 300 of 100 tokens with 200-token answers",
    1.0,
    _build,
)
