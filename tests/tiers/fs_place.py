"""A directory under test, looked at from behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

from kvkeep.tiers.base import Key, Tier
from kvkeep.tiers.fs_root import value_path
from tests.tiers.place import PAGE, Place, query


class FsPlace(Place):
    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, **options: str) -> str:
        return f"fs://{self.root}{query(options)}"

    def path(self, key: Key) -> Path:
        return Path(value_path(str(self.root), key))

    def read(self, key: Key) -> bytes | None:
        return self.path(key).read_bytes() if self.path(key).exists() else None

    def write(self, key: Key, value: bytes) -> None:
        self.path(key).write_bytes(value)

    def used_bytes(self) -> int:
        """What the files take; one between link(2) and unlink(2) has two names and is there once."""
        sizes = dict[int, int]()
        for path in self.files():
            try:
                seen = path.stat()
            except FileNotFoundError:  # evicted under our hands
                continue
            sizes[seen.st_ino] = -(-seen.st_size // PAGE) * PAGE
        return sum(sizes.values())

    def files(self) -> list[Path]:
        """Values and temporaries; as they are at one time only where nobody is at work."""
        found = [Path(at) / name for at, _, names in os.walk(self.root) for name in names]
        return [path for path in found if path.parent != self.root and path.name != "lock"]


def counted(tier: Tier, seconds: float = 20.0) -> tuple[int, int]:
    """Bytes and values by the tier's books, once it is not counting any more."""
    deadline = time.monotonic() + seconds
    while tier.counting:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    usage = tier.usage()
    return usage.used_bytes or 0, usage.values or 0
