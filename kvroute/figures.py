"""What the router has done, for `/metrics` and the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

from kvkeep.observe.histogram import Histogram
from kvroute.backends import Pool
from kvroute.gate import Gate
from kvroute.index import Index
from kvroute.subscribe import Subscriber

__all__ = ["CONTENT_TYPE", "Figures", "metrics", "summary"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_QUICK = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


def _counter(text: str) -> Any:
    return field(default=0, metadata={"text": text, "total": True})


_OWN = {"text": "The router's own time until a request is on its way, but for waits, tokens and prefill."}
_TOKENIZE = {"text": "Waits for the tokens of prompts."}
_FIRST_BYTE = {"text": "From a request's arrival to the first byte of its answer."}


@dataclass
class Figures:
    """Counted as it happens. Times in seconds."""

    requests: int = _counter("Requests taken on.")
    retries: int = _counter("Times that another engine was tried before the first byte.")
    cut: int = _counter("Answers that broke off because their engine did.")
    left: int = _counter("Requests whose client went away.")
    prompt_tokens: int = _counter("Tokens of prompts, where they were known.")
    held_tokens: int = _counter("Tokens of those that the chosen engine held, as far as was known.")
    unknown_tokens: int = _counter("Requests routed by their text, because their tokens could not be had.")
    prefill_failed: int = _counter("Requests whose prefill failed, so that the decode engine computed all.")
    prefill_skipped: int = _counter("Requests with so little to compute that the decode engine did it.")
    own: Histogram = field(default_factory=partial(Histogram, _QUICK), metadata=_OWN)
    tokenize: Histogram = field(default_factory=partial(Histogram, _QUICK), metadata=_TOKENIZE)
    first_byte: Histogram = field(default_factory=partial(Histogram, _SLOW), metadata=_FIRST_BYTE)
    refused: dict[str, int] = field(default_factory=dict)  # by the kind of error

    def refuse(self, kind: str) -> None:
        """One more that was not taken on."""
        self.refused[kind] = self.refused.get(kind, 0) + 1

    def totals(self) -> Counter[str]:
        """All counters, by name."""
        counts = Counter({f.name: int(getattr(self, f.name)) for f in fields(self) if "total" in f.metadata})
        return counts + Counter(refused=sum(self.refused.values()))


def summary(since: Counter[str], seconds: float, pool: Pool) -> str:
    """What has happened in the last seconds, as a line of the log."""
    up = sum(one.up for one in pool.backends.values())
    running = sum(one.in_flight for one in pool.backends.values())
    prompt, held = since["prompt_tokens"], since["held_tokens"]
    share = f", engines held {held / prompt:.0%} of {prompt} prompt tokens" if prompt else ""
    return (
        f"{since['requests'] / seconds:.1f} requests/s, {running} running, "
        f"{up} of {len(pool.backends)} engines up{share}; "
        f"{since['retries']} retries, {since['cut']} cut off, {since['refused']} refused"
    )


class _Family(NamedTuple):
    name: str
    kind: str
    text: str
    samples: list[tuple[str, float]]


def metrics(figures: Figures, pool: Pool, gate: Gate, index: Index, subscriber: Subscriber) -> bytes:
    """All metrics in Prometheus' text format."""
    lines, families = [], [*_requests(figures, gate), *_engines(pool, index), *_events(index, subscriber)]
    for name, kind, text, samples in families:
        lines.append(f"# HELP kvroute_{name} {text}\n# TYPE kvroute_{name} {kind}\n")
        lines += [f"kvroute_{name}{labels} {value}\n" for labels, value in samples]
    return "".join(lines).encode()


_BACKEND = {
    "up": "1 while requests go to an engine.",
    "waiting": "Requests at an engine that have no answer yet.",
    "waiting_tokens": "Tokens that an engine has to compute for them, as far as is known.",
    "streams": "Requests that an engine is answering.",
}


def _requests(figures: Figures, gate: Gate) -> Iterator[_Family]:
    for one in fields(figures):
        value, text = getattr(figures, one.name), one.metadata.get("text", "")
        if isinstance(value, int):
            yield _Family(f"{one.name}_total", "counter", text, [("", value)])
        elif isinstance(value, Histogram):
            counts = [(f'_bucket{{le="{bound}"}}', count) for bound, count in value.buckets()]
            samples = [*counts, ("_sum", value.sum), ("_count", counts[-1][1])]
            yield _Family(f"{one.name}_seconds", "histogram", text, samples)
    refused = [(_labels(kind=kind), float(count)) for kind, count in figures.refused.items()]
    yield _Family("refused_total", "counter", "Requests not taken on, by why.", refused)
    yield _Family("running", "gauge", "Requests that have their turn.", [("", gate.running)])
    yield _Family("bodies_bytes", "gauge", "Memory that their bodies take, or may.", [("", gate.bytes)])
    yield _Family("queued", "gauge", "Requests that wait for a turn.", [("", gate.waiting)])


def _engines(pool: Pool, index: Index) -> Iterator[_Family]:
    backends = list(pool.backends.values())
    for name, text in _BACKEND.items():
        samples = [(_labels(engine=one.name), float(getattr(one, name))) for one in backends]
        yield _Family(f"engine_{name}", "gauge", text, samples)
    ends = [(one.name, end, count) for one in backends for end, count in one.answers.items()]
    ended = [(_labels(engine=name, end=end), float(count)) for name, end, count in ends]
    yield _Family("engine_requests_total", "counter", "Requests sent to an engine, by how they ended.", ended)
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
        ("restored", counters.restored, "Blocks known from a snapshot."),
        ("malformed", decoder.bad_messages + decoder.bad_events, "Messages and events dropped as malformed."),
        ("orphans", index.orphans, "Blocks passed over because the block before them is not known."),
        ("refused", index.refused, "Events passed over because they contradict themselves."),
        ("forgotten", index.forgotten, "Blocks forgotten because the index is full."),
    ):
        yield _Family(f"events_{name}_total", "counter", text, [("", value)])


def _labels(**labels: str) -> str:
    escaped = {name: value.replace("\\", r"\\").replace('"', r"\"") for name, value in labels.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
