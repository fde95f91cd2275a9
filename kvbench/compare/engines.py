"""A set-up's vLLM engines: one, or some that prefill and some that decode with a router before them."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from kvbench.compare.plan import Plan
from kvbench.engine import CPU_ENVIRONMENT, connector_args, cores_by_role, fastest_dtype, vllm_command
from kvbench.process import ServerProcess, free_port
from kvbench.servers import keeper

__all__ = ["Engine", "Running", "http_server", "prefill_and_decode", "start_engine"]


class Running(NamedTuple):
    """A set-up that is up."""

    url: str
    model_name: str
    servers: list[ServerProcess]
    """The engines first."""
    engine: str
    """The engine's command line; those of several with & between."""


class Engine(NamedTuple):
    """One vLLM that is up."""

    url: str
    command: str
    server: ServerProcess


def http_server(
    command: list[str], ready: str, name: str, log: Path, environ: Mapping[str, str], start_s: float
) -> ServerProcess:
    """A server that is ready when the URL `ready` answers 200."""

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
            return httpx.get(ready, timeout=2.0, trust_env=False).status_code == httpx.codes.OK
        return False

    return ServerProcess(command, answers, log=log, name=name, environ=environ, start_s=start_s)


@contextlib.contextmanager
def start_engine(
    plan: Plan,
    args: Sequence[str],
    name: str,
    log: Path,
    environ: Mapping[str, str] | None = None,
    python: str = "",
) -> Iterator[Engine]:
    """The plan's engine with more arguments and variables. Raises EngineFailed where it does not start."""
    port = free_port()
    given = ["--enable-prompt-tokens-details", *plan.engine_args]
    if "--dtype" not in given:
        given += ["--dtype", fastest_dtype()]
    command = vllm_command(python or plan.python or sys.executable, plan.model, port, [*given, *args])
    url = f"http://127.0.0.1:{port}"
    variables = {**CPU_ENVIRONMENT, **plan.engine_environment(), **(environ or {})}
    with http_server(command, f"{url}/health", name, log, variables, plan.start_s) as process:
        yield Engine(url, shlex.join(command), process)


@contextlib.contextmanager
def prefill_and_decode(name: str, prefills: int, decodes: int, plan: Plan, folder: Path) -> Iterator[Running]:
    """Engines that prefill on the first half of the plan's cores, engines that decode on the other, one
    keeper for all, and `kvkeep route` in front. Engines of a kind share out its cores; where there are
    fewer cores than engines they share them."""
    with contextlib.ExitStack() as stack:
        # A socket's path has room for 107 bytes: not in the output, which may lie deep.
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvkeep-"))
        socket = f"{place}/keeper.sock"
        held = stack.enter_context(keeper(socket, plan.memory, [], folder / "keeper.log", drain_s=0))
        engines: list[Engine] = []
        words = [sys.executable, "-m", "kvkeep.cli", "route"]
        of_prefill, of_decode = cores_by_role(plan.core_list())
        for kind, role, count, its in (
            ("prefill", "kv_producer", prefills, of_prefill),
            ("decode", "kv_consumer", decodes, of_decode),
        ):
            for number in range(count):
                share = its[number::count] or [its[number % len(its)]]
                bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, share))}
                log = folder / f"{kind}{number}.log"
                args = connector_args(role, socket=socket)
                engine = stack.enter_context(start_engine(plan, args, name, log, bound))
                words += [f"--{kind}", engine.url]
                engines.append(engine)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        words += ["--listen", f"127.0.0.1:{port}"]
        if (Path(plan.model) / "tokenizer.json").is_file():
            words += ["--tokenizer", plan.model]
        log = folder / "router.log"
        routing = http_server(words, f"{url}/health", "kvkeep route", log, {}, plan.start_s)
        router = stack.enter_context(routing)
        servers = [*(engine.server for engine in engines), held, router]
        yield Running(url, "model", servers, " & ".join(engine.command for engine in engines))
