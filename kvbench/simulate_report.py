"""What `kvkeep bench simulate` shows: a table, one JSON object, a picture, and one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

from kvbench.load.pictures import panes
from kvbench.trace import Trace
from kvkeep.cli.status import size
from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from kvbench.simulate import Sizes, Speeds

__all__ = ["Answer", "Result", "Summary", "as_json", "as_table", "save_plot"]

_COLUMNS = ("policy", "memory", "disk", "hits", "of disk", "loaded", "read", "written", "TTFT saved")


class Result(NamedTuple):
    """One case: what would have been hit, moved and saved. Field names are those of the JSON."""

    policy: str
    memory_bytes: int
    disk_bytes: int
    hit_ratio: float
    """Of the blocks looked up, those found with all before them."""
    disk_hit_ratio: float
    """The part of `hit_ratio` that was read from disk."""
    loaded_bytes: int
    """From memory to the engine."""
    saved_bytes: int
    """From the engine to memory."""
    disk_read_bytes: int
    disk_written_bytes: int
    ttft_saved_s: float
    """Mean over all requests: computing that was not needed, less the time of loading."""
    ttft_saved_ratio: float
    """The same, as a share of computing all prompts."""


class Answer(NamedTuple):
    """Which of the cases reach a share of the best possible hit ratio, with the least."""

    goal: float
    cases: list[Result]

    def text(self, best: float) -> str:
        """One sentence."""
        what = f"{self.goal:.0%} of the best possible hit ratio ({best:.3f})".replace("%", " %")
        if not self.cases:
            return f"{what} is not reached by any of these sizes: try more memory, or a larger disk."
        ways = [
            f"{size(case.memory_bytes)} of memory"
            + (f" and {size(case.disk_bytes)} of disk" if case.disk_bytes else " without disk")
            + f" ({case.policy}: {case.hit_ratio:.3f})"
            for case in self.cases
        ]
        return f"{what} needs {', or '.join(ways)}."


class Summary(NamedTuple):
    """What all cases have in common."""

    path: Path
    trace: Trace
    sizes: "Sizes"
    speeds: "Speeds"
    write: str
    best_hit_ratio: float
    """With room for everything."""
    answer: Answer


def as_json(summary: Summary, results: list[Result]) -> dict[str, object]:
    """The object that `--json` prints; docs/sizing.md says what each name means."""
    trace, sizes = summary.trace, summary.sizes
    return {
        "trace": str(summary.path),
        "requests": len(trace.chains),
        "blocks": trace.blocks,
        "unique_blocks": trace.unique,
        "block_tokens": sizes.block_tokens,
        "block_bytes": sizes.block_bytes,
        "chunk_tokens": sizes.chunk_tokens,
        "distinct_bytes": round(trace.unique * sizes.block_bytes),
        **summary.speeds._asdict(),
        "write": summary.write,
        "best_hit_ratio": summary.best_hit_ratio,
        "goal": summary.answer.goal,
        "answer": [case._asdict() for case in summary.answer.cases],
        "results": [result._asdict() for result in results],
    }


def as_table(summary: Summary, results: list[Result]) -> Table:
    """A row per case."""
    trace, sizes, speeds = summary.trace, summary.sizes, summary.speeds
    table = Table(
        title=f"{summary.path.name}: {len(trace.chains)} requests, {trace.blocks} blocks of "
        f"{sizes.block_tokens} tokens, {trace.unique} distinct ({size(trace.unique * sizes.block_bytes)} "
        f"at {size(sizes.block_bytes / sizes.block_tokens)} per token)",
        caption=f"Hit ratio with room for everything: {summary.best_hit_ratio:.3f}. TTFT saved: mean per "
        f"request, at {speeds.prefill_tokens_per_s:g} tokens/s, {speeds.memory_gbps:g} GB/s from memory, "
        f"{speeds.disk_gbps:g} from disk",
        box=box.SIMPLE,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        below = (
            f"{result.disk_hit_ratio:.3f}",
            size(result.disk_read_bytes),
            size(result.disk_written_bytes),
        )
        from_disk, read, written = below if result.disk_bytes else ("", "", "")
        table.add_row(
            result.policy,
            size(result.memory_bytes),
            size(result.disk_bytes) if result.disk_bytes else "none",
            f"{result.hit_ratio:.3f}",
            from_disk,
            size(result.loaded_bytes),
            read,
            written,
            f"{result.ttft_saved_s:.2f} s {result.ttft_saved_ratio:.0%}",
        )
    return table


def save_plot(path: Path, summary: Summary, results: list[Result]) -> None:
    """Draw hits, bytes and TTFT saved over memory, a line per disk and policy. Raises ConfigError where it
    cannot."""
    panels: dict[str, Callable[[Result], float]] = {
        "hit ratio": lambda one: one.hit_ratio,
        "GiB loaded; dashed: read from disk": lambda one: one.loaded_bytes / 2**30,
        "TTFT saved, share": lambda one: one.ttft_saved_ratio,
    }
    try:
        figure, axes = panes(len(panels), summary.path.name)
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'kvkeep[bench]'") from error
    for policy, disk in dict.fromkeys((result.policy, result.disk_bytes) for result in results):
        its = [one for one in results if (one.policy, one.disk_bytes) == (policy, disk)]
        its.sort(key=lambda one: one.memory_bytes)
        memory = [one.memory_bytes / 2**30 for one in its]
        name = f"{policy}, {size(disk)} of disk" if disk else f"{policy}, memory only"
        for axis, of in zip(axes, panels.values(), strict=True):
            axis.plot(memory, list(map(of, its)), marker="o", label=name)
        if disk:
            read = [one.disk_read_bytes / 2**30 for one in its]
            axes[1].plot(memory, read, "--", color=axes[1].lines[-1].get_color())
    axes[0].axhline(summary.best_hit_ratio, linestyle=":", color="gray", label="room for everything")
    for axis, title in zip(axes, panels, strict=True):
        axis.set(xscale="log", xlabel="memory, GiB", ylabel=title)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axes[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from error
