"""What memory costs that lay untouched for a while: nothing, unless a host takes its pages away meanwhile.

    python benchmarks/host_pages.py [--memory 1024] [--window 8] [--every 5] [--seconds 600]

A virtual machine's memory is its host's: one that moves, scans or swaps it makes the next access to each
page wait, and no counter within the machine shows that. Everything that a cache keeps is such memory.
Writes all of some memory once; then reads, and writes, a word of each page of one window after the other,
and prints the nanoseconds per page of 4 KiB. Some 50 and 10 are caches and page tables; thousands are the
host. Run it beside a benchmark whose copies are slow in some runs.
"""

from __future__ import annotations

import argparse
import mmap
import time

import numpy as np

MIB, PAGE = 1 << 20, 4096


def windows(memory: int, window: int, huge: bool) -> list[np.ndarray]:
    """Words at the beginnings of pages, by window; all of them written."""
    area = mmap.mmap(-1, memory)
    if huge:
        area.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(area, np.int64)[:: PAGE // 8]
    began = time.perf_counter()
    words[:] = 1
    print(f"first touch: {1e9 * (time.perf_counter() - began) / len(words):.0f} ns a page", flush=True)
    count = window // PAGE
    return [words[at : at + count] for at in range(0, len(words) - count + 1, count)]


def main() -> int:
    """Print a line every few seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", default=1024, type=int, help="MiB")
    parser.add_argument("--window", default=8, type=int, help="MiB that are looked at in one go")
    parser.add_argument("--every", default=5.0, type=float, help="seconds")
    parser.add_argument("--seconds", default=600.0, type=float, help="when to end")
    parser.add_argument("--small-pages", action="store_true", help="the machine's own pages of 4 KiB")
    args = parser.parse_args()
    rows = windows(args.memory * MIB, args.window * MIB, not args.small_pages)
    end, turn = time.monotonic() + args.seconds, 0
    while time.monotonic() < end:
        time.sleep(args.every)
        row = rows[turn % len(rows)]
        began = time.perf_counter()
        value = int(row.sum())
        read = time.perf_counter()
        row[:] = value
        done = time.perf_counter()
        took = [f"{1e9 * seconds / len(row):.0f}" for seconds in (read - began, done - read)]
        print(f"{time.strftime('%H:%M:%S')}: read {took[0]}, written {took[1]} ns a page", flush=True)
        turn += 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
