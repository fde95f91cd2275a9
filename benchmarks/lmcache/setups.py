"""The set-ups that run.py compares: an engine each, with its cache server, and the clocks around them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvbench.engine import VllmServer, connector_args, lmcache_args, offloading
from kvbench.process import ServerProcess, free_port
from kvbench.servers import LMCACHE_ENVIRONMENT, await_prepared, keeper, lmcache_server

HERE = Path(__file__).parent
OUT = HERE / "out"
PEER = HERE / ".venv" / "bin"
CHUNK = 256  # LMCache's; kvkeep's is the fewest blocks of about 1 MiB: here one block of 128
CACHE_GIB = 2
CLOCKS = {
    "kvkeep": [
        f"vllm:kvkeep_{name}_total"
        for name in ("saved_bytes", "save_seconds", "loaded_bytes", "load_seconds")
    ],
    "offloading": [
        f"vllm:kv_offload_{name}_total" for name in ("store_bytes", "store_time", "load_bytes", "load_time")
    ],
}


@dataclass
class Setup:
    """One engine with what belongs to it."""

    name: str
    python: str
    args: list[str]
    token_bytes: int
    cache: ServerProcess | None = None
    cache_log: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    engine: VllmServer | None = None
    starts: int = 0

    def start(self, model: Path) -> None:
        """Start the engine and make it pay for its lazy set-up."""
        self.starts += 1
        log = OUT / f"{self.name}-{self.starts}.log"
        environ = {"VLLM_CPU_KVCACHE_SPACE": "1", **self.environ}
        engine = VllmServer(model, self.args, log=log, environ=environ, python=self.python)
        self.engine = engine.__enter__()
        for length in (700, 40):
            engine.complete(list(range(100, 100 + length)), 2)

    def stop(self) -> None:
        """Stop the engine; its cache server lives on."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.stop()

    def pids(self) -> list[int]:
        """Processes of the engine and its cache server."""
        engine = self.engine.pids if self.engine is not None else []
        return engine + (self.cache.pids if self.cache is not None else [])

    def moved(self) -> dict[str, float]:
        """Sums of the cache's own clocks since the start."""
        sums = dict.fromkeys(("store_bytes", "store_s", "load_bytes", "load_s"), 0.0)
        if self.name in CLOCKS and self.engine is not None:
            return dict(zip(sums, map(self.engine.metric, CLOCKS[self.name]), strict=True))
        if self.cache_log is not None:
            pattern = r"(Stored|Retrieved) (\d+) tokens in ([\d.]+) seconds"
            for verb, tokens, seconds in re.findall(pattern, self.cache_log.read_text(errors="replace")):
                way = "store" if verb == "Stored" else "load"
                sums[f"{way}_bytes"] += int(tokens) * self.token_bytes
                sums[f"{way}_s"] += float(seconds)
        return sums


@contextlib.contextmanager
def set_ups(names: Sequence[str], args: list[str], token_bytes: int) -> Iterator[list[Setup]]:
    """The named ones, engines not started yet."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder, contextlib.ExitStack() as stack:
        setups = [_set_up(name, args, token_bytes, folder, stack) for name in names]
        try:
            yield setups
        finally:
            for setup in setups:
                setup.stop()


def _set_up(name: str, args: list[str], token_bytes: int, folder: str, stack: contextlib.ExitStack) -> Setup:
    ours = sys.executable
    if name == "kvkeep":
        path = f"{folder}/keeper.sock"
        cache = stack.enter_context(keeper(path, f"{CACHE_GIB}GiB", [], OUT / "keeper.log"))
        await_prepared(path)
        return Setup(name, ours, args + connector_args(socket=path), token_bytes, cache)
    if name == "offloading":
        flag, environ = offloading(CACHE_GIB << 30)
        return Setup(name, ours, args + flag, token_bytes, environ=environ)
    if name == "lmcache":
        log, port = OUT / "lmcache-server.log", free_port()
        log.unlink(missing_ok=True)  # its lines are what `moved` adds up
        server = lmcache_server(PEER, port, free_port(), log, gib=CACHE_GIB, chunk_tokens=CHUNK)
        cache, more = stack.enter_context(server), lmcache_args(port)
        return Setup(name, str(PEER / "python"), args + more, token_bytes, cache, log, LMCACHE_ENVIRONMENT)
    return Setup(name, ours, args, token_bytes)


def busy_seconds() -> float:
    """CPU seconds of the whole machine, and those its host took."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: list[int]) -> float:
    """CPU seconds of processes."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
