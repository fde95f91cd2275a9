"""Real stores on this machine for the benchmarks, each started and ended here; URLs of tiers on them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


@contextlib.contextmanager
def fs(folder: Path) -> Iterator[str]:
    """A directory beside the working tree, on its disk."""
    yield f"fs://{folder}/fs?capacity=20GiB"


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Valkey on loopback."""
    from tests.tiers.redis_server import Server

    server = Server()
    try:
        yield f"redis://127.0.0.1:{server.port}/0"
    finally:
        server.close()


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[str]:
    """SeaweedFS on loopback."""
    from tests.tiers import weed

    (folder / "weed").mkdir()
    with weed.running(folder / "weed") as server:
        yield (
            f"s3://{weed.KEY}:{weed.SECRET}@{weed.BUCKET}/bench"
            f"?endpoint=http://127.0.0.1:{server.port}&region=us-east-1"
        )


STORES: dict[str, Callable[[Path], contextlib.AbstractContextManager[str]]] = {
    "fs": fs,
    "redis": redis,
    "s3": s3,
}


@contextlib.contextmanager
def stores(names: list[str]) -> Iterator[dict[str, str]]:
    """The URLs of tiers on these stores, which are up inside the block."""
    with contextlib.ExitStack() as stack:
        here = Path(__file__).parent / "out"
        here.mkdir(exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stores-", dir=here)))
        yield {name: stack.enter_context(STORES[name](folder)) for name in names}
