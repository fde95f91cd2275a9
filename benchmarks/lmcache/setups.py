"""The set-ups that run.py compares: an engine each, with its cache server, and the clocks around them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvbench.engine import VllmServer, connector_args
from kvkeep.config import child_environment

HERE = Path(__file__).parent
OUT = HERE / "out"
PEER = HERE / ".venv" / "bin"
CHUNK = 256  # LMCache's; kvkeep's is the fewest blocks of about 1 MiB: here one block of 128
CACHE_GIB = 2


@dataclass
class Setup:
    """One engine with what belongs to it."""

    name: str
    python: str
    args: list[str]
    token_bytes: int
    cache: subprocess.Popen[bytes] | None = None
    cache_log: Path | None = None
    environ: dict[str, str] = field(default_factory=dict)
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
        return engine + ([self.cache.pid] if self.cache is not None else [])

    def moved(self) -> dict[str, float]:
        """Sums of the cache's own clocks since the start."""
        if self.name == "kvkeep" and self.engine is not None:
            names = ("saved_bytes", "save_seconds", "loaded_bytes", "load_seconds")
            figures = [self.engine.metric(f"vllm:kvkeep_{name}_total") for name in names]
            return dict(zip(("store_bytes", "store_s", "load_bytes", "load_s"), figures, strict=True))
        sums = dict.fromkeys(("store_bytes", "store_s", "load_bytes", "load_s"), 0.0)
        if self.cache_log is not None:
            pattern = r"(Stored|Retrieved) (\d+) tokens in ([\d.]+) seconds"
            for verb, tokens, seconds in re.findall(pattern, self.cache_log.read_text(errors="replace")):
                way = "store" if verb == "Stored" else "load"
                sums[f"{way}_bytes"] += int(tokens) * self.token_bytes
                sums[f"{way}_s"] += float(seconds)
        return sums


@contextlib.contextmanager
def server(command: list[str], log: Path, ready: Path | int) -> Iterator[subprocess.Popen[bytes]]:
    """A cache server as a child process; `ready` is the socket file or the port that shows it is up."""
    environ = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=child_environment(environ)
        )
    try:
        deadline = time.monotonic() + 120
        while not _is_up(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{Path(command[0]).name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(15)


def _is_up(ready: Path | int) -> bool:
    if isinstance(ready, Path):
        return ready.exists()
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", ready)) == 0


def free_ports(count: int) -> list[int]:
    """Free loopback ports."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def set_ups(args: list[str], token_bytes: int) -> Iterator[list[Setup]]:
    """All three, engines not started yet."""
    port, http = free_ports(2)
    name = f"kvkeep-bench-{os.getpid()}"
    lmcache = [str(PEER / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)]
    lmcache += ["--http-host", "127.0.0.1", "--http-port", str(http), "--l1-size-gb", str(CACHE_GIB)]
    lmcache += ["--no-l1-use-lazy", "--shm-name", name, "--eviction-policy", "LRU"]
    lmcache += ["--chunk-size", str(CHUNK), "--supported-transfer-mode", "auto"]
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
    transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}
    peer_args = ["--kv-transfer-config", json.dumps({**transfer, "kv_connector_extra_config": where})]
    environ = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "keeper.sock"
        serve = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", str(path)]
        serve += ["--memory", f"{CACHE_GIB}GiB"]
        keeper = stack.enter_context(server(serve, OUT / "keeper.log", path))
        peer_log = OUT / "lmcache-server.log"
        peer = stack.enter_context(server(lmcache, peer_log, port))
        ours, theirs = sys.executable, str(PEER / "python")
        setups = [
            Setup("alone", ours, args, token_bytes),
            Setup("kvkeep", ours, args + connector_args(socket=str(path)), token_bytes, keeper),
            Setup("lmcache", theirs, args + peer_args, token_bytes, peer, peer_log, environ),
        ]
        try:
            yield setups
        finally:
            for setup in setups:
                setup.stop()


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
