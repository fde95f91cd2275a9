"""docs/route.md and docs/kv-index.md say what the code does."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

from kvroute.index import MEDIA
from kvroute.options import POLICIES, Options, add_arguments
from kvroute.policy import MISSING_WEIGHT, STREAM_TOKENS, TIER_WEIGHTS
from tests.kvroute.scene import played, scene

DOCS = Path(__file__).parents[2] / "docs"
ROUTE, INDEX = ((DOCS / name).read_text() for name in ("route.md", "kv-index.md"))


def test_metrics() -> None:
    async def play() -> None:
        async with scene(1) as s:
            await s.refused("{")
            await s.ask("a")
            names = {name.partition("{")[0] for name in await s.metrics()}
        shown = {re.sub(r"(seconds)_(bucket|sum|count)$", r"\1", name) for name in names}
        assert set(re.findall(r"`(kvroute_\w+)", ROUTE)) == shown

    played(play)


def test_policies_and_their_weights() -> None:
    for policy in POLICIES:
        assert f"| `{policy}`" in ROUTE
    assert f"{MISSING_WEIGHT} × what the engine does not hold" in ROUTE
    assert f"+ {STREAM_TOKENS} for each request" in ROUTE
    assert TIER_WEIGHTS == (1.0, 0.8, 0.5)
    assert "whole on the GPU, 0.8 in host memory, 0.5 in storage" in ROUTE


def test_options_and_their_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {word for action in parser._actions for word in action.option_strings if word.startswith("--")}
    told = set(re.findall(r"--[a-z][a-z-]+", ROUTE)) - {"--kv-events-config", "--data-parallel-external-lb"}
    assert told == options - {"--help"}
    default = {field.name: field.default for field in fields(Options)}
    assert (default["max_body"], default["max_requests"], default["queue"]) == (32 << 20, 4096, 1024)
    assert "`--max-body` (32MiB), `--max-requests` at a time (4096), `--queue` more that wait (1024)" in ROUTE
    assert f"each at most `--queue-wait` seconds ({default['queue_wait']:g})" in ROUTE
    assert str(default["listen"]) in ROUTE


def test_media() -> None:
    table = dict(re.findall(r"^\| (.*) \| `(\w+)` \|$", INDEX, re.MULTILINE))
    told = {
        medium: ("gpu", "cpu", "storage").index(held)
        for row, held in table.items()
        for medium in re.findall(r"`(\w+)`", row)
    }
    assert told == MEDIA
