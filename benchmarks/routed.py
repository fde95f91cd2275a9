"""A router in front of engines, in processes of their own: what the benchmarks of `kvkeep route` start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """Engines behind a router."""

    router: str
    engines: list[str]
    pid: int


@contextlib.contextmanager
def served(
    policy: str,
    engines: int,
    *shape: str,
    more: tuple[str, ...] = (),
    core: int | None = None,
    split: bool = False,
) -> Iterator[Served]:
    """Start them, and end them. `more`: options of the router; `core`: where it runs, alone; `split`: see
    `routing`."""
    command = [sys.executable, "-m", "benchmarks.stand_in", "--engines", str(engines), *shape]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        stand_ins = stack.enter_context(subprocess.Popen(command, **pipes))
        stack.callback(stand_ins.terminate)
        places = json.loads(stand_ins.stdout.readline())
        url, pid = stack.enter_context(routing(policy, places, *more, split=split))
        if core is not None:
            os.sched_setaffinity(pid, {core})
        yield Served(url, [place["url"] for place in places], pid)


@contextlib.contextmanager
def routing(
    policy: str, places: list[dict[str, str]], *more: str, split: bool = False
) -> Iterator[tuple[str, int]]:
    """A router in front of engines: its address and process. `split`: the first engine prefills, the others
    decode."""
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        words = [sys.executable, "-m", "kvkeep.cli", "route", "--listen", "127.0.0.1:0", "--policy", policy]
        words += ["--max-requests", "20000", *more]
        for number, place in enumerate(places):
            role = "backend" if not split else "decode" if number else "prefill"
            words += [f"--{role}", f"{place['url']},events={place['events']},replay={place['replay']}"]
        router = stack.enter_context(subprocess.Popen(words, stderr=log.open("w")))
        stack.callback(router.terminate)
        while not (found := re.search(r"routing at (http://\S+)", log.read_text())):
            if router.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.02)
        yield found[1], router.pid
