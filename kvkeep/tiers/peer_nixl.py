"""A NIXL agent of one keeper: its arena registered once, and reads of a peer's arena into it.

NIXL (with its UCX backend) moves by RDMA where the hosts have it, by TCP or shared memory where not. It has
no authentication of its own: whoever reaches UCX's port may read what is registered. So it is never on by
itself, and its port is that of one network device, the loopback one unless another is named.

A read that has begun cannot be called back: released in mid-way, UCX goes on writing to the memory. So
`Agent.end` returns when the read has ended, whatever that takes, and the slots stay reserved until then.

Through its bindings, not its Python class: that one's progress thread takes a whole core for nothing (its
`pthrDelay` is 0), and its logger writes to standard output.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Buffer
from kvkeep.tiers.landing import address_of

__all__ = ["Agent", "allow", "load", "loaded"]

log = logging.getLogger("kvkeep.tiers")

_LOOK_EVERY, _LOOK_LATE = 0.0002, 0.02
_PROGRESS_EVERY = 10_000  # microseconds; it wakes up by itself when something comes
_PACKAGES = ("nixl_cu12", "nixl_cu13")


def load() -> Any:
    """NIXL's bindings. Raises ConfigError where it is not installed.

    Not the package `nixl`, which looks at torch to choose between these."""
    for name in _PACKAGES:
        try:
            return importlib.import_module(f"{name}._bindings")
        except ImportError:
            continue
    raise ConfigError("transport=nixl needs NIXL: pip install 'kvkeep[nixl]'")


def allow(device: str, plain: bool) -> None:
    """Raises ConfigError where NIXL is not installed, or would show the arena to a network that nobody has
    called safe (`plain`)."""
    if device != "lo" and not plain:
        raise ConfigError(
            f"transport=nixl on {device} asks nobody for a token and encrypts nothing: whoever reaches it "
            "can read the whole arena; where only keepers are on that network, say so: plain=yes"
        )
    load()


def loaded() -> bool:
    """Whether this process has loaded NIXL. If so it should end by `os._exit`: a library in its wheel (1.5.1,
    libnl-route) crashes when it is taken down."""
    return any(f"{name}._bindings" in sys.modules for name in _PACKAGES)


class Agent:
    """One agent. Thread-safe; registers `memory`, which must stay mapped, for good."""

    def __init__(self, memory: Buffer, device: str, timeout: float = 10.0) -> None:
        """`device`: of the network, as UCX names it (UCX_NET_DEVICES in the environment goes before it).
        `timeout`: seconds after which a read that goes on is told of. Raises ConfigError."""
        self._nixl = nixl = load()
        self._errors = tuple(kind for _, kind in inspect.getmembers(nixl, _is_error))
        self._timeout = timeout
        self._start, self._nbytes = address_of(memory), len(memory)
        self._lock = threading.Lock()
        settings = nixl.nixlAgentConfig()
        settings.useProgThread, settings.pthrDelay = True, _PROGRESS_EVERY
        settings.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent = nixl.nixlAgent(f"kvkeep-{secrets.token_hex(8)}", settings)
            self._agent.createBackend("UCX", {"engine_config": f"NET_DEVICES={device}"})
            region = (self._start, self._nbytes, 0, "")
            self._agent.registerMem(nixl.nixlRegDList(nixl.DRAM_SEG, [region]), [])
            self.metadata: bytes = self._agent.getLocalMD()
        except (*self._errors, RuntimeError) as error:
            raise ConfigError(f"NIXL cannot be used on the network device {device}: {error}") from error
        _kept.append(self)

    def has(self, buffer: Buffer) -> bool:
        """Whether a buffer lies in what is registered."""
        start = address_of(buffer)
        return self._start <= start and start + len(buffer) <= self._start + self._nbytes

    def address(self, offset: int) -> int:
        """Where a place in the registered memory is, for a peer."""
        return self._start + offset

    def meet(self, metadata: bytes) -> str:
        """Get to know a peer's agent; returns its name. Raises TierUnavailable."""
        try:
            with self._lock:
                name = self._agent.loadRemoteMD(metadata)
        except (*self._errors, RuntimeError) as error:
            raise TierUnavailable(f"NIXL cannot reach the peer's agent: {error}") from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def leave(self, name: str) -> None:
        """Forget a peer's agent, and the connection to it. No read of it may be under way."""
        try:
            with self._lock:
                self._agent.invalidateRemoteMD(name)
        except (*self._errors, RuntimeError) as error:
            log.debug("NIXL: %s", error)

    def begin(self, name: str, buffers: Sequence[Buffer], addresses: Sequence[int]) -> int:
        """Begin to fill each buffer from its address in the peer's memory; every read that began is to be
        ended. Raises TierUnavailable."""
        into = [(address_of(buffer), len(buffer), 0) for buffer in buffers]
        there = [(at, row[1], 0) for at, row in zip(addresses, into, strict=True)]
        nixl = self._nixl
        try:
            rows = [nixl.nixlXferDList(nixl.DRAM_SEG, np.array(row, np.uint64)) for row in (into, there)]
            handle = int(self._agent.createXferReq(nixl.NIXL_READ, *rows, name, b"", []))
        except (*self._errors, RuntimeError, ValueError) as error:
            raise TierUnavailable(f"NIXL: the read cannot be made: {error}") from error
        try:
            self._agent.postXferReq(handle, b"")
        except (*self._errors, RuntimeError) as error:
            self._agent.releaseXferReq(handle)
            raise TierUnavailable(f"NIXL: the read cannot begin: {error}") from error
        return handle

    def end(self, handle: int) -> None:
        """Wait until a read is over. Raises TierUnavailable where it failed; then too nothing writes to its
        buffers any more."""
        nixl, began, told = self._nixl, time.monotonic(), False
        try:
            while self._agent.getXferStatus(handle) == nixl.NIXL_IN_PROG:
                late = time.monotonic() - began > self._timeout
                if late and not told:
                    told = True
                    log.warning(
                        "NIXL: a read of a peer takes more than %g s; it is waited for", self._timeout
                    )
                time.sleep(_LOOK_LATE if late else _LOOK_EVERY)
        except (*self._errors, RuntimeError) as error:
            raise TierUnavailable(f"NIXL: the read failed: {error}") from error
        finally:
            self._agent.releaseXferReq(handle)


_kept: list[Agent] = []
"""Agents are not taken down before the process ends: a thread may be inside, and peers may read."""


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)
