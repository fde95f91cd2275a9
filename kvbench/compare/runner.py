"""The rounds: each runs every case once, in an order of its own, so that drift falls on all alike."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvbench.compare.engines import Running
from kvbench.compare.launch import fill, lacks, launch
from kvbench.compare.machine import now, stolen_s
from kvbench.compare.plan import Plan, SetUp
from kvbench.compare.records import Case, Ledger, Run, Summary, read_summary
from kvbench.process import EngineFailed, ended, signal_group, tail, without_passwords
from kvkeep.config import child_environment
from kvkeep.errors import KVKeepError

__all__ = ["order", "run_all", "skipped"]

_LAST_WORDS_S = 20.0


def order(plan: Plan) -> Iterator[tuple[int, Case]]:
    """Round and case of all runs: A B C, C B A, then B C A, A C B, …, at each rate in turn: over two rounds
    each set-up runs as often before any other as after it."""
    names = plan.names()
    for turn in range(1, plan.rounds + 1):
        at = (turn - 1) // 2 % len(names)
        its = (names[at:] + names[:at])[:: 1 if turn % 2 else -1]
        for rate in plan.rates:
            yield from ((turn, Case(rate, name)) for name in its)


def skipped(plan: Plan) -> dict[str, str]:
    """Set-ups that cannot run on this machine, and why."""
    named = zip(plan.names(), plan.setups, strict=True)
    return {name: why for name, setup in named if (why := lacks(setup, plan))}


def run_all(ledger: Ledger, say: Callable[[str], None], after_each: Callable[[], object]) -> None:
    """All runs that the ledger does not have yet. A set-up that does not start is not tried again here."""
    plan, unable = ledger.plan, set(skipped(ledger.plan))
    setups = dict(zip(plan.names(), plan.setups, strict=True))
    todo = [one for one in order(plan) if one[1].setup not in unable and not ledger.done(*one)]
    for number, (turn, case) in enumerate(todo, 1):
        if case.setup in unable:
            continue
        say(f"run {number} of {len(todo)}: round {turn}, {case.rate:g} requests/s, {case.setup}")
        run, started = _run(ledger, turn, case, setups[case.setup])
        ledger.keep(run)
        if run.why:
            say(f"  failed: {run.why}")
        if not started:
            unable.add(case.setup)
        after_each()


def _run(ledger: Ledger, turn: int, case: Case, setup: str | SetUp) -> tuple[Run, bool]:
    """One run with a server of its own, and whether that server started."""
    folder = ledger.place(turn, case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began, began_at, busy = time.monotonic(), now(), round(os.getloadavg()[0], 2)
    started, command, summary, why, stolen = False, "", None, "", 0.0
    try:
        with launch(setup, ledger.plan, folder) as running:
            started, command = True, without_passwords(running.engine)
            before, at = stolen_s(), time.monotonic()
            summary = _load(ledger.plan, turn, case, running, folder)
            cores = (time.monotonic() - at) * (os.cpu_count() or 1)
            stolen = round((stolen_s() - before) / cores, 4)
    except KVKeepError as error:
        why = str(error)
    took = round(time.monotonic() - began, 1)
    return Run(turn, case.rate, case.setup, began_at, took, command, why, summary, busy, stolen), started


def _load(plan: Plan, turn: int, case: Case, running: Running, folder: Path) -> Summary:
    """Run the load against a set-up. Raises KVKeepError where it, or the set-up, does not live through it."""
    values = {"python": sys.executable, "url": running.url, "name": running.model_name}
    values |= {"workload": plan.workload, "scale": f"{plan.scale:g}", "rate": f"{case.rate:.12g}"}
    values |= {"seed": str(plan.seed + turn - 1), "output": str(folder)}
    words = [fill(word, values) for word in [*shlex.split(plan.load), *shlex.split(plan.load_args)]]
    log = folder / "load.log"
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=child_environment({}),
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        except OSError as error:
            raise KVKeepError(f"the load cannot be started: {error}") from error
    try:
        why = _watch(process, running, plan.run_s)
    finally:
        _end(process)
    if why:
        raise EngineFailed(why)
    if process.returncode:
        raise KVKeepError(f"the load ended with status {process.returncode}; {tail(log)}")
    summary = read_summary(folder / "summary.json")
    if summary.partial:
        raise KVKeepError(f"the load was cut short; {tail(log)}")
    return summary


def _watch(process: subprocess.Popen[bytes], running: Running, seconds: float) -> str:
    """Wait for the load's end; or say why it is not waited for."""
    deadline = time.monotonic() + seconds
    while True:
        done = process.poll() is not None
        for server in running.servers:
            if server.status is not None:
                return f"{server.name} ended with status {server.status} under load; {tail(server.log)}"
        if done:
            return ""
        if time.monotonic() > deadline:
            return f"the load took more than {seconds:g} s"
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C, so that it can keep what it has; killed where that takes too long."""
    if process.poll() is None:
        signal_group(process.pid, signal.SIGINT)
        try:
            process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            signal_group(process.pid, signal.SIGKILL)
            process.wait(_LAST_WORDS_S)
    if not ended(process.pid, 1.0):
        signal_group(process.pid, signal.SIGKILL)
