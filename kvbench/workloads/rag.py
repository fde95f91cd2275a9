"""Retrieval: each question with some passages of one text, popular ones more often, in changing order."""

from __future__ import annotations

from kvbench.workloads.base import Given, Message, Request, Workload
from kvbench.workloads.prose import Passage

__all__ = ["RAG"]

_RETRIEVED = 5
_INSTRUCTION = "Answer the question from the passages that follow. Say so where they do not tell."


def _build(given: Given) -> list[Request]:
    scale, draw = given.scale, given.draw
    passages = given.prose.windows(scale.count(150), scale.tokens(512, 64))
    # Zipf's law: the n-th most popular passage is found 1/n as often as the first.
    weights = [1 / (rank + 1) for rank in range(len(passages))]
    requests = []
    for user in range(scale.count(300)):
        found: list[int] = []
        while len(found) < min(_RETRIEVED, len(passages)):
            (one,) = draw.choices(range(len(passages)), weights)
            if one not in found:
                found.append(one)
        draw.shuffle(found)
        context = "".join(f"Passage: {passages[one]}\n\n" for one in found)
        question = Passage(f"question {user}", scale.tokens(30, 8))
        names = " ".join(map(str, found))
        opening = (Message("system", (_INSTRUCTION,)),)
        requests.append(
            Request(user, 0, names, opening, (context, "Question: ", question), scale.tokens(64, 8))
        )
    return requests


RAG = Workload(
    "rag",
    "300 questions, each with 5 of 150 passages of 512 tokens in changing order, 64-token answers",
    1.0,
    _build,
)
