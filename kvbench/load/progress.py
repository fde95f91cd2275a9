"""How a run goes, live, on a terminal; elsewhere nothing."""

from __future__ import annotations

import statistics
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvbench.load.schedule import Run

__all__ = ["Progress"]

_RECENT = 50


class Progress:
    """A context manager; `show` is what a run calls when something has changed."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        figures = TextColumn("{task.fields[figures]}")
        # Few refreshes: each takes the core that sends the requests for some milliseconds.
        self._bars = Bars(
            *columns, figures, console=console, refresh_per_second=2, disable=not console.is_terminal
        )
        self._task = self._bars.add_task(title, total=total, figures="")

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, run: Run) -> None:
        """Take over how far a run has come."""
        if self._bars.disable:
            return
        errors = sum(bool(one.error) for one in run.records[-_RECENT:])
        figures = f"{run.running} running, {errors} of the last {_RECENT} failed"
        if run.ttfts:
            figures += f", recent TTFT {statistics.median(run.ttfts[-_RECENT:]):.3f} s"
        self._bars.update(self._task, completed=len(run.records), figures=figures)
