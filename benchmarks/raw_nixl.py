"""Two NIXL agents and nothing else: what `benchmarks/peers.py` holds the peer tier against."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from kvkeep.tiers.landing import address_of
from kvkeep.tiers.peer_nixl import Agent

__all__ = ["RawNixl"]

_OTHER = """
import os, sys
from kvbench.memory import arena
from kvkeep.tiers.peer_nixl import Agent
memory = memoryview(arena(int(sys.argv[1])))
for at in range(0, len(memory), 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
agent = Agent(memory, sys.argv[2])
print(agent.address(0), agent.metadata.hex(), flush=True)
sys.stdin.read()
"""


class RawNixl:
    """One READ of `count` pieces of `size` bytes of another process."""

    def __init__(self, memory: memoryview, size: int, count: int, device: str = "lo") -> None:
        command = [sys.executable, "-c", _OTHER, str(size * count), device]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        start, metadata = self.process.stdout.readline().split()
        self._agent = Agent(memory, device)
        self._name = self._agent.meet(bytes.fromhex(metadata))
        self._into = _pieces(address_of(memory), size, count)
        self._there = _pieces(int(start), size, count)

    def __call__(self) -> None:
        self._agent._read(self._name, self._into, self._there)

    def close(self) -> None:
        """End the other process."""
        self._agent.leave(self._name)
        self.process.kill()
        self.process.wait(20)


def _pieces(start: int, size: int, count: int) -> np.ndarray:
    return np.array([(start + at * size, size, 0) for at in range(count)], np.uint64)
