"""Prompts that share nothing: what a cache costs where it cannot help."""

from __future__ import annotations

from kvbench.workloads.base import Given, Request, Workload
from kvbench.workloads.prose import Passage

__all__ = ["UNIQUE"]


def _build(given: Given) -> list[Request]:
    length, answer = given.scale.tokens(2000, 64), given.scale.tokens(64, 8)
    return [
        Request(user, 0, "", (), (Passage(f"prompt {user}", length),), answer)
        for user in range(given.scale.count(200))
    ]


UNIQUE = Workload("unique", "200 prompts of 2,000 tokens that share nothing, 64-token answers", 1.0, _build)
