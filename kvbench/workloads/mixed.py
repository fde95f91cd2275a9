"""Long prompts among streams: what those who are reading notice of somebody else's prefill."""

from __future__ import annotations

from kvbench.workloads.base import Given, Request, Workload
from kvbench.workloads.prose import Passage

__all__ = ["MIXED"]


def _build(given: Given) -> list[Request]:
    scale = given.scale
    long = (scale.tokens(8000, 256), scale.tokens(8, 4), scale.count(100))
    short = (scale.tokens(100, 16), scale.tokens(200, 8), scale.count(300))
    kinds: list[tuple[str, int, int, int]] = []
    for at in range(long[2]):  # each among its share of the short ones, so that any stretch has as many
        beside = short[2] * (at + 1) // long[2] - short[2] * at // long[2]
        some = [("long", *long), *[("short", *short)] * beside]
        given.draw.shuffle(some)
        kinds += some
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
