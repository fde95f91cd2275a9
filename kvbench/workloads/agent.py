"""Agents: one long prefix of instructions and tools for all, then many short turns of tool results."""

from __future__ import annotations

from kvbench.workloads.base import Given, Message, Request, Workload, round_robin
from kvbench.workloads.prose import Passage

__all__ = ["AGENT"]


def _build(given: Given) -> list[Request]:
    scale, draw = given.scale, given.draw
    opening = (Message("system", (Passage("tools", scale.tokens(6000, 256)),)),)
    sessions = []
    for user in range(scale.count(30)):
        turns = []
        for number in range(scale.count(12, 4)):
            result = Passage(f"session {user} result {number}", scale.tokens(draw.randint(50, 600), 8))
            says = ("Task: " if number == 0 else "Tool result: ", result)
            turns.append(Request(user, number, "", opening, says, scale.tokens(draw.randint(30, 120), 4)))
        sessions.append(turns)
    return round_robin(sessions)


AGENT = Workload(
    "agent",
    "30 sessions of 12 turns, one prefix of 6,000 tokens, tool results of 50 to 600, answers of 30 to 120",
    0.5,
    _build,
)
