"""A process that puts into a directory until it is killed, and says what was acknowledged.

    python -m tests.tiers.fs_writer DIRECTORY CAPACITY small|large

Each line on its standard input is a seed: a fork of it puts as that says, and names each key on standard
output once it is STORED. When that fork has ended, the line is `dead`.
"""

from __future__ import annotations

import mmap
import os
import random
import sys

from kvkeep.tiers import fs  # noqa: F401 (before the forks, so that they begin at once)
from kvkeep.tiers.base import KEY_BYTES, Key, Put
from kvkeep.tiers.open import open_tier
from kvkeep.tiers.seal import SEAL_BYTES

BATCH = 6
SPACES = {"small": b"namespac", "large": b"largeone"}
"""The first bytes of keys, by the size of their values."""


def length_of(key: Key) -> int:
    """Each key has one value: its length, and (`content_of`) its bytes."""
    if key.startswith(SPACES["large"]):
        return (1 + key[9] % 2) << 20
    return 4096 * (1 + key[9] % 4) + (77 if key[10] % 4 == 0 else 0)


def content_of(key: Key) -> bytes:
    return (key * (length_of(key) // KEY_BYTES + 1))[: length_of(key) - SEAL_BYTES]


def buffers_for(keys: list[Key]) -> list[memoryview]:
    """Page-aligned memory of the length that each value has."""
    return [memoryview(mmap.mmap(-1, -(-length_of(key) // 4096) * 4096))[: length_of(key)] for key in keys]


def put_for_ever(url: str, space: bytes, seed: str) -> None:
    source, known = random.Random(seed), list[Key]()
    tier = open_tier(url).tier
    while True:
        if known and source.random() < 0.25:
            keys = source.sample(known, BATCH)  # replaces what is there
        else:
            keys = [space + source.randbytes(KEY_BYTES - len(space)) for _ in range(BATCH)]
        buffers = buffers_for(keys)
        for key, buffer in zip(keys, buffers, strict=True):
            buffer[:-SEAL_BYTES] = content_of(key)
        stored = [key for key, put in zip(keys, tier.put(keys, buffers), strict=True) if put is Put.STORED]
        known += stored
        os.write(1, b"".join(key.hex().encode() + b"\n" for key in stored))


def main() -> None:
    directory, capacity, size = sys.argv[1:]
    for seed in sys.stdin:
        pid = os.fork()
        if not pid:
            put_for_ever(f"fs://{directory}?capacity={capacity}&depth=3", SPACES[size], seed)
        os.write(1, f"{pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main()
