"""Conversations like ShareGPT's: users with five rounds or more, the first two as history."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvbench.workloads.base import Given, Message, Request, Workload, round_robin
from kvbench.workloads.prose import Passage
from kvkeep.errors import ConfigError

__all__ = ["CONVERSATIONS"]

_USERS, _HISTORY, _LEAST_ROUNDS, _MOST_ROUNDS = 40, 2, 5, 7
# Log-normal lengths in tokens, cut at the ends: what people write has a mean of 90, what they get one of 220.
_ASKS, _ASKS_MOST = (4.15, 0.8), 400
_ANSWERS, _ANSWERS_MOST = (5.02, 1.0), 690
_FORMAT = 'a JSON list of {"conversations": [{"from": "human" or "gpt", "value": "text"}, …]}'


class _Round(NamedTuple):
    asks: str | Passage
    answers: str | Passage
    answer_tokens: int


class _Said(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Said]


def _build(given: Given) -> list[Request]:
    users = given.scale.count(_USERS)
    talks = _read(given, given.data, users) if given.data else [_made(given, user) for user in range(users)]
    return round_robin([_requests(user, rounds) for user, rounds in enumerate(talks)])


def _requests(user: int, rounds: list[_Round]) -> list[Request]:
    history = tuple(
        message
        for one in rounds[:_HISTORY]
        for message in (Message("user", (one.asks,)), Message("assistant", (one.answers,)))
    )
    return [
        Request(user, number, "", history, (one.asks,), one.answer_tokens)
        for number, one in enumerate(rounds[_HISTORY:])
    ]


def _made(given: Given, user: int) -> list[_Round]:
    rounds = []
    for number in range(given.draw.randint(_LEAST_ROUNDS, _MOST_ROUNDS)):
        asks = given.scale.tokens(_length(given.draw, _ASKS, 4, _ASKS_MOST), 8)
        answer = given.scale.tokens(_length(given.draw, _ANSWERS, 1, _ANSWERS_MOST), 4)
        name = f"user {user} round {number}"
        rounds.append(_Round(Passage(f"{name} asks", asks), Passage(f"{name} hears", answer), answer))
    return rounds


def _length(draw: random.Random, shape: tuple[float, float], least: int, most: int) -> int:
    return min(most, max(least, round(draw.lognormvariate(*shape))))


def _read(given: Given, path: Path, users: int) -> list[list[_Round]]:
    """The first conversations of a ShareGPT file that have enough rounds, in an order of the seed's."""
    try:
        items = msgspec.json.decode(path.read_bytes(), type=list[msgspec.Raw])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected: {_FORMAT}") from error
    talks = []
    for number, item in enumerate(items, 1):
        try:
            said = msgspec.json.decode(item, type=_Conversation).conversations
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, conversation {number}: {error}; expected: {_FORMAT}") from error
        if len(rounds := _rounds(given, said)) >= _LEAST_ROUNDS:
            talks.append(rounds)
    if not talks:
        raise ConfigError(f"{path} has no conversation of {_LEAST_ROUNDS} rounds or more")
    given.draw.shuffle(talks)
    return talks[:users]


def _rounds(given: Given, said: list[_Said]) -> list[_Round]:
    """Question and answer in turn, from the first question on, until the turns are out of order."""
    while said and said[0].speaker not in ("human", "user"):
        said = said[1:]
    rounds = []
    for asks, hears in zip(said[::2], said[1::2], strict=False):
        if asks.speaker not in ("human", "user") or hears.speaker not in ("gpt", "assistant"):
            break
        if not asks.value or not hears.value:
            break
        prose, scale = given.prose, given.scale
        answer = scale.tokens(prose.tokens(hears.value), 4)
        question = prose.cut(asks.value, scale.tokens(prose.tokens(asks.value), 8))
        rounds.append(_Round(question, prose.cut(hears.value, answer), answer))
    return rounds


CONVERSATIONS = Workload(
    "conversations",
    "40 users with 5 to 7 rounds, the first two as history, then round-robin with the server's answers",
    0.5,
    _build,
    data="conversations to use instead of made ones: a ShareGPT JSON file",
)
