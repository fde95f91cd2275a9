"""Two NIXL agents and nothing else: what `benchmarks/peers.py` holds the peer tier against."""

from __future__ import annotations

import subprocess
import sys

from kvkeep.tiers.peer_nixl import Agent

__all__ = ["RawNixl"]

_OTHER = """
import os, sys
from kvbench.memory import arena
from kvkeep.tiers.peer_nixl import Agent
memory = arena(int(sys.argv[1]))
for at in range(0, len(memory), 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
agent = Agent(memory, sys.argv[2])
print(agent.address(0), agent.metadata.hex(), flush=True)
sys.stdin.read()
"""


class RawNixl:
    """READs of `count` pieces of `size` bytes of another process, all at once or `most` bytes at a time."""

    def __init__(self, memory: memoryview, size: int, count: int, device: str = "lo") -> None:
        command = [sys.executable, "-c", _OTHER, str(size * count), device]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        start, metadata = self.process.stdout.readline().split()
        self._agent = Agent(memory, device)
        self._name = self._agent.meet(bytes.fromhex(metadata))
        self._there = [int(start) + at * size for at in range(count)]
        self._into = [memory[at * size : (at + 1) * size] for at in range(count)]

    def __call__(self, most: int = 1 << 62) -> None:
        step = max(1, most // len(self._into[0]))
        for at in range(0, len(self._into), step):
            buffers, addresses = self._into[at : at + step], self._there[at : at + step]
            self._agent.end(self._agent.begin(self._name, buffers, addresses))

    def close(self) -> None:
        """End the other process."""
        self._agent.leave(self._name)
        self.process.kill()
        self.process.wait(20)
