"""Which Redis server holds a key, and connections to it: one server, Sentinel's master, or a cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.pool import Pool, PooledSocket
from kvkeep.tiers.resp import OutOfStep, Reader, Refusal

__all__ = ["Address", "Cluster", "Link", "Nodes", "RedisPool", "Sentinel", "Single"]

_T = TypeVar("_T")
FAULTS = (OSError, RedisError, OutOfStep)
"""What a connection can raise; it is of no use afterwards."""


class Address(NamedTuple):
    """Where a server listens; port 0: `host` is the path of a unix socket."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def told(cls, text: str, by: Address) -> Address:
        """From "host:port" as servers write it; without a host it is that of the server which tells."""
        host, _, port = text.rpartition(":")
        if not (port.isdigit() and 0 < int(port) < 1 << 16):
            raise OutOfStep(f"not an address: {text[:80]!r}")
        return cls(host or by.host, int(port))


class Link(PooledSocket):
    """One connection, ready for commands."""

    def __init__(self, address: Address, timeout: float, options: dict[str, Any], tls: bool) -> None:
        """Dial `address` and shake hands, each step within `timeout` seconds. Raises one of FAULTS."""
        self.reader = Reader(timeout)
        options = {
            **options,
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "parser_class": self.reader.adopt,
        }
        kind: Any = (SSLConnection if tls else Connection) if address.port else UnixDomainSocketConnection
        where = {"host": address.host, "port": address.port} if address.port else {"path": address.host}
        self._connection = kind(**where, **options)
        self._connection.connect()
        super().__init__(self._connection._sock)

    @property
    def stale(self) -> bool:
        return self.reader.can_read()

    def call(self, *words: str | bytes | int) -> Any:
        """The reply to one command. Raises one of FAULTS, ResponseError among them."""
        self._connection.send_command(*words)
        return self._connection.read_response()

    def touch(self, yes: bool) -> None:
        """Whether reading is a use of what is read, from now on; before Redis 7.2 it always is."""
        with contextlib.suppress(ResponseError):
            self.call("CLIENT", "NO-TOUCH", "OFF" if yes else "ON")

    def close(self) -> None:
        self._connection.disconnect()


class RedisPool(Pool[Address, Link]):
    """Connections by address; each of its verbs raises one of FAULTS."""

    def __init__(self, timeout: float, options: dict[str, Any], tls: bool, doubts: bool = False) -> None:
        """`options` are those of redis-py's connections: credentials, database, TLS files."""
        super().__init__(lambda address: Link(address, timeout, options, tls), doubts=doubts)
        self.timeout = timeout

    def call(self, address: Address, *words: str | bytes | int) -> Any:
        """The reply to one command."""
        with self.link(address) as link:
            return link.call(*words)


class Nodes(ABC):
    """The servers that hold the keys. Thread-safe."""

    several = True
    """Whether another server may take over, so that it is worth to look for it."""

    def __init__(self, pool: RedisPool) -> None:
        self.pool = pool
        self._lock = threading.Lock()
        self.version = 0
        """Changes with every `refresh`."""

    @abstractmethod
    def of(self, name: bytes) -> Address:
        """The server that holds this key."""

    @abstractmethod
    def masters(self) -> Sequence[Address]:
        """All servers that hold keys."""

    def refresh(self, seen: int) -> None:
        """Find out anew, unless somebody did since version `seen`. Raises TierUnavailable."""
        with self._lock:
            if self.version == seen:
                self.version += 1  # also where it fails: who waits here need not fail again
                self._find()

    def moved(self, refusal: Refusal, by: Address) -> None:  # noqa: B027 (only clusters move keys)
        """A server says that a key is elsewhere. Raises OutOfStep where that cannot be read."""

    @abstractmethod
    def _find(self) -> None:
        """Ask who is master of what. Raises TierUnavailable."""

    def _ask_around(self, addresses: Sequence[Address], ask: Callable[[Address], _T], what: str) -> _T:
        """The first answer. Two that do not answer are waited for, and no more. Raises TierUnavailable."""
        problems = []
        until = time.monotonic() + 1.5 * self.pool.timeout
        for address in addresses:
            try:
                return ask(address)
            except (*FAULTS, TierUnavailable) as error:
                problems.append(f"{address}: {error}")
            if time.monotonic() > until:
                break
        raise TierUnavailable(f"{what}: {'; '.join(problems)}")


class Single(Nodes):
    """One server, or a name that stands for one."""

    several = False

    def __init__(self, pool: RedisPool, address: Address) -> None:
        super().__init__(pool)
        self._address = address

    def of(self, name: bytes) -> Address:
        return self._address

    def masters(self) -> Sequence[Address]:
        return [self._address]

    def _find(self) -> None:
        self.pool.flush()  # the name may stand for another server now


class Sentinel(Nodes):
    """The master that sentinels name."""

    def __init__(self, pool: RedisPool, sentinels: Sequence[Address], name: str, asked: RedisPool) -> None:
        """`asked` makes the connections to sentinels, which have credentials of their own."""
        super().__init__(pool)
        self._sentinels, self._name, self._asked = list(sentinels), name, asked
        self._master: Address | None = None

    def of(self, name: bytes) -> Address:
        return self.masters()[0]

    def masters(self) -> Sequence[Address]:
        if self._master is None:
            raise TierUnavailable(f"no sentinel told the master {self._name!r} yet")
        return [self._master]

    def _find(self) -> None:
        what = f"no sentinel knows a master {self._name!r} that is up"
        self._master = self._ask_around(self._sentinels, self._ask, what)
        self.pool.flush()  # the server may have another role now

    def _ask(self, address: Address) -> Address:
        reply = self._asked.call(address, "SENTINEL", "MASTER", self._name)
        if not isinstance(reply, list) or not all(isinstance(item, bytes) for item in reply):
            raise OutOfStep("not a sentinel's reply")
        fields = dict(zip(reply[::2], reply[1::2], strict=False))
        flags = set(fields.get(b"flags", b"").split(b","))
        if b"master" not in flags or flags & {b"s_down", b"o_down"}:
            raise TierUnavailable(f"its state is {b','.join(sorted(flags)).decode(errors='replace')}")
        where = fields.get(b"ip", b"") + b":" + fields.get(b"port", b"")
        self._sentinels.sort(key=address.__ne__)  # this one first, the next time
        return Address.told(where.decode(errors="replace"), address)


class Cluster(Nodes):
    """A cluster: 16,384 slots, each with a master."""

    def __init__(self, pool: RedisPool, seeds: Sequence[Address]) -> None:
        super().__init__(pool)
        self._seeds = list(seeds)
        self._slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS

    def of(self, name: bytes) -> Address:
        address = self._slots[key_slot(name)]
        if address is None:
            raise TierUnavailable(f"no server of the cluster holds slot {key_slot(name)}")
        return address

    def masters(self) -> Sequence[Address]:
        return list(dict.fromkeys(address for address in self._slots if address is not None))

    def moved(self, refusal: Refusal, by: Address) -> None:
        slot, _, where = refusal.text.partition(" ")[2].partition(" ")
        if not (slot.isdigit() and int(slot) < REDIS_CLUSTER_HASH_SLOTS):
            raise OutOfStep(f"not a slot: {refusal.text[:80]!r}")
        self._slots[int(slot)] = Address.told(where, by)

    def _find(self) -> None:
        def ask(address: Address) -> list[Address | None]:
            return _slots_of(self.pool.call(address, "CLUSTER", "SLOTS"), address)

        addresses = list(dict.fromkeys([*self.masters(), *self._seeds]))
        self._slots = self._ask_around(addresses, ask, "no server of the cluster tells its slots")


def _slots_of(reply: Any, by: Address) -> list[Address | None]:
    """Slots from the reply to CLUSTER SLOTS: [first, last, [host, port, …], replicas …] …"""
    slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    try:
        for first, last, (host, port, *_), *_replicas in reply:
            address = Address.told(f"{(host or b'').decode()}:{port}", by)
            if not 0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS:
                raise OutOfStep(f"not slots: {first}-{last}")
            slots[first : last + 1] = [address] * (last + 1 - first)
    except (TypeError, ValueError, AttributeError) as error:
        raise OutOfStep("not a reply to CLUSTER SLOTS") from error
    return slots
