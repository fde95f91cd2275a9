"""What the router has done, for `/metrics` and the log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from kvkeep.observe.histogram import Histogram
from kvroute.backends import Pool
from kvroute.gate import Gate
from kvroute.index import Index
from kvroute.subscribe import Subscriber

__all__ = ["CONTENT_TYPE", "Figures", "Summary", "metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_QUICK = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


def _quick() -> Histogram:
    return Histogram(_QUICK)


@dataclass
class Figures:
    """Counted as it happens. Times in seconds."""

    requests: int = 0
    """Requests taken on."""
    refused: dict[str, int] = field(default_factory=dict)
    """Requests that were not, by the kind of error."""
    retries: int = 0
    """Times that another engine was tried."""
    cut: int = 0
    """Answers that broke off because their engine did."""
    left: int = 0
    """Requests whose client went away."""
    prompt_tokens: int = 0
    """Tokens of prompts, where they were known."""
    held_tokens: int = 0
    """Tokens of those that the chosen engine held, as far as was known."""
    unknown_tokens: int = 0
    """Requests routed by their text, because their tokens could not be had."""
    prefill_failed: int = 0
    """Requests whose prefill failed, so that the decode engine computed all."""
    prefill_skipped: int = 0
    """Requests with so little to compute that the decode engine did it."""
    own: Histogram = field(default_factory=_quick)
    """From a request's arrival to its way to the engine, without waits for turns and tokens."""
    tokenize: Histogram = field(default_factory=_quick)
    """Waits for tokens."""
    first_byte: Histogram = field(default_factory=lambda: Histogram(_SLOW))
    """From a request's arrival to the first byte of its answer."""

    def refuse(self, kind: str) -> None:
        """One more that was not taken on."""
        self.refused[kind] = self.refused.get(kind, 0) + 1


class Summary(NamedTuple):
    """Figures between two log lines."""

    requests: int
    prompt_tokens: int
    held_tokens: int
    retries: int
    cut: int
    refused: int

    @classmethod
    def of(cls, now: Figures) -> Summary:
        """Up to now."""
        refused = sum(now.refused.values())
        return cls(now.requests, now.prompt_tokens, now.held_tokens, now.retries, now.cut, refused)

    def line(self, before: Summary, seconds: float, pool: Pool) -> str:
        """What has happened since `before`."""
        requests, prompt, held, retries, cut, refused = (
            now - then for now, then in zip(self, before, strict=True)
        )
        up = sum(one.up for one in pool.backends.values())
        running = sum(one.in_flight for one in pool.backends.values())
        share = f", engines held {held / prompt:.0%} of {prompt} prompt tokens" if prompt else ""
        return (
            f"{requests / seconds:.1f} requests/s, {running} running, {up} of {len(pool.backends)} engines up"
            f"{share}; {retries} retries, {cut} cut off, {refused} refused"
        )


class _Family(NamedTuple):
    name: str
    kind: str
    text: str
    samples: list[tuple[str, float]]


def metrics(
    figures: Figures, pool: Pool, gate: Gate, index: Index | None, subscriber: Subscriber | None
) -> bytes:
    """All metrics in Prometheus' text format."""
    lines = []
    families = [*_requests(figures, gate), *_engines(pool, index)]
    if index is not None and subscriber is not None:
        families += _events(index, subscriber)
    for name, kind, text, samples in families:
        lines.append(f"# HELP kvroute_{name} {text}\n# TYPE kvroute_{name} {kind}\n")
        lines += [f"kvroute_{name}{labels} {value}\n" for labels, value in samples]
    for name in ("own", "tokenize", "first_byte"):
        histogram: Histogram = getattr(figures, name)
        full = f"kvroute_{name}_seconds"
        lines.append(f"# HELP {full} {_HISTOGRAMS[name]}\n# TYPE {full} histogram\n")
        buckets = histogram.buckets()
        lines += [f'{full}_bucket{{le="{bound}"}} {count}\n' for bound, count in buckets]
        lines.append(f"{full}_sum {histogram.sum}\n{full}_count {buckets[-1][1]}\n")
    return "".join(lines).encode()


_HISTOGRAMS = {
    "own": "What the router itself takes before a request is on its way to an engine.",
    "tokenize": "Waits for the tokens of prompts.",
    "first_byte": "From a request's arrival to the first byte of its answer.",
}
_COUNTERS = {
    "requests": "Requests taken on.",
    "retries": "Times that another engine was tried before the first byte.",
    "cut": "Answers that broke off because their engine did.",
    "left": "Requests whose client went away.",
    "prompt_tokens": "Tokens of prompts, where they were known.",
    "held_tokens": "Tokens of those that the chosen engine held, as far as was known.",
    "unknown_tokens": "Requests routed by their text, because their tokens could not be had.",
    "prefill_failed": "Requests whose prefill failed, so that the decode engine computed all.",
    "prefill_skipped": "Requests with so little to compute that the decode engine did it.",
}
_BACKEND = {
    "up": "1 while requests go to an engine.",
    "waiting": "Requests at an engine that have no answer yet.",
    "waiting_tokens": "Tokens that an engine has to compute for them, as far as is known.",
    "streams": "Requests that an engine is answering.",
}


def _requests(figures: Figures, gate: Gate) -> Iterator[_Family]:
    assert set(_COUNTERS) < {one.name for one in fields(figures)}
    for name, text in _COUNTERS.items():
        yield _Family(f"{name}_total", "counter", text, [("", getattr(figures, name))])
    refused = [(_labels(kind=kind), float(count)) for kind, count in figures.refused.items()]
    yield _Family("refused_total", "counter", "Requests not taken on, by why.", refused)
    yield _Family("running", "gauge", "Requests that have their turn.", [("", gate.running)])
    yield _Family("queued", "gauge", "Requests that wait for a turn.", [("", gate.waiting)])


def _engines(pool: Pool, index: Index | None) -> Iterator[_Family]:
    backends = list(pool.backends.values())
    for name, text in _BACKEND.items():
        samples = [(_labels(engine=one.name), float(getattr(one, name))) for one in backends]
        yield _Family(f"engine_{name}", "gauge", text, samples)
    ended = [
        (_labels(engine=one.name, end=end), float(count))
        for one in backends
        for end, count in one.answers.items()
    ]
    yield _Family("engine_requests_total", "counter", "Requests sent to an engine, by how they ended.", ended)
    if index is not None:
        held = [(_labels(engine=one.name), float(index.blocks(one.name))) for one in backends]
        yield _Family("engine_blocks", "gauge", "Blocks of KV that an engine holds, by its events.", held)


def _events(index: Index, subscriber: Subscriber) -> Iterator[_Family]:
    counters, decoder = subscriber.counters, subscriber.decoder
    for name, value, text in (
        ("messages", counters.messages, "Messages with events that engines sent."),
        ("gaps", counters.gaps, "Times that some were missing."),
        ("replayed", counters.replayed, "Messages that came by replay."),
        ("resets", counters.resets, "Times that what an engine holds was not known any more."),
        ("restarts", counters.restarts, "Times that an engine was started anew."),
        ("malformed", decoder.bad_messages + decoder.bad_events, "Messages and events dropped as malformed."),
        ("orphans", index.orphans, "Blocks passed over because the block before them is not known."),
        ("refused", index.refused, "Events passed over because they contradict themselves."),
        ("forgotten", index.forgotten, "Blocks forgotten because the index is full."),
    ):
        yield _Family(f"events_{name}_total", "counter", text, [("", value)])


def _labels(**labels: str) -> str:
    escaped = {name: value.replace("\\", r"\\").replace('"', r"\"") for name, value in labels.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
