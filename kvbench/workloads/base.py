"""What a workload is: a list of requests in the order in which they are due."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvbench.workloads.prose import Passage, Prose

__all__ = ["Given", "Message", "Request", "Scale", "Workload", "round_robin"]


class Message(NamedTuple):
    """One message of a conversation; its text is made when it is sent."""

    role: str
    parts: tuple[str | Passage, ...]


class Request(NamedTuple):
    """One request: `opening`, what its user said and heard before, then `says`.

    `at` is in seconds from the start where the workload has times of its own.
    """

    user: int
    round: int
    document: str
    opening: tuple[Message, ...]
    says: tuple[str | Passage, ...]
    answer_tokens: int
    at: float | None = None


class Scale(NamedTuple):
    """The rule of `--scale`: lengths times the factor, with a floor; counts times its square root, up."""

    factor: float

    def tokens(self, published: int, least: int) -> int:
        """Tokens of a text of `published` tokens; `least` is what it needs to be one of its kind."""
        return min(published, max(least, round(published * self.factor)))

    def count(self, published: int, least: int = 1) -> int:
        """How many there are of what were `published`."""
        return min(published, max(least, math.ceil(published * math.sqrt(self.factor))))


class Given(NamedTuple):
    """What a definition draws on."""

    scale: Scale
    draw: random.Random
    prose: Prose
    data: Path | None = None


@dataclass(frozen=True)
class Workload:
    """A definition. `rate`: requests per second where none is asked for; 0: it has times of its own.

    `data` says which file it reads, if any; `needs_data` that it cannot do without.
    """

    name: str
    about: str
    rate: float
    build: Callable[[Given], list[Request]]
    data: str = ""
    needs_data: bool = False


def round_robin(users: list[list[Request]]) -> list[Request]:
    """First rounds of all users, then second rounds, and so on."""
    rounds = max(map(len, users), default=0)
    return [turns[number] for number in range(rounds) for turns in users if number < len(turns)]
