"""Documents that are asked about again and again: long ones, and short ones."""

from __future__ import annotations

from functools import partial

from kvbench.workloads.base import Given, Message, Request, Workload
from kvbench.workloads.prose import Passage

__all__ = ["LONG", "SHORT"]


def _build(documents: int, tokens: int, least: int, answer: int, given: Given) -> list[Request]:
    scale = given.scale
    length = scale.tokens(tokens, least)
    # Twenty questions of each at any scale: fewer, and many requests would be first ones.
    asked = [number for number in range(scale.count(documents)) for _ in range(20)]
    given.draw.shuffle(asked)
    return [
        Request(
            user,
            0,
            str(number),
            (Message("system", (Passage(f"document {number}", length),)),),
            ("Explain this, in the light of the text: ", Passage(f"question {user}", scale.tokens(40, 8))),
            scale.tokens(answer, 8),
        )
        for user, number in enumerate(asked)
    ]


LONG = Workload(
    "long_documents",
    "20,000-token contexts from 15 documents, 20 questions each in random order, 100-token answers",
    0.1,
    partial(_build, 15, 20_000, 256, 100),
)
SHORT = Workload(
    "short_documents",
    "400-token contexts from 320 documents, 20 questions each in random order, 20-token answers",
    1.0,
    partial(_build, 320, 400, 256, 20),
)
