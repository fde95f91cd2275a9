"""What `kvkeep bench simulate` shows: a table, one JSON object, a picture, and one sentence."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

from kvbench.trace import Trace
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


def size(nbytes: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"


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
    """Draw hit ratio over memory, a line per disk and policy. Raises ConfigError where it cannot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'kvkeep[demo]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for policy, disk in dict.fromkeys((result.policy, result.disk_bytes) for result in results):
        line = sorted(
            (result.memory_bytes / 2**30, result.hit_ratio)
            for result in results
            if (result.policy, result.disk_bytes) == (policy, disk)
        )
        name = f"{policy}, {size(disk)} of disk" if disk else f"{policy}, memory only"
        axes.plot(*zip(*line, strict=True), marker="o", label=name)
    axes.axhline(summary.best_hit_ratio, linestyle=":", color="gray", label="room for everything")
    axes.set(xscale="log", xlabel="memory, GiB", ylabel="hit ratio", title=summary.path.name)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from error
