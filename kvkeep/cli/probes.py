"""What `kvkeep doctor` reads from the world: files of the kernel, installed packages, child processes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import mmap
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from kvkeep import pages

__all__ = [
    "Outcome",
    "arena_nodes",
    "collapses",
    "cpu_flags",
    "gpu_nodes",
    "graphics_driver",
    "importable",
    "installed",
    "meminfo",
    "memory",
    "python",
    "read",
    "requirements",
    "try_descriptor",
]

_IMPORT_SECONDS = 180


class Outcome(NamedTuple):
    """What a child Python printed, or the last line of its error."""

    ok: bool
    text: str


def try_descriptor() -> None:
    """Make a sealed memfd and pass it through a unix socket. Raises OSError."""
    fd = os.memfd_create("kvkeep-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        socket.send_fds(ours, [b"."], [fd])
        for received in socket.recv_fds(theirs, 1, 1)[1]:
            stack.callback(os.close, received)


def collapses() -> bool:
    """Whether this kernel makes a huge page of a memfd's, as of an arena's: one is tried."""
    size = pages.huge_size()
    fd = os.memfd_create("kvkeep-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        arena = pages.map_shared(fd, size) if size else memoryview(b"")
        return size > 0 and pages.allocate(fd, pages.address(arena), 0, size) == size
    except OSError:
        return False
    finally:
        os.close(fd)


def memory() -> tuple[int, int | None, int]:
    """Bytes in all, the control group's limit where that is less (else None), bytes available."""
    info, limit = meminfo(), read("/sys/fs/cgroup/memory.max").strip()
    total, available = info.get("MemTotal", 0) << 10, info.get("MemAvailable", 0) << 10
    if not limit.isdigit() or int(limit) >= total:
        return total, None, available
    used = int(read("/sys/fs/cgroup/memory.current").strip() or 0)
    return total, int(limit), max(0, min(available, int(limit) - used))


def meminfo() -> dict[str, int]:
    """/proc/meminfo: KiB, or counts of pages."""
    lines = (line.split() for line in read("/proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}


def cpu_flags() -> set[str]:
    """Features of the first CPU."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def graphics_driver() -> str:
    """Version of the NVIDIA driver; empty without one."""
    found = re.search(r"Kernel Module\D+([\d.]+)", read("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def gpu_nodes() -> dict[str, int]:
    """The NUMA node of each NVIDIA GPU by its PCI address; -1 where the machine has only one."""
    found = {}
    for folder in Path("/proc/driver/nvidia/gpus").glob("*"):
        text = read(f"/sys/bus/pci/devices/{folder.name}/numa_node").strip()
        found[folder.name] = int(text) if text.lstrip("-").isdigit() else -1
    return found


def arena_nodes(fd: int, nbytes: int) -> dict[int, int]:
    """Where an arena lies: of a few hundred of its pages, how many on which NUMA node.

    Empty where it is not allocated as a whole: looking at a page that is not would allocate it.
    """
    if os.fstat(fd).st_blocks * 512 < nbytes:
        return {}
    pages: dict[int, int] = {}
    with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ) as memory:
        for at in range(0, nbytes, max(mmap.PAGESIZE, nbytes // 256 // mmap.PAGESIZE * mmap.PAGESIZE)):
            memory[at]  # enters the page, and a few around it, into our own table
        for line in read("/proc/self/numa_maps").splitlines():
            if "memfd:kvkeep" in line:
                for node, count in re.findall(r"\bN(\d+)=(\d+)", line):
                    pages[int(node)] = pages.get(int(node), 0) + int(count)
    return pages


def read(path: str) -> str:
    """Text of a file of the kernel; empty where it is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def requirements() -> dict[str, str]:
    """Oldest version of each package that kvkeep declares; empty where kvkeep is not installed."""
    try:
        lines = importlib.metadata.requires("kvkeep") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)>=([\d.]+)", line) for line in lines if "extra ==" not in line)
    return {match[1]: match[2] for match in found if match}


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def importable(name: str) -> Outcome:
    """Whether a module can be imported."""
    return python(f"import {name}")


def python(code: str) -> Outcome:
    """Run code in a child of this Python: an import that crashes must not end the doctor."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, f"not done after {_IMPORT_SECONDS} s")
    if done.returncode:
        return Outcome(False, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return Outcome(True, done.stdout.strip())
