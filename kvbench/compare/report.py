"""What a comparison says: tables for the terminal, and one HTML file that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbench.compare.figures import ANSWERED, KNEE, Range, Reading, Row, digits, rows
from kvbench.compare.picture import draw
from kvbench.compare.plan import BUILT_IN, Plan, SetUp
from kvbench.compare.records import Ledger, Run
from kvbench.compare.runner import order
from kvbench.process import without_passwords

__all__ = ["in_short", "partial", "remarks", "tables", "write"]

HTML, PICTURE, DATA = "report.html", "compare.png", "compare.json"
_SHOWN = ("TTFT, p50", "ITL, mean")  # what the sentences are about
_PAGE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


class _Part(NamedTuple):
    """What a report says of one set-up."""

    name: str
    what: str
    command: str
    environ: str
    state: str
    failures: list[Run]


def write(ledger: Ledger, skipped: Mapping[str, str], broken_off: bool) -> Path:
    """Write report.html, compare.png and compare.json into the comparison's directory."""
    plan, runs = ledger.plan, sorted(ledger.runs.values(), key=lambda run: run.started)
    table = rows(plan, runs)
    picture = draw(plan, runs, f"{plan.workload}, scale {plan.scale:g}")
    page = _PAGE.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    named = zip(plan.names(), plan.setups, strict=True)
    html = page.render(
        plan=plan,
        load=without_passwords(f"{plan.load} {plan.load_args}"),
        title=f"{plan.workload}: {', '.join(plan.names())}",
        partial=partial(ledger, skipped, broken_off),
        sentences=in_short(plan, table),
        remarks=remarks(runs, skipped),
        picture=base64.b64encode(picture).decode(),
        tables=_by_figure(table),
        parts=[_part(name, setup, ledger, skipped) for name, setup in named],
        runs=runs,
        machines=ledger.machines,
    )
    (ledger.folder / PICTURE).write_bytes(picture)
    (ledger.folder / DATA).write_bytes(msgspec.json.format(msgspec.json.encode(_data(ledger, table))))
    path = ledger.folder / HTML
    aside = path.with_suffix(".tmp")
    aside.write_text(html, encoding="utf-8")
    aside.replace(path)
    return path


def partial(ledger: Ledger, skipped: Mapping[str, str], broken_off: bool) -> str:
    """What a partial report lacks; empty for a whole one."""
    wanted = [one for one in order(ledger.plan) if one[1].setup not in skipped]
    done = sum(ledger.done(*one) for one in wanted)
    if done == len(wanted):
        return ""
    return f"{done} of {len(wanted)} runs" + (", broken off" if broken_off else "")


def in_short(plan: Plan, table: list[Row]) -> list[str]:
    """A sentence for each set-up and figure that users feel, over the rates."""
    first, found = plan.names()[0], list[str]()
    for title in _SHOWN:
        for name in plan.names()[1:]:
            mine = [row for row in table if (row.figure.title, row.setup) == (title, name) and row.ratio]
            if mine:
                said = "; ".join(f"at {row.rate:g}/s {_said(row)}" for row in mine)
                found.append(f"{title}, {name} against {first}: {said}.")
    for name, shares in _answered(plan, table).items():
        said = ", ".join(f"{digits(share)} at {rate:g}/s" for rate, share in shares.items())
        knee = _knee(shares)
        last = f"its knee is {knee:g}/s" if knee else "it keeps up with none of these rates"
        found.append(f"{name} answered of what was offered: {said}; {last}.")
    return found


def _answered(plan: Plan, table: list[Row]) -> dict[str, dict[float, float]]:
    """By set-up and rate, the median share of what was offered that was answered."""
    mine = [row for row in table if row.figure is ANSWERED and row.values]
    found = {
        name: {row.rate: row.values.median for row in mine if row.setup == name and row.values}
        for name in plan.names()
    }
    return {name: shares for name, shares in found.items() if shares}


def _knee(shares: Mapping[float, float]) -> float | None:
    """The highest rate that a set-up keeps up with."""
    return max((rate for rate, share in shares.items() if share >= KNEE), default=None)


def remarks(runs: Iterable[Run], skipped: Mapping[str, str]) -> list[str]:
    """What is not there, and what makes figures of whole runs say less than they seem to."""
    found = [f"{name} is skipped: {why}." for name, why in skipped.items()]
    for run in runs:
        if run.why or run.summary is None:
            continue
        where = f"{run.setup} at {run.rate:g}/s, round {run.round}"
        if run.summary.errors:
            failed = f"{run.summary.errors} of {run.summary.requests} requests failed"
            found.append(f"{where}: {failed}; its figures are of the others.")
        if not run.summary.kept_schedule:
            found.append(f"{where}: the load was not sent in time; its figures are left out.")
    return found


def _said(row: Row) -> str:
    assert row.ratio is not None
    if row.reading is Reading.SAME:
        return f"no difference shown ({row.ratio.text()} of it)"
    low, high = row.ratio.low, row.ratio.high
    word, ratio = "higher", row.ratio
    if ratio.median < 1:
        word, ratio = "lower", Range(1 / ratio.median, 1 / high, 1 / low)
    if row.reading is Reading.ONCE:
        return f"{digits(ratio.median)} times {word}, one round"
    each = " in each round" if row.reading.name.startswith("EACH") else ""
    return f"{ratio.text()} times {word}{each}"


def _by_figure(table: list[Row]) -> list[tuple[float, list[tuple[str, list[Row]]]]]:
    """Rate by rate, figure by figure; without set-ups that have no value there."""
    found = []
    for rate, of_rate in groupby(table, key=lambda row: row.rate):
        figures = groupby((row for row in of_rate if row.values), key=lambda row: row.figure.title)
        found.append((rate, [(title, list(group)) for title, group in figures]))
    return found


def tables(plan: Plan, table: list[Row], console: Console) -> None:
    """Print one table per rate."""
    first = escape(plan.names()[0])
    for rate, figures in _by_figure(table):
        title = f"{escape(plan.workload)}, scale {plan.scale:g}, {rate:g} requests/s"
        caption = f"median (least … greatest) over n rounds; × {first}: round by round"
        page = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0)
        for heading in ("", "set-up", "median", "n", f"× {first}", ""):
            page.add_column(heading, overflow="fold")
        for name, group in figures:
            page.add_section()
            for number, row in enumerate(group):
                ratio = row.ratio.text() if row.ratio and row.reading is not Reading.FIRST else ""
                values = row.figure.text(row.values) if row.values else "–"
                reading = "" if row.reading is Reading.FIRST else row.reading.value
                cells = ("" if number else name, escape(row.setup), values, str(row.rounds))
                page.add_row(*cells, ratio, reading)
        console.print(page)


def _part(name: str, setup: str | SetUp, ledger: Ledger, skipped: Mapping[str, str]) -> _Part:
    mine = [run for run in ledger.runs.values() if run.setup == name]
    planned = ledger.plan.rounds * len(ledger.plan.rates)
    whole = sum(not run.why for run in mine)
    command = next((run.engine for run in mine if run.engine), "")
    if isinstance(setup, SetUp):
        what, environ = "a command of the plan's", ", ".join(sorted(setup.env))
        command = command or without_passwords(setup.command)
    else:
        what, environ = BUILT_IN[setup], ""
    state = f"skipped: {skipped[name]}" if name in skipped else f"{whole} of {planned} runs"
    return _Part(name, what, command, environ, state, [run for run in mine if run.why])


def _data(ledger: Ledger, table: list[Row]) -> dict[str, Any]:
    """All of it, for other programs."""
    figures = [
        {
            "rate": row.rate,
            "figure": row.figure.title,
            "unit": row.figure.unit,
            "setup": row.setup,
            "rounds": row.rounds,
            "values": row.values and row.values._asdict(),
            "ratio": row.ratio and row.ratio._asdict(),
            "reading": row.reading.name.lower(),
        }
        for row in table
    ]
    knees = {name: _knee(shares) for name, shares in _answered(ledger.plan, table).items()}
    return {"workload": ledger.plan.workload, "machines": ledger.machines, "knees": knees, "table": figures}
