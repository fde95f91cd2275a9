"""What a tier's medium does without the tier: the other half of each ratio in `kvkeep bench tier`.

`RAW` has a function for each URL scheme whose medium can be measured; add to it for another one.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvbench.memory import arena
from kvkeep.errors import KVKeepError
from kvkeep.tiers.base import Tier
from kvkeep.tiers.fs import FsTier
from kvkeep.tiers.url import TierURL

__all__ = ["RAW", "Raw", "Shape"]


@dataclass(frozen=True)
class Shape:
    """What is moved in a round."""

    chunk_bytes: int
    count: int
    depth: int
    """Chunks under way at a time."""
    sources: tuple[int, ...] = ()
    """Descriptors of what the tier writes from, `depth` pieces of memory, each of some chunks and a few
    pages; what is in it is not kept."""
    targets: tuple[int, ...] = ()
    """The same of what it reads into."""


class Raw(Protocol):
    """A raw medium; the first two verbs move a round's bytes and return the seconds that it took."""

    name: str
    """The program and its settings, for who reads the figures."""

    def put(self) -> float:
        """Write to where nothing is."""

    def get(self) -> float:
        """Read what was written, from the medium and not from a cache above it."""

    def forget(self) -> None:
        """Remove what was written; not timed."""

    def close(self) -> None:
        """Leave nothing behind."""


class Fio:
    """fio on a directory: one process per chunk under way, each with a file of its own.

    Its buffers lie in the tier's memory, on both ways: how a buffer's pages lie decides how fast a device
    moves it (up to three times), and that is chance.
    """

    def __init__(self, directory: str, shape: Shape, direct: bool) -> None:
        jobs = min(shape.depth, shape.count)
        self._shape = replace(shape, count=-(-shape.count // jobs) * jobs)
        self._directory = tempfile.mkdtemp(prefix=".bench-", dir=directory)
        engine = {"ioengine": "psync", "direct": int(direct), "bs": shape.chunk_bytes}
        self.name = " ".join(["fio", *_options(engine), f"{jobs} jobs"])
        common = engine | {
            "directory": self._directory,
            "size": self._shape.count // jobs * shape.chunk_bytes,
            "fallocate": "none",
            "group_reporting": 1,
        }
        self._command = ["fio", "--output-format=json", "--name=global", *_options(common, "--")]
        own = f"mmapshared:/proc/{os.getpid()}/fd"
        self._jobs = {
            verb: [f"--name=raw{job} --mem={own}/{fds[job]}".split() for job in range(jobs)]
            for verb, fds in (("write", shape.sources), ("read", shape.targets))
        }

    def put(self) -> float:
        return self._run("write")

    def get(self) -> float:
        return self._run("read")

    def forget(self) -> None:
        for name in os.listdir(self._directory):
            os.unlink(os.path.join(self._directory, name))

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self, verb: str) -> float:
        done = subprocess.run(
            [*self._command, f"--rw={verb}", *itertools.chain(*self._jobs[verb])],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        try:
            figures: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][verb]
            # Of as many bytes as the tier moved, where the jobs' shares do not come out even.
            return self._shape.count * self._shape.chunk_bytes / float(figures["bw_bytes"])
        except (ValueError, LookupError, ZeroDivisionError) as error:
            raise KVKeepError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}") from error


class Threads:
    """pwrite and pread of whole chunks by threads, for where there is no fio."""

    def __init__(self, directory: str, shape: Shape, direct: bool) -> None:
        self._shape, self._flags = shape, os.O_DIRECT if direct else 0
        self._directory = tempfile.mkdtemp(prefix=".bench-", dir=directory)
        self._memory = [arena(shape.chunk_bytes) for _ in range(shape.depth)]
        for view in self._memory:
            view[:] = os.urandom(shape.chunk_bytes)
        self.name = f"pread threads={shape.depth} direct={int(direct)} bs={shape.chunk_bytes}"

    def put(self) -> float:
        return self._run(os.O_WRONLY | os.O_CREAT, os.pwritev)

    def get(self) -> float:
        return self._run(os.O_RDONLY, os.preadv)

    def forget(self) -> None:
        for name in os.listdir(self._directory):
            os.unlink(os.path.join(self._directory, name))

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self, flags: int, call: Callable[[int, Sequence[memoryview], int], int]) -> float:
        def work(number: int) -> None:
            path, memory = os.path.join(self._directory, str(number)), self._memory[number]
            fd = os.open(path, flags | self._flags, 0o600)
            for at in range(number, self._shape.count, self._shape.depth):
                call(fd, [memory], at // self._shape.depth * self._shape.chunk_bytes)
            os.close(fd)

        with ThreadPoolExecutor(self._shape.depth) as pool:
            began = time.perf_counter()
            list(pool.map(work, range(min(self._shape.depth, self._shape.count))))
            return time.perf_counter() - began


def _options(named: dict[str, Any], prefix: str = "") -> list[str]:
    return [f"{prefix}{name}={value}" for name, value in named.items()]


def _raw_fs(url: TierURL, tier: Tier, shape: Shape) -> Raw:
    direct = isinstance(tier, FsTier) and tier.direct
    kind = Fio if shutil.which("fio") else Threads
    return kind(url.path, shape, direct)


def _raw_redis(url: TierURL, tier: Tier, shape: Shape) -> Raw:
    from kvbench.raw_redis import RedisSocket

    return RedisSocket(url, shape.chunk_bytes, shape.count)


def _raw_mooncake(url: TierURL, tier: Tier, shape: Shape) -> Raw:
    from kvbench.raw_mooncake import RawMooncake

    return RawMooncake(url, shape.chunk_bytes, shape.count)


RAW: dict[str, Callable[[TierURL, Tier, Shape], Raw]] = {
    "fs": _raw_fs,
    "redis": _raw_redis,
    "redis+unix": _raw_redis,
    "mooncake": _raw_mooncake,
}
"""By scheme, without what wraps it (`faulty+`); given the URL, the raw tier opened by it, and the shape."""
