"""What a comparison is: a YAML file, checked; what is wrong is named by line and key."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Meta

from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError

__all__ = ["BUILT_IN", "LOAD", "Plan", "SetUp", "read"]

BUILT_IN = {
    "engine": "vLLM with its own prefix caching",
    "engine-again": "the same once more, to see by how much two that are equal differ",
    "embedded": "vLLM and kvkeep, with a private keeper in memory",
    "offloading": "vLLM and its own offloading to host memory, made to run on a CPU",
    "keeper-disk": "vLLM and kvkeep, with a keeper in memory and a directory below it",
    "keeper-redis": "vLLM and kvkeep, with a keeper in memory and Valkey on loopback below it",
    "lmcache": "vLLM and LMCache in its multiprocess mode with shared memory",
    "1p1d": "a vLLM that prefills, one that decodes, a keeper for both, and kvkeep route",
    "2p1d": "two vLLMs that prefill, one that decodes, a keeper for all, and kvkeep route",
}
LOAD = (
    "{python} -m kvkeep.cli bench serve {workload} --url {url} --model {name} --scale {scale} "
    "--rate {rate} --seed {seed} --output {output}"
)
_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]
_Text = Annotated[str, Meta(min_length=1)]


class SetUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One server to compare: a command, or (where that is empty) a built-in one by its name.

    `{port}` in any of its texts is a free port, `{folder}` a directory of this run's own.
    """

    name: _Text
    command: _Text
    ready: _Text
    """URL that answers 200 when the server is ready."""
    url: str = ""
    """Where the load goes; empty: the host and port of `ready`."""
    model_name: str = ""
    """The model's name in requests; empty: the plan's."""
    env: dict[str, str | int] = {}
    before: list[_Text] = []
    """Commands that run to their end before the server starts; one that fails, fails the run."""
    after: list[_Text] = []
    """Commands that run to their end after the server has ended, however the run went."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole comparison. Paths are relative to the current directory."""

    setups: Annotated[list[str | SetUp], Meta(min_length=1)]
    """The first one is what the others are compared with."""
    workload: _Text
    rates: Annotated[list[_Positive], Meta(min_length=1)]
    """Requests per second."""
    rounds: _Count = 3
    scale: _Positive = 1.0
    seed: int = 1
    """Of the first round; each later round adds one."""
    kv_cache_gib: _Count
    """The engine's KV pool, the same for all (VLLM_CPU_KVCACHE_SPACE)."""
    cores: str = ""
    """The engine's cores, the same for all, as 0-1 (VLLM_CPU_OMP_THREADS_BIND); empty: all that there are."""
    model: str = ""
    """Directory of the built-in set-ups' model."""
    model_name: str = "model"
    python: str = ""
    """Interpreter that has vLLM; empty: this one."""
    engine_args: list[str] = []
    memory: str = "4GiB"
    """Of the cache beside the engine: a keeper's, LMCache's."""
    store: str = "20GiB"
    """Bound of the directory or the Valkey below a keeper."""
    lmcache: str = "benchmarks/lmcache/.venv"
    """Environment that has LMCache."""
    load: _Text = LOAD
    """The load generator."""
    load_args: str = ""
    """More arguments of it."""
    start_s: _Positive = 240.0
    """Seconds that a server may take to start."""
    run_s: _Positive = 3600.0
    """Seconds that one load may take."""

    def names(self) -> list[str]:
        """Names of the set-ups, in their order."""
        return [setup if isinstance(setup, str) else setup.name for setup in self.setups]

    def core_list(self) -> list[int]:
        """The engine's cores, one by one."""
        cores: list[int] = []
        for part in re.split(r"[,|]", self.cores) if self.cores else []:
            first, _, last = part.partition("-")
            cores += range(int(first), int(last or first) + 1)
        return cores or sorted(os.sched_getaffinity(0))

    def bound_cores(self) -> str:
        """The engine's cores, as vLLM takes them."""
        cores = sorted(os.sched_getaffinity(0))
        whole = cores == list(range(cores[0], cores[-1] + 1)) and len(cores) > 1
        return self.cores or (f"{cores[0]}-{cores[-1]}" if whole else ",".join(map(str, cores)))

    def engine_environment(self) -> dict[str, str]:
        """What makes engines alike: pool and cores."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": self.bound_cores(),
        }


def read(path: Path) -> Plan:
    """Read and check a file. Raises ConfigError, whose message begins with FILE:LINE."""
    tree = None
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        plan = msgspec.convert(yaml.safe_load(text), Plan)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        message, near = _nearest(what)
        raise _wrong(path, tree, _keys(where.rstrip("`")) + near, message) from error
    for keys, message in _problems(plan):
        raise _wrong(path, tree, keys, message)
    return plan


def _problems(plan: Plan) -> list[tuple[list[str | int], str]]:
    """What the types cannot say, each with the keys that lead to it."""
    found: list[tuple[list[str | int], str]] = []
    names = plan.names()
    for number, setup in enumerate(plan.setups):
        here: list[str | int] = ["setups", number]
        if names[number] in names[:number]:
            found.append((here, f"a second set-up named {names[number]!r}: give each its own name"))
        if isinstance(setup, str):
            if setup not in BUILT_IN:
                near = difflib.get_close_matches(setup, BUILT_IN, 1) or BUILT_IN
                found.append((here, f"no built-in set-up {setup!r}; there are: {', '.join(near)}"))
            elif not (Path(plan.model) / "config.json").is_file() or not plan.model:
                found.append((["model"], f"{setup} needs `model`: a directory with a model's config.json"))
            continue
        for key, text in [("ready", setup.ready), *([("url", setup.url)] if setup.url else [])]:
            if not _is_url(text):
                found.append(
                    ([*here, key], f"not a URL: {text!r}; write it as http://127.0.0.1:{{port}}/health")
                )
        for key, texts in (("command", [setup.command]), ("before", setup.before), ("after", setup.after)):
            found += [([*here, key], message) for text in texts if (message := _unsplittable(text))]
    for key in ("load", "load_args"):
        if message := _unsplittable(getattr(plan, key)):
            found.append(([key], message))
    if plan.cores and not re.fullmatch(r"\d+(-\d+)?([,|]\d+(-\d+)?)*", plan.cores):
        found.append((["cores"], f"not cores: {plan.cores!r}; write them as 0-1 or 0,2"))
    if len(set(plan.rates)) < len(plan.rates):
        found.append((["rates"], "a rate stands there twice"))
    for key in ("memory", "store"):
        try:
            parse_bytes(getattr(plan, key))
        except ConfigError as error:
            found.append(([key], str(error)))
    return found


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _unsplittable(command: str) -> str:
    try:
        shlex.split(command)
    except ValueError as error:
        return f"not a command line: {error}"
    return ""


def _nearest(message: str) -> tuple[str, list[str | int]]:
    """An unknown field's message with the nearest known one, and that field."""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
    if not unknown:
        return message, []
    known = [*Plan.__struct_fields__, *SetUp.__struct_fields__]
    near = difflib.get_close_matches(unknown[1], known, 1)
    return f"unknown key {unknown[1]!r}" + (f": did you mean {near[0]!r}?" if near else ""), [unknown[1]]


def _keys(path: str) -> list[str | int]:
    """Keys of msgspec's path, as `.setups[1].env[...]`."""
    found = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path)
    return [name or int(index) for name, index in found]


def _wrong(path: Path, tree: yaml.Node | None, keys: list[str | int], message: str) -> ConfigError:
    """The error, with the line of the last of the keys that is there."""
    node, line = tree, tree.start_mark.line if tree else 0
    for key in keys:
        below = None
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            below = node.value[key]
            line = below.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value == key:
                    below, line = value, name.start_mark.line
        if below is None:
            break
        node = below
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    return ConfigError(f"{path}:{line + 1}: {where + ': ' if where else ''}{message}")
