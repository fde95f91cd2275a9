"""A row per request, as it is kept and as it is written to CSV."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

__all__ = ["INTERRUPTED", "Record", "csv_rows"]

INTERRUPTED = "interrupted"
"""`error` of a request that was cut off because the run was stopped: neither answered nor failed."""


class Record(NamedTuple):
    """One request. Times are seconds since the run's start; None where it did not come to that."""

    request: int
    user: int
    round: int
    document: str
    scheduled_s: float
    """When the schedule wants it sent."""
    ready_s: float
    """`scheduled_s`, or the end of the same user's round before, if that is later."""
    sent_s: float
    token_times: list[float]
    """When each event with a piece of the answer arrived."""
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    asked_tokens: int
    error: str

    @property
    def ok(self) -> bool:
        """Whether it was answered to the end."""
        return not self.error

    @property
    def lateness_s(self) -> float:
        """What the generator itself was late by."""
        return self.sent_s - self.ready_s

    @property
    def delay_s(self) -> float:
        """What it waited for its user's own previous answer."""
        return self.ready_s - self.scheduled_s

    @property
    def ttft_s(self) -> float:
        """From sending to the first piece of the answer."""
        return self.token_times[0] - self.sent_s

    @property
    def latency_s(self) -> float:
        """From sending to the last piece of the answer."""
        return self.token_times[-1] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Times between the pieces of the answer."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None where there is no other."""
        if self.output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    @property
    def short(self) -> bool:
        """Whether the answer has fewer tokens than were asked for."""
        return self.ok and self.output_tokens < self.asked_tokens


_COLUMNS = (
    *("request", "user", "round", "document", "scheduled_s", "ready_s", "sent_s", "first_token_s", "end_s"),
    *("lateness_s", "delay_s", "prompt_tokens", "cached_tokens", "output_tokens", "asked_tokens"),
    *("ttft_s", "tpot_s", "latency_s", "itl_s", "error"),
)


@contextlib.contextmanager
def csv_rows(path: Path) -> Iterator[Callable[[Record], object]]:
    """What adds a row to a new file, below a header; `itl_s` holds all gaps of an answer, spaces between.

    A row is in the file when the call returns, whatever becomes of this process then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        yield lambda record: writer.writerow(_row(record))


def _row(one: Record) -> list[str | int]:
    first, end = (_s(one.token_times[0]), _s(one.token_times[-1])) if one.token_times else ("", "")
    cached = "" if one.cached_tokens is None else one.cached_tokens
    took = [_s(one.ttft_s), _s(one.tpot_s), _s(one.latency_s)] if one.ok else ["", "", ""]
    return [
        *(one.request, one.user, one.round, one.document),
        *(_s(one.scheduled_s), _s(one.ready_s), _s(one.sent_s), first, end),
        *(_s(one.lateness_s), _s(one.delay_s)),
        *(one.prompt_tokens, cached, one.output_tokens, one.asked_tokens),
        *(*took, " ".join(map(_s, one.itl_s)), " ".join(one.error.split())),
    ]


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.6f}"
