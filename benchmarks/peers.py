"""Chunks from keeper to keeper: what the peer tier reaches, as a share of a raw socket and of raw NIXL.

    python -m benchmarks.peers --chunk-mib 1 2 4 --rounds 9
    python -m benchmarks.peers --transport tcp nixl        # with the extra `nixl`

One `kvkeep serve --peers` holds `--total-mib` of random chunks; this process reads them as the tier of a
second keeper does, into memory that is touched, and compares every byte. In each round the chunks are saved
anew, so `first` has the seal made on the way and `again` has not. The raw contestants move the same sizes
between two processes: a socket with sendall and recv_into, and a NIXL agent with one READ of all of them.
All take turns within a round, the order turned round each time. A share is the median of the rounds' own
(in brackets that of the two best).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvbench.memory import arena
from kvkeep.errors import KeeperUnavailable, KVKeepError
from kvkeep.identity import group_keys
from kvkeep.tiers.base import Got
from kvkeep.tiers.open import Opened, open_tier
from kvkeep.tiers.peer_nixl import loaded
from kvkeep.tiers.seal import SEAL_BYTES
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation

PRINT = b"peers-benchmark".ljust(32, b"\0")
REST = 0.2

RAW_SOCKET = """
import mmap, os, socket, sys, threading
size, count = int(sys.argv[1]), int(sys.argv[2])
memory = memoryview(mmap.mmap(-1, size * count))
for at in range(0, len(memory), 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)

def serve(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := sock.recv(16, socket.MSG_WAITALL):
        first, step = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")
        for number in range(first, count, step):
            sock.sendall(memory[number * size : (number + 1) * size])

while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


class Bed:
    """Memory to read into; and what it should hold then."""

    def __init__(self, size: int, count: int) -> None:
        self.size, self.count = size, count
        self.memory = arena(size * count)
        self.chunks = [self.memory[at * size : (at + 1) * size] for at in range(count)]
        self.sent = np.frombuffer(os.urandom(size * count), np.uint8).reshape(count, size)

    def spoil(self) -> None:
        np.frombuffer(self.memory, np.uint64)[::512] ^= 1

    def same(self) -> bool:
        """Whether all but the seals is there."""
        back = np.frombuffer(self.memory, np.uint8).reshape(self.count, self.size)
        return bool(np.array_equal(back[:, :-SEAL_BYTES], self.sent[:, :-SEAL_BYTES]))


class Giver:
    """The other keeper, and its engine."""

    def __init__(self, folder: Path, where: str, bed: Bed) -> None:
        path = str(folder / f"k{bed.size}.sock")
        memory = f"{2 * bed.size * bed.count + (1 << 28)}"
        command = [sys.executable, "-m", "kvkeep.cli", "serve", "--socket", path, "--memory", memory]
        self.process = subprocess.Popen([*command, "--peers", where], stderr=(folder / "log").open("ab"))
        self.link = _connected(path, self.process, folder / "log")
        figures: Any = self.link.status()["peers"]
        self.address = figures["address"]
        self._bed, self._memory = bed, self.link.map_arena()
        self._space = self.link.open_namespace(PRINT, "benchmark", [(bed.size - SEAL_BYTES, None)], 1, 1)
        self._keys = os.urandom(16 * bed.count)
        self.names = [PRINT[:8] + key.tobytes() for key in group_keys(self._keys, PRINT, 0)]

    def save(self) -> None:
        """Hold the chunks, newly written."""
        self.link.clear()
        [done] = self.link.reserve(self._space, [Reservation(self._keys, [b"\1" * self._bed.count], 0, 0)])
        for offset, chunk in zip(done.offsets[0].tolist(), self._bed.sent, strict=True):
            self._memory[offset : offset + len(chunk)] = chunk.data
        self.link.commit(done.reservation, 0)
        self.link.status()

    def close(self) -> None:
        self.link.close()
        self.process.terminate()
        self.process.wait(60)


class RawSocket:
    """Chunks over `width` plain connections, every one into its place."""

    def __init__(self, bed: Bed, width: int) -> None:
        command = [sys.executable, "-c", RAW_SOCKET, str(bed.size), str(bed.count)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        self._bed = bed
        self._socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(width)]

    def __call__(self) -> None:
        threads = [
            threading.Thread(target=self._read, args=(sock, first)) for first, sock in enumerate(self._socks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _read(self, sock: socket.socket, first: int) -> None:
        sock.sendall(first.to_bytes(8, "little") + len(self._socks).to_bytes(8, "little"))
        for chunk in self._bed.chunks[first :: len(self._socks)]:
            done = 0
            while done < len(chunk):
                done += sock.recv_into(chunk[done:], len(chunk) - done, socket.MSG_WAITALL)

    def close(self) -> None:
        for sock in self._socks:
            sock.close()
        self.process.kill()
        self.process.wait(20)


def measure(size: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """GB/s of each contestant for chunks of one size."""
    bed = Bed(size, (args.total_mib << 20) // size)
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        where = "0?transport=nixl" if "nixl" in args.transport else "0"
        giver = Giver(folder, where, bed)
        stack.callback(giver.close)
        turns: list[Callable[[], None]] = []
        for width in args.connections:
            turns.append(lambda w=width: raw(seconds, f"raw socket ×{w}", sockets[w], bed))  # type: ignore[misc]
            url = f"peer://{giver.address}?connections={width}"
            turns.append(_reading(stack, seconds, f"tcp ×{width}", url, giver, bed))
        sockets = {width: RawSocket(bed, width) for width in args.connections}
        for one in sockets.values():
            stack.callback(one.close)
        if "nixl" in args.transport:
            from benchmarks.raw_nixl import RawNixl

            agent = RawNixl(bed.memory, bed.size, bed.count)
            stack.callback(agent.close)
            turns.append(lambda: raw(seconds, "raw nixl", agent, bed))
            turns.append(lambda: raw(seconds, "raw nixl, 16 MiB at a time", lambda: agent(16 << 20), bed))
            url = f"peer://{giver.address}?transport=nixl"
            turns.append(_reading(stack, seconds, "nixl", url, giver, bed))
        for number in range(args.rounds + 1):
            for turn in turns[:: 1 if number % 2 else -1]:
                turn()
    for samples in seconds.values():
        del samples[:1]  # pays for what is set up once
    nbytes = bed.size * bed.count
    return {name: _figures(nbytes, name, seconds) for name in sorted(seconds)}


def _reading(
    stack: contextlib.ExitStack, seconds: dict[str, list[float]], name: str, url: str, giver: Giver, bed: Bed
) -> Callable[[], None]:
    opened = open_tier(url)
    stack.callback(opened.tier.close)
    opened.tier.attach(bed.memory)

    def turn() -> None:
        giver.save()
        for which in ("first", "again"):
            get(seconds, f"{name} {which}", opened, giver, bed)

    return turn


def get(seconds: dict[str, list[float]], name: str, opened: Opened, giver: Giver, bed: Bed) -> None:
    """One read of all chunks through the tier."""
    bed.spoil()
    time.sleep(REST)
    began = time.perf_counter()
    results = opened.tier.get(giver.names, bed.chunks)
    seconds.setdefault(name, []).append(time.perf_counter() - began)
    if results.count(Got.HIT) != bed.count or not bed.same():
        raise KVKeepError(f"{name}: only {results.count(Got.HIT)} of {bed.count} came, or other bytes")


def raw(seconds: dict[str, list[float]], name: str, move: Callable[[], None], bed: Bed) -> None:
    """One move of as much without kvkeep."""
    bed.spoil()
    time.sleep(REST)
    began = time.perf_counter()
    move()
    seconds.setdefault(name, []).append(time.perf_counter() - began)


def _figures(nbytes: int, name: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    samples = seconds[name]
    out = {"GBps": nbytes / median(samples) / 1e9, "best_GBps": nbytes / min(samples) / 1e9}
    kind, _, rest = name.partition(" ")
    base = {"tcp": f"raw socket {rest.partition(' ')[0]}", "nixl": "raw nixl"}.get(kind)
    if base is not None:
        shares = [theirs / ours for theirs, ours in zip(seconds[base], samples, strict=True)]
        out |= {"of_raw": median(shares), "best_of_raw": min(seconds[base]) / min(samples)}
    return out


def _connected(path: str, process: subprocess.Popen[bytes], log: Path) -> Connection:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(KeeperUnavailable):
            return Connection.open(path, "benchmark", arena=True, timeout=60.0)
        time.sleep(0.05)
    raise KVKeepError(f"the keeper does not start: {log.read_text()}")


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, row in figures.items():
        share = f"{row['of_raw']:.2f} ({row['best_of_raw']:.2f})" if "of_raw" in row else ""
        yield name, f"{row['GBps']:.2f} ({row['best_GBps']:.2f})", share


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--total-mib", type=int, default=256, help="of one read")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--transport", nargs="+", choices=["tcp", "nixl"], default=["tcp"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    out = {}
    with tempfile.TemporaryDirectory(prefix="kvkeep-") as folder:
        for mib in args.chunk_mib:
            out[mib] = measure(mib << 20, args, Path(folder))
            if not args.json:
                title = f"{args.total_mib} MiB in chunks of {mib} MiB, {args.rounds} rounds"
                table = Table("", "GB/s, median (best)", "of raw (best)", title=title)
                for row in _rows(out[mib]):
                    table.add_row(*row)
                Console().print(table)
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    code = main()
    if loaded():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
