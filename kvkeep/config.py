"""All options, frozen once read. The only place that reads the environment.

An option has one name everywhere: `--memory 8GiB` for the CLI, `"memory": "8GiB"` in an engine's
`kv_connector_extra_config`, `KVKEEP_MEMORY=8GiB` in the environment (the weakest of the three).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from kvkeep.errors import ConfigError

__all__ = ["EngineConfig", "KeeperConfig", "child_environment", "default_socket", "load", "parse_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {f"{prefix}{rest}": 2 ** (10 * n) for n, prefix in enumerate("kmgt", 1) for rest in ("", "ib")}
_MAX_SOCKET_PATH = 107
LOG_FORMATS = ("text", "json")
LOAD_RULES = ("auto", "always", "never")
LOAD_WAYS = ("auto", "layers", "request")


@dataclass(frozen=True)
class KeeperConfig:
    """Options of a keeper process."""

    socket: str
    """Path of its unix socket."""
    memory: int = 4 << 30
    """Bound of the arena, in bytes."""
    policy: str = "lru"
    """Eviction policy."""
    prefault: bool = True
    """Allocate the arena's pages at start, in the background."""
    huge_pages: bool = False
    """Back the arena by explicit huge pages; they must have been reserved."""
    linger: float = 0.0
    """Seconds without any client after which the keeper ends; 0: never (embedded keepers end)."""
    tiers: tuple[str, ...] = ()
    """URLs of the places below memory, the fastest first."""
    peers: str | None = None
    """Address and port at which other keepers may read this one, with options as in a URL; None: nowhere."""
    drain: float = 30.0
    """Seconds that the end of the keeper waits, at most, for chunks to be written to the tiers."""
    record: str | None = None
    """File to record requests to, for `kvkeep bench simulate`: ids and lengths, no text."""
    http: str | None = None
    """Address and port of metrics, health and the web page, with options as in a URL; None: no HTTP."""
    tenant_quotas: tuple[str, ...] = ()
    """What tenants may hold in memory: TENANT=SIZE each; `default`: each that has none of its own."""
    log_format: str = "text"
    """How the log is written: text or json."""
    traces: str | None = None
    """OTLP/HTTP endpoint that spans are sent to; None: no traces."""

    def __post_init__(self) -> None:
        machine = _machine_bytes()
        if self.memory > machine:
            raise ConfigError(
                f"memory of {self.memory / 2**30:.1f} GiB is more than this machine's "
                f"{machine / 2**30:.1f} GiB: "
                "give less, and leave room for the engine"
            )
        if len(self.socket.encode()) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"socket path longer than {_MAX_SOCKET_PATH} bytes: {self.socket}; choose a shorter one"
            )
        _check_seconds(self, "linger", "drain")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(LOG_FORMATS)}, not {self.log_format!r}")


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine adapter."""

    socket: str | None = None
    """Keeper to use; None: a private one, started and stopped with the engine."""
    memory: int = 4 << 30
    """Bound of the private keeper's arena, in bytes."""
    policy: str = "lru"
    """Eviction policy of the private keeper."""
    tiers: tuple[str, ...] = ()
    """URLs of the places below the private keeper's memory, the fastest first."""
    load: str = "auto"
    """When to load from a tier: auto (where that is faster than computing, as measured), always, never."""
    load_by: str = "auto"
    """How loads go beside computing (vLLM): layers (in the step that needs them, layer by layer on a GPU),
    request (the request waits, other requests' steps go on), auto (request where graphs hide the layers)."""
    load_wait: float = 5.0
    """Seconds that a request waits, at most, for chunks that a tier holds; then it takes what has come."""
    probe_wait: float = 0.05
    """Seconds that a request waits, at most, to hear whether any tier holds its chunks; or 1 % of what
    computing them would take, where that is more."""
    remote_wait: float = 5.0
    """Seconds that a request which another engine prefills waits, at most, for its next chunk."""
    chunk_tokens: int | None = None
    """Tokens per chunk; None: the fewest blocks that reach about 1 MiB."""
    model_id: str | None = None
    """Identity of the weights, where their files cannot be read; None: by content."""
    timeout: float = 1.0
    """Seconds that a call to the keeper may take before it is given up for lost."""
    copy_threads: int = 0
    """Threads of a CPU that copy much at once, of those that a worker computes with; 0: all of them."""
    save_decoded: bool = True
    """Keep the KV of generated tokens too (the next turn of a conversation contains them)."""
    log_interval: float = 10.0
    """Seconds between summary lines in the engine's log; 0: none."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ConfigError("timeout must be more than 0 seconds")
        if not self.log_interval >= 0:
            raise ConfigError("log_interval must be 0 or more seconds")
        if self.load not in LOAD_RULES:
            raise ConfigError(f"load must be one of {', '.join(LOAD_RULES)}, not {self.load!r}")
        if self.load_by not in LOAD_WAYS:
            raise ConfigError(f"load_by must be one of {', '.join(LOAD_WAYS)}, not {self.load_by!r}")
        _check_seconds(self, "load_wait", "probe_wait", "remote_wait")
        if not 0 <= self.copy_threads <= 64:
            raise ConfigError("copy_threads must be 0 to 64")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError("chunk_tokens must be a positive multiple of the engine's block size")


def _check_seconds(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"{name} must be 0 or more seconds")


_C = TypeVar("_C", KeeperConfig, EngineConfig)


def load(kind: type[_C], options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> _C:
    """Build a configuration from options by name, over KVKEEP_* of the environment.

    Raises ConfigError on an unknown name (with the nearest known one) or a value that does not parse.
    """
    environ = os.environ if environ is None else environ
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {
        name: environ[f"KVKEEP_{name.upper()}"] for name in fields if f"KVKEEP_{name.upper()}" in environ
    }
    for name, value in options.items():
        if name.replace("-", "_") not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(fields)}"
            raise ConfigError(f"unknown option {name!r}: {hint}")
        given[name.replace("-", "_")] = value
    return kind(**{name: _parse(name, str(fields[name].type), value) for name, value in given.items()})


def _parse(name: str, kind: str, value: Any) -> Any:
    if value is None and "None" in kind:
        return None
    try:
        if name == "memory":
            return parse_bytes(value)
        if kind.startswith("tuple"):
            return tuple(value.split() if isinstance(value, str) else map(str, value))
        if kind.startswith("bool"):
            return parse_flag(str(value))
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"option {name}={value!r} is not of type {kind}") from error
    return str(value)


def parse_flag(text: str) -> bool:
    """True or False from yes or no and their like. Raises ValueError."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("write yes or no")


def parse_bytes(value: Any) -> int:
    """Bytes from 4294967296, "4GiB", "4G", "500 MB". Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)\s*", str(value))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"not a size: {value!r}; write it as 8GiB, 500MB or a number of bytes")
    return int(Fraction(match[1]) * unit)  # exact: a float has 53 bits, and an end


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with additions, for a child process."""
    return {**os.environ, **extra}


def environment(names: Sequence[str]) -> dict[str, str]:
    """Those of the named variables of this process's environment that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def default_socket() -> str:
    """Where `kvkeep serve` listens and the CLI looks, unless told otherwise."""
    return os.environ.get("KVKEEP_SOCKET") or str(runtime_dir() / "keeper.sock")


def runtime_dir() -> Path:
    """A directory of this user for sockets. Raises ConfigError where another user has made it first."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "kvkeep"
    folder = Path(tempfile.gettempdir()) / f"kvkeep-{os.getuid()}"
    with contextlib.suppress(FileNotFoundError):
        owner = folder.lstat().st_uid
        if owner != os.getuid():
            raise ConfigError(f"{folder} belongs to user {owner}: set XDG_RUNTIME_DIR, or KVKEEP_SOCKET")
    return folder


def _machine_bytes() -> int:
    """Memory of this machine, or of the control group that we run in where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
