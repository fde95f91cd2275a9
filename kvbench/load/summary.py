"""What a run comes to: the figures of `summary.json`, each defined in docs/bench-serve.md."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvbench.load.record import INTERRUPTED, Record

__all__ = ["Slo", "kept_schedule", "parse_slo", "spread", "summarize"]

_LATE_SECONDS, _LATE_SHARE, _LATE_MOST = 0.02, 0.1, 0.1
_FAILURES = 5
_BOUNDS = ("ttft", "itl", "tpot", "latency")


class Slo(NamedTuple):
    """Bounds in seconds that a good request keeps, by name."""

    bounds: dict[str, float]

    def met(self, one: Record) -> bool:
        """Whether an answered request keeps all bounds; `itl` bounds its longest gap, `tpot` the mean."""
        took = {
            "ttft": one.ttft_s,
            "itl": max(one.itl_s, default=0.0),
            "tpot": one.tpot_s or 0.0,
            "latency": one.latency_s,
        }
        return all(took[name] <= bound for name, bound in self.bounds.items())


def parse_slo(text: str) -> Slo:
    """`ttft=2s,itl=100ms` → bounds. Raises what argparse reports."""
    bounds = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value)
        if name not in _BOUNDS or not found:
            names = ", ".join(_BOUNDS)
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=TIME, with {names} and s or ms")
        bounds[name] = float(found[1]) / (1000 if found[2] == "ms" else 1)
    return Slo(bounds)


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles, linearly interpolated; all None where there are no values."""
    names = ("mean", "p50", "p90", "p95", "p99")
    array = np.fromiter(values, float)
    if not len(array):
        return dict.fromkeys(names)
    figures = [array.mean(), *np.percentile(array, [50, 90, 95, 99])]
    return {name: round(float(figure), 6) for name, figure in zip(names, figures, strict=True)}


def kept_schedule(records: Sequence[Record], rate: float) -> bool:
    """Whether the generator sent in time: of 100 requests 99 within 20 ms, or a tenth of their interval up to
    100 ms."""
    allowed = max(_LATE_SECONDS, min(_LATE_MOST, _LATE_SHARE / rate) if rate else 0.0)
    return bool(np.percentile([one.lateness_s for one in records] or [0.0], 99) <= allowed)


def summarize(records: Sequence[Record], rate: float, slo: Slo | None, stopped: str) -> dict[str, Any]:
    """Figures of one run. Answers that failed or were cut off count in no time and no throughput."""
    good = [one for one in records if one.ok]
    seconds = max((one.token_times[-1] for one in good), default=0.0)
    tokens = [sum(one.prompt_tokens for one in good), sum(one.output_tokens for one in good)]
    cached = [one.cached_tokens for one in good if one.cached_tokens is not None]
    sending = max((one.sent_s for one in records), default=0.0)
    return {
        "requests": len(records),
        "errors": sum(one.error not in ("", INTERRUPTED) for one in records),
        "failures": _failures(records),
        "unfinished": sum(one.error == INTERRUPTED for one in records),
        "short_answers": sum(one.short for one in good),
        "ttft_s": spread(one.ttft_s for one in good),
        "itl_s": spread(gap for one in good for gap in one.itl_s),
        "tpot_s": spread(one.tpot_s for one in good if one.tpot_s is not None),
        "latency_s": spread(one.latency_s for one in good),
        "lateness_s": spread(one.lateness_s for one in records),
        "delayed": sum(one.delay_s > 0 for one in records),
        "delay_s": spread(one.delay_s for one in records),
        "seconds": round(seconds, 6),
        "prompt_tokens": tokens[0],
        "cached_tokens": sum(cached) if cached else None,
        "output_tokens": tokens[1],
        "prompt_tokens_per_s": _per(tokens[0], seconds),
        "output_tokens_per_s": _per(tokens[1], seconds),
        "requests_per_s": _per(len(good), seconds),
        "goodput": _goodput(good, seconds, slo),
        "rate": rate or None,
        "sent_rate": _per(len(records) - 1, sending),
        "kept_schedule": kept_schedule(records, rate),
        "partial": bool(stopped),
        "stopped": stopped or None,
    }


def _failures(records: Sequence[Record]) -> dict[str, int]:
    """The most common errors and how often each came."""
    return dict(Counter(one.error for one in records if one.error).most_common(_FAILURES))


def _goodput(good: Sequence[Record], seconds: float, slo: Slo | None) -> dict[str, Any] | None:
    if slo is None:
        return None
    met = sum(map(slo.met, good))
    bounds = {f"{name}_s": bound for name, bound in slo.bounds.items()}
    return {"slo": bounds, "requests": met, "requests_per_s": _per(met, seconds)}


def _per(count: int, seconds: float) -> float | None:
    return round(count / seconds, 6) if seconds > 0 else None
