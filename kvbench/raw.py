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
from typing import Any, Protocol

from kvbench.memory import Bed
from kvkeep.errors import KVKeepError
from kvkeep.tiers.base import Tier
from kvkeep.tiers.fs import FsTier
from kvkeep.tiers.url import TierURL

__all__ = ["RAW", "Raw"]


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

    def __init__(self, directory: str, bed: Bed, direct: bool) -> None:
        jobs = min(bed.depth, bed.count)
        self._nbytes = bed.nbytes
        self._directory = tempfile.mkdtemp(prefix=".bench-", dir=directory)
        engine = {"ioengine": "psync", "direct": int(direct), "bs": bed.chunk_bytes}
        self.name = " ".join(["fio", *_options(engine), f"{jobs} jobs"])
        common = engine | {
            "directory": self._directory,
            "size": -(-bed.count // jobs) * bed.chunk_bytes,
            "fallocate": "none",
            "group_reporting": 1,
        }
        self._command = ["fio", "--output-format=json", "--name=global", *_options(common, "--")]
        own = f"mmapshared:/proc/{os.getpid()}/fd"
        self._jobs = {
            verb: [f"--name=raw{job} --mem={own}/{fds[job]}".split() for job in range(jobs)]
            for verb, fds in (("write", bed.sources), ("read", bed.targets))
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
            return self._nbytes / float(figures["bw_bytes"])
        except (ValueError, LookupError, ZeroDivisionError) as error:
            raise KVKeepError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}") from error


class Threads:
    """pwrite and pread of whole chunks by threads, for where there is no fio."""

    def __init__(self, directory: str, bed: Bed, direct: bool) -> None:
        self._bed, self._flags = bed, os.O_DIRECT if direct else 0
        self._directory = tempfile.mkdtemp(prefix=".bench-", dir=directory)
        self.name = f"pread threads={bed.depth} direct={int(direct)} bs={bed.chunk_bytes}"

    def put(self) -> float:
        return self._run(os.O_WRONLY | os.O_CREAT, os.pwritev, self._bed.sent)

    def get(self) -> float:
        return self._run(os.O_RDONLY, os.preadv, self._bed.back)

    def forget(self) -> None:
        for name in os.listdir(self._directory):
            os.unlink(os.path.join(self._directory, name))

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(
        self, flags: int, call: Callable[[int, Sequence[memoryview], int], int], chunks: list[memoryview]
    ) -> float:
        def work(number: int) -> None:
            fd = os.open(os.path.join(self._directory, str(number)), flags | self._flags, 0o600)
            for turn, chunk in enumerate(chunks[number :: self._bed.depth]):
                call(fd, [chunk], turn * self._bed.chunk_bytes)
            os.close(fd)

        with ThreadPoolExecutor(self._bed.depth) as pool:
            began = time.perf_counter()
            list(pool.map(work, range(min(self._bed.depth, self._bed.count))))
            return time.perf_counter() - began


def _options(named: dict[str, Any], prefix: str = "") -> list[str]:
    return [f"{prefix}{name}={value}" for name, value in named.items()]


def _raw_fs(url: TierURL, tier: Tier, bed: Bed) -> list[Raw]:
    direct = isinstance(tier, FsTier) and tier.direct
    kind = Fio if shutil.which("fio") else Threads
    return [kind(url.path, bed, direct)]


def _raw_redis(url: TierURL, tier: Tier, bed: Bed) -> list[Raw]:
    from kvbench.raw_redis import WAYS, RedisSockets

    return [RedisSockets(url, bed, ways) for ways in WAYS]


def _raw_mooncake(url: TierURL, tier: Tier, bed: Bed) -> list[Raw]:
    from kvbench.raw_mooncake import RawMooncake

    return [RawMooncake(url, bed)]


RAW: dict[str, Callable[[TierURL, Tier, Bed], list[Raw]]] = {
    "fs": _raw_fs,
    "redis": _raw_redis,
    "redis+unix": _raw_redis,
    "mooncake": _raw_mooncake,
}
"""By scheme, without what wraps it (`faulty+`): the ways to use that medium; given the URL, the raw tier
opened by it, and the memory."""
