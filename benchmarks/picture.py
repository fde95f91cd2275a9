"""One picture of several comparisons: TTFT and ITL by rate, a column per workload.

    python benchmarks/picture.py DIRECTORY… --output FILE.png

Each directory is what `kvkeep bench compare --output` made. Dots are medians over rounds, bars reach from the
least to the greatest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FIGURES = {"TTFT, p50": "TTFT, median, ms", "ITL, mean": "ITL, mean, ms"}
NAMES = {"engine": "vLLM alone", "embedded": "vLLM with kvkeep"}
LOOKS = ({"color": "#000000", "marker": "o"}, {"color": "#0072B2", "marker": "s"})


def draw(axes: Any, table: list[dict[str, Any]], figure: str) -> None:
    """A line per set-up."""
    rows = [row for row in table if row["figure"] == figure and row["values"]]
    setups = list(dict.fromkeys(row["setup"] for row in rows))
    for setup, look in zip(setups, LOOKS, strict=False):
        its = [row for row in rows if row["setup"] == setup]
        low, middle, high = ([1e3 * row["values"][key] for row in its] for key in ("low", "median", "high"))
        below = [one - least for one, least in zip(middle, low, strict=True)]
        above = [most - one for one, most in zip(middle, high, strict=True)]
        label = NAMES.get(setup, setup)
        axes.errorbar([row["rate"] for row in its], middle, [below, above], capsize=3, label=label, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates := sorted({row["rate"] for row in rows}), [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    if figure.startswith("TTFT"):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", which="both", alpha=0.25)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = [json.loads((folder / "compare.json").read_text()) for folder in args.directories]
    canvas = Figure(figsize=(3.4 * len(found), 5.4), layout="constrained")
    grid = canvas.subplots(len(FIGURES), len(found), squeeze=False)
    for column, one in enumerate(found):
        grid[0][column].set_title(one["workload"].replace("_", " "), fontsize=10)
        grid[-1][column].set_xlabel("requests per second")
        for row, (figure, label) in enumerate(FIGURES.items()):
            draw(grid[row][column], one["table"], figure)
            if not column:
                grid[row][column].set_ylabel(label)
    canvas.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    canvas.savefig(args.output, dpi=144)


if __name__ == "__main__":
    main()
