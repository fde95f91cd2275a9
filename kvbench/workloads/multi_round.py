"""Chats with one system prompt, whose history grows from nothing."""

from __future__ import annotations

from kvbench.workloads.base import Given, Message, Request, Workload, round_robin
from kvbench.workloads.prose import Passage

__all__ = ["MULTI_ROUND"]


def _build(given: Given) -> list[Request]:
    scale = given.scale
    opening = (Message("system", (Passage("system prompt", scale.tokens(1000, 64)),)),)
    question, answer = scale.tokens(50, 8), scale.tokens(100, 8)
    return round_robin(
        [
            [
                Request(user, number, "", opening, (Passage(f"{user} asks {number}", question),), answer)
                for number in range(scale.count(10, 3))
            ]
            for user in range(scale.count(20))
        ]
    )


MULTI_ROUND = Workload(
    "multi_round",
    "20 users with 10 rounds each in turn, one system prompt of 1,000 tokens, 100-token answers",
    0.5,
    _build,
)
