"""What a comparison keeps on disk: one record per run, and the machines it ran on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from kvbench.compare.machine import Machine
from kvbench.compare.plan import Plan
from kvkeep.errors import ConfigError, KVKeepError

__all__ = ["Case", "Ledger", "Run", "Spread", "Summary", "read_summary"]


class Spread(msgspec.Struct, frozen=True):
    """Of one figure over the requests of a run; None where no request has it."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """What the load generator wrote; other fields of its summary.json are left there."""

    workload: str
    requests: int
    errors: int
    ttft_s: Spread
    itl_s: Spread
    latency_s: Spread
    output_tokens_per_s: float | None
    tpot_s: Spread = Spread()
    lateness_s: Spread = Spread()
    rate: float | None = None
    requests_per_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    goodput: dict[str, Any] | None = None
    short_answers: int = 0
    kept_schedule: bool = True
    partial: bool = False


class Case(NamedTuple):
    """What is run once in each round."""

    rate: float
    setup: str


class Run(msgspec.Struct, frozen=True):
    """One run that has ended; `why` is empty where it was whole."""

    round: int
    rate: float
    setup: str
    started: str
    seconds: float
    engine: str
    """The server's command line."""
    why: str = ""
    summary: Summary | None = None
    load: float = 0.0
    """Processes that wanted to run in the minute before it."""
    stolen: float = 0.0
    """Share of this machine's cores that its host gave to others under load."""

    @property
    def case(self) -> Case:
        """Set-up and rate."""
        return Case(self.rate, self.setup)

    @property
    def counts(self) -> bool:
        """Whether its figures are the set-up's: it was whole, and the load was sent in time."""
        return not self.why and self.summary is not None and self.summary.kept_schedule


class _Head(msgspec.Struct):
    plan: Plan
    machines: list[Machine]


class Ledger:
    """A comparison's directory: `plan.json`, and a folder per run, whose `run.json` says that it ended."""

    def __init__(self, folder: Path, plan: Plan, machine: Machine, *, resume: bool) -> None:
        """Begin, or with `resume` go on with, a comparison. Raises ConfigError where the other is due."""
        self.folder, self.plan = folder, plan
        head, path = _Head(plan, []), folder / "plan.json"
        if path.exists() and not resume:
            raise ConfigError(f"{folder} holds a comparison: go on with --resume, or name another directory")
        if path.exists():
            head = _decode(path, _Head)
            if (other := _first_difference(head.plan, plan)) is not None:
                raise ConfigError(f"{folder} holds one with another `{other}`: name another directory")
        if not head.machines or head.machines[-1].lasting() != machine.lasting():
            head.machines.append(machine)
        self.machines = head.machines
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.format(msgspec.json.encode(_Head(plan, head.machines))))
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
        self.runs = {self._key(run): run for run in self._read()}

    def done(self, turn: int, case: Case) -> bool:
        """Whether this run was whole."""
        run = self.runs.get((turn, case))
        return run is not None and not run.why

    def place(self, turn: int, case: Case) -> Path:
        """Where a run's files go."""
        slug = re.sub(r"[^\w.-]+", "-", case.setup)[:40]
        number = self.plan.names().index(case.setup) + 1
        return self.folder / "runs" / f"round{turn}-rate{case.rate:.12g}-{number}-{slug}"

    def keep(self, run: Run) -> None:
        """Write a run down."""
        self.runs[self._key(run)] = run
        path = self.place(run.round, run.case) / "run.json"
        aside = path.with_suffix(".tmp")
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(run)))
        aside.replace(path)

    def _read(self) -> Iterable[Run]:
        for path in sorted((self.folder / "runs").glob("*/run.json")):
            run = _decode(path, Run)
            if path.parent == self.place(run.round, run.case) and run.round <= self.plan.rounds:
                yield run

    def _key(self, run: Run) -> tuple[int, Case]:
        return run.round, run.case


def read_summary(path: Path) -> Summary:
    """What the load generator wrote. Raises KVKeepError where it is not there, or not a summary."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except OSError as error:
        raise KVKeepError(f"the load wrote no {path.name}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KVKeepError(f"the load's {path.name} is not a summary: {error}") from error


def _first_difference(old: Plan, new: Plan) -> str | None:
    """A field in which two plans differ, other than the number of rounds: more may follow."""
    fields = (name for name in Plan.__struct_fields__ if name != "rounds")
    return next((name for name in fields if getattr(old, name) != getattr(new, name)), None)


_K = TypeVar("_K", _Head, Run)


def _decode(path: Path, kind: type[_K]) -> _K:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
