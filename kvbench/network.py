"""Two more hosts on this machine: network namespaces, each on a link of its own to this one, the stores'."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Host", "Unavailable", "common_address", "hosts"]

_BURST, _LATENCY = "2mb", "50ms"


class Unavailable(Exception):
    """Network namespaces cannot be made here; the message says why."""


class Host:
    """One namespace; `address` is its own, `store` where it reaches the stores, on the device `link` here."""

    def __init__(self, number: int) -> None:
        self.name = f"kv{os.getpid() % 100000}-{number}"
        self.link = f"kv{os.getpid() % 100000}v{number}"
        self.address, self.store = f"10.77.{number}.2", f"10.77.{number}.1"

    def command(self, *words: str) -> list[str]:
        """Words that run a program on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.link, "down")

    def restore(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self.link, "up")

    def limit(self, rate: str) -> None:
        """Bound both directions of its link, as tc writes rates: 10gbit. Raises Unavailable."""
        words = ("root", "tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY)
        for where in (
            ["tc", "qdisc", "add", "dev", self.link],
            self.command("tc", "qdisc", "add", "dev", "eth0"),
        ):
            done = subprocess.run([*where, *words], capture_output=True, timeout=20, check=False)
            if done.returncode:
                raise Unavailable(f"tc cannot limit a link here: {done.stderr.decode().strip()}")

    def start(self) -> None:
        """Make it. Raises CalledProcessError."""
        _ip("netns", "add", self.name)
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("addr", "add", f"{self.store}/24", "dev", self.link)
        _ip("link", "set", self.link, "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", self.store),
        ):
            _ip("-n", self.name, *words)

    def stop(self) -> None:
        """Remove it, with its link."""
        for what, name in (
            ("link", self.link),
            ("netns", self.name),
        ):  # a link alone would outlast it a while
            with suppress(subprocess.CalledProcessError):
                _ip(what, "del", name)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts. Raises Unavailable where this user may not make any."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        raise Unavailable("network namespaces need root and iproute2")
    made = [Host(number) for number in range(1, count + 1)]
    try:
        try:
            for host in made:
                host.start()
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"network namespaces cannot be made here: {error.stderr.decode()}") from error
        yield made
    finally:
        for host in made:
            host.stop()


@contextmanager
def common_address() -> Iterator[str]:
    """An address of this host that all of them reach, for servers that tell clients where they are."""
    address = f"10.78.{os.getpid() % 250}.1"
    _ip("addr", "add", f"{address}/32", "dev", "lo")
    try:
        yield address
    finally:
        _ip("addr", "del", f"{address}/32", "dev", "lo")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
