"""How long a directory of many values takes to be served: after a clean end, after kill -9, with cold caches.

    python benchmarks/fs_files.py DIRECTORY [--values 10000,100000,1000000] [--json FILE]

Values of one page each, put through the tier by a process that then ends, or is killed while it has the
directory open. Opening is what `kvkeep serve` waits for; a count, where the books need one, goes on in the
background, and only puts wait for it. `cold`: with the caches of directories and inodes dropped, which
needs root. The directory is removed afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvkeep.tiers.base import Got, Put
from kvkeep.tiers.fs import FsTier, open_fs
from kvkeep.tiers.url import TierURL

console = Console(stderr=True, highlight=False)
BYTES, BATCH, ASKED = 4096, 512, 1000
_CACHES = Path("/proc/sys/vm/drop_caches")


def key(number: int) -> bytes:
    """A namespace's 8 bytes and a chunk's 16."""
    return bytes(8) + blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def opened(directory: Path) -> FsTier:
    """The tier, with room for all."""
    tier = open_fs(TierURL(f"fs://{directory}?capacity=64GiB"))
    assert isinstance(tier, FsTier)
    return tier


def fill(directory: Path, start: int, end: int) -> None:
    """The child: put values, say how many, and then wait until it is killed or told to end."""
    page = memoryview(mmap.mmap(-1, BYTES))
    with contextlib.closing(opened(directory)) as tier:
        for at in range(start, end, BATCH):
            keys = [key(number) for number in range(at, min(at + BATCH, end))]
            assert set(tier.put(keys, [page] * len(keys))) == {Put.STORED}
            print(at + len(keys), flush=True)
        sys.stdin.readline()


@contextlib.contextmanager
def filled(directory: Path, start: int, end: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has put them all and still has the directory open."""
    command = [sys.executable, __file__, str(directory), "--fill", str(start), str(end)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task(f"values up to {end:,}", total=end, completed=start)
                for line in child.stdout:
                    progress.update(task, completed=int(line))
                    if int(line) >= end:
                        break
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def served(directory: Path, count: int) -> dict[str, float]:
    """Seconds to open, to find and read what is asked of it first, to count again, and to put."""
    keys = [key(number) for number in range(0, count, max(1, count // ASKED))]
    page = memoryview(mmap.mmap(-1, BYTES))
    began = time.perf_counter()
    with contextlib.closing(opened(directory)) as tier:
        took = {"open": time.perf_counter() - began, "books_in_doubt": float(tier.counting)}
        began = time.perf_counter()
        assert tier.get(keys[:1], [page]) == [Got.HIT]
        took["first_get"] = time.perf_counter() - began
        began = time.perf_counter()
        assert all(tier.contains(keys))
        took["look_for_1000"] = time.perf_counter() - began
        began = time.perf_counter()
        while tier.counting:
            time.sleep(0.01)
        took["until_counted"] = time.perf_counter() - began if took["books_in_doubt"] else 0.0
        values = tier.usage().values
        assert values is not None
        assert 0 <= values - count <= BATCH, f"{values} in the books, {count} in the directory"
        assert tier.put([key(0)], [page]) == [Put.STORED]
    return took


def drop_caches() -> bool:
    """Whether the kernel forgot directories and inodes."""
    os.sync()
    try:
        _CACHES.write_text("3")
    except OSError:
        return False
    return True


def measure(directory: Path, counts: Sequence[int]) -> dict[str, Any]:
    """All sizes, one on top of the other."""
    results: dict[str, Any] = {}
    at = 0
    for count in counts:
        row: dict[str, Any] = {}
        began = time.perf_counter()
        with filled(directory, at, count) as child:
            row["puts_per_s"] = (count - at) / (time.perf_counter() - began)
            child.communicate(b"\n", timeout=60)
        row["clean end"] = served(directory, count)
        if drop_caches():
            row["clean end, cold"] = served(directory, count)
        for name in ("kill -9", "kill -9, cold"):
            with filled(directory, count - 1, count) as child:
                os.kill(child.pid, signal.SIGKILL)
            if "cold" not in name or drop_caches():
                row[name] = served(directory, count)
        results[f"{count}"], at = row, count
        console.print(f"{count:,}: {row}")
    return results


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--values", default="10000,100000,1000000", help="how many, one on top of the other")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = args.directory.absolute()
    if args.fill:
        fill(directory, *args.fill)
        return 0
    if directory.exists():
        parser.error(f"{directory} is there already: name a new directory")
    try:
        results = measure(directory, sorted(map(int, args.values.split(","))))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    text = json.dumps({"value_bytes": BYTES, "results": results}, indent=1)
    if args.json:
        args.json.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
