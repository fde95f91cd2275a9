"""Values in Redis or Valkey: one server, Sentinel's master, or a cluster.

A value is a string under `prefix:namespace/chunk`. It goes straight from the caller's memory to the
socket and back, in pipelines (`resp.py`); who holds a key is told by `redis_nodes.py`.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import (
    KEY_BYTES,
    Buffer,
    Capabilities,
    Got,
    Key,
    Listing,
    Put,
    Tier,
    Usage,
    key_name,
)
from kvkeep.tiers.redis_nodes import FAULTS, Address, Nodes
from kvkeep.tiers.redis_url import nodes_of, remedy
from kvkeep.tiers.resp import MAX_VALUE_BYTES, Reader, Refusal, Request, command, exchange
from kvkeep.tiers.threads import BATCHES, Threads
from kvkeep.tiers.url import TierURL

__all__ = ["RedisTier", "open_redis"]

log = logging.getLogger("kvkeep.tiers")

_R = TypeVar("_R")
_PASSING = {"MOVED", "ASK", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN"}
"""Errors that another server, or the same a moment later, may not give."""
_FULL = {"OOM", "MISCONF"}
"""Errors of a SET that leave the server useful for reading: it has no room, or cannot save to its disk."""
_FOREIGN = "WRONGTYPE"
"""Error of a GET or STRLEN where something that is no string lies under the key."""
_AT_ONCE = 16  # connections that one batch uses, over all servers
_ASKED = 4  # connections more, for short questions beside batches
_WORTH_A_CONNECTION = 4 << 20  # bytes: less is there sooner than another thread is awake
_TELL_EVERY = 60.0
_ASKING = command(b"ASKING")


class _Refused(NamedTuple):
    refusal: Refusal
    by: Address


@dataclass(frozen=True)
class _Job(Generic[_R]):
    """One verb over a batch: a request for each name, and what its reply means."""

    names: list[bytes]
    request: Callable[[int], Request]
    read: Callable[[Reader, int], _R | Refusal]
    out: list[_R | _Refused | None]
    """By place: the result, or why there is none yet."""
    nbytes: int = 0
    """Of all values: many are worth several connections."""
    unseen: bool = False
    """Not to count as a use of the values, where the server can do that (Redis 7.2, Valkey)."""

    def todo(self) -> list[int]:
        """Places without a result; the last first: where the server evicts by use, it loses them first."""
        left = [i for i, result in enumerate(self.out) if result is None or isinstance(result, _Refused)]
        return left[::-1]

    def refused(self) -> list[_Refused]:
        return [result for result in self.out if isinstance(result, _Refused)]


class RedisTier(Tier, Listing):
    """Redis or Valkey behind `nodes`."""

    overlaps = True

    def __init__(self, nodes: Nodes, prefix: str, ttl: float | None, connections: int, limit: int) -> None:
        """`ttl`: seconds after which the server forgets a value; `connections`: of one batch, per server, at
        most; `limit`: bytes of the longest value."""
        self._nodes, self._pool = nodes, nodes.pool
        self._pool.keep = BATCHES * connections + _ASKED
        self._prefix = prefix.encode() + b":"
        self._tail = b"\r\n" if ttl is None else b"\r\n" + _words(b"PX", b"%d" % max(1, int(ttl * 1000)))
        self._set = b"*%d\r\n$3\r\nSET\r\n" % (3 if ttl is None else 5)
        self._connections = connections
        self._limit = limit
        self._threads = Threads(_AT_ONCE, "kvkeep-redis")
        self._pid = os.getpid()
        self._closed = False
        self._tell_full_at = 0.0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(shared=True, persistent=True, max_value_bytes=self._limit)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        return [bool(number) for number in self._short(b"EXISTS", keys)]

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self._get(keys, buffers, unseen=False)

    def peek(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self._get(keys, buffers, unseen=True)

    def _get(self, keys: Sequence[Key], buffers: Sequence[Buffer], unseen: bool) -> list[Got]:
        def request(i: int) -> Request:
            return Request([command(b"GET", names[i])], len(buffers[i]))

        def read(reader: Reader, i: int) -> Got | Refusal:
            got = reader.value(buffers[i])
            if isinstance(got, Refusal):
                return Got.DAMAGED if got.code == _FOREIGN else got
            return Got.DAMAGED if got is Got.HIT and not self.check_value(keys[i], buffers[i]) else got

        names = self._names(keys)
        out: list[Got | _Refused | None] = [None] * len(names)
        return self._run(_Job(names, request, read, out, sum(map(len, buffers)), unseen=unseen))

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        def request(i: int) -> Request:
            self.seal_value(keys[i], buffers[i])
            head = self._set + b"$%d\r\n%s\r\n$%d\r\n" % (len(names[i]), names[i], len(buffers[i]))
            return Request([head, buffers[i], self._tail], len(buffers[i]))

        def read(reader: Reader, _: int) -> Put | Refusal:
            reply = reader.status()
            if isinstance(reply, Refusal):
                return self._full(reply) if reply.code in _FULL else reply
            return Put.STORED

        names = self._names(keys)
        too_long = [len(buffer) > self._limit for buffer in buffers]
        out: list[Put | _Refused | None] = [Put.REFUSED if long else None for long in too_long]
        return self._run(_Job(names, request, read, out, sum(map(len, buffers))))

    def delete(self, keys: Sequence[Key]) -> None:
        self._short(b"DEL", keys)

    def keys(self) -> Iterator[tuple[Key, int]]:
        """As told there; what is no string has length 0."""
        seen = set[Key]()
        pattern = re.sub(rb"([][*?^\\-])", rb"\\\1", self._prefix) + b"*"
        for address in self._nodes.masters():
            cursor = b"0"
            while True:
                self._check_open()
                cursor, names = self._scan(address, cursor, pattern)
                found = [key for key in map(self._key, names) if key is not None and key not in seen]
                seen.update(found)
                for key, length in zip(found, self._short(b"STRLEN", found), strict=True):
                    if length:
                        yield key, max(0, length)
                if cursor == b"0":
                    break

    def _scan(self, address: Address, cursor: bytes, pattern: bytes) -> tuple[bytes, list[bytes]]:
        try:
            cursor, names = self._pool.call(address, "SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            return bytes(cursor), [bytes(name) for name in names]
        except (*FAULTS, TypeError, ValueError) as error:
            raise TierUnavailable(f"{address}: {error}") from error

    def usage(self) -> Usage:
        """Memory of all masters, and the number of their keys (of other users too)."""
        self._check_open()
        used = capacity = values = 0
        bounded = True
        try:
            for address in self._nodes.masters():
                memory = _fields(self._pool.call(address, "INFO", "memory"))
                used += int(memory["used_memory"])
                capacity += int(memory["maxmemory"])
                bounded = bounded and int(memory["maxmemory"]) > 0
                values += int(self._pool.call(address, "DBSIZE"))
        except (*FAULTS, TierUnavailable, KeyError, ValueError, TypeError, AttributeError):
            return Usage()  # ACLs may not let us ask
        return Usage(used, capacity if bounded else None, values)

    def close(self) -> None:
        self._closed = True
        if os.getpid() == self._pid:  # in a fork, the connections are the parent's
            self._pool.close()
            self._threads.close(wait_for_it=False)

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailable("the tier is closed")
        if os.getpid() != self._pid:
            raise TierUnavailable("the tier was opened before a fork: open it in this process")

    def _names(self, keys: Sequence[Key]) -> list[bytes]:
        return [self._prefix + key_name(key).encode() for key in keys]

    def _key(self, name: bytes) -> Key | None:
        """The key of a name, if it is one of ours."""
        digits = name.removeprefix(self._prefix).replace(b"/", b"", 1)
        if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * KEY_BYTES), digits):
            return None
        key = bytes.fromhex(digits.decode())
        return key if self._names([key]) == [name] else None

    def _short(self, verb: bytes, keys: Sequence[Key]) -> list[int]:
        """A command with the key as its only argument, answered by a number; -1 for a foreign value."""

        def request(i: int) -> Request:
            return Request([command(verb, names[i])], 0)

        def read(reader: Reader, _: int) -> int | Refusal:
            reply = reader.status()
            return -1 if isinstance(reply, Refusal) and reply.code == _FOREIGN else reply

        names = self._names(keys)
        return self._run(_Job(names, request, read, [None] * len(names)))

    def _full(self, refusal: Refusal) -> Put:
        if time.monotonic() > self._tell_full_at:
            self._tell_full_at = time.monotonic() + _TELL_EVERY
            log.warning("redis takes no more values, which are dropped: %s", refusal.text)
        return Put.REFUSED

    # One batch: each server its part, and what was refused for now once more

    def _run(self, job: _Job[_R]) -> list[_R]:
        self._check_open()
        for last in (False, True):
            version, began = self._nodes.version, time.monotonic()
            try:
                self._round(job)
            except TierUnavailable:
                if last or not self._nodes.several:
                    raise
                slow = time.monotonic() - began > self._pool.timeout / 2
                self._nodes.refresh(version)
                if slow:  # who waits has waited long enough; the next batch finds what was found
                    raise
                continue
            refused = job.refused()
            if not refused:
                break
            if last or not any(refusal.code in _PASSING for refusal, _ in refused):
                raise TierUnavailable(f"{refused[0].by}: {refused[0].refusal.text}")
            self._nodes.refresh(version)
            for refusal, by in refused:
                self._nodes.moved(refusal, by)
        return job.out  # type: ignore[return-value]  # all are results now

    def _round(self, job: _Job[_R]) -> None:
        """Ask for all that has no result yet, every server for its own. Raises TierUnavailable."""
        parts: dict[Address, list[int]] = {}
        for i in job.todo():
            parts.setdefault(self._nodes.of(job.names[i]), []).append(i)
        ways = max(1, min(self._connections, job.nbytes // _WORTH_A_CONNECTION))
        shares = [(to, places[way::ways]) for to, places in parts.items() for way in range(ways)]
        self._spread(job, shares)
        asks: dict[Address, list[int]] = {}
        for i in job.todo():  # keys that are on their way from one server to another
            refused = job.out[i]
            if isinstance(refused, _Refused) and refused.refusal.code == "ASK":
                where = refused.refusal.text.rpartition(" ")[2]
                asks.setdefault(Address.told(where, refused.by), []).append(i)
        self._spread(job, list(asks.items()), asking=True)

    def _spread(self, job: _Job[_R], parts: list[tuple[Address, list[int]]], asking: bool = False) -> None:
        """All parts at once. Returns or raises when all have ended: the buffers are the caller's again."""
        parts = [part for part in parts if part[1]]
        ways = max(Counter(address for address, _ in parts).values(), default=1)
        self._threads.each(range(len(parts)), lambda n: self._part(job, *parts[n], ways, asking))

    def _part(self, job: _Job[_R], address: Address, places: list[int], ways: int, asking: bool) -> None:
        """One server's share over one connection. Raises TierUnavailable."""

        def request(n: int) -> Request:
            made = job.request(places[n])
            return Request([_ASKING, *made.parts], made.weight) if asking else made

        def read(n: int) -> None:
            if asking:
                link.reader.status()
            result = job.read(link.reader, places[n])
            job.out[places[n]] = _Refused(result, address) if isinstance(result, Refusal) else result

        try:
            with self._pool.link(address) as link:
                if job.unseen:
                    link.touch(False)
                exchange(link.reader, len(places), request, read, ways)
                if job.unseen:
                    link.touch(True)
        except FAULTS as error:
            raise TierUnavailable(f"{address}: {error}") from error


def _fields(info: Any) -> dict[str, str]:
    """From the reply to INFO."""
    lines = info.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _words(*words: bytes) -> bytes:
    """Arguments at the end of a command, as RESP."""
    return b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def open_redis(url: TierURL) -> RedisTier:
    """The tier of a redis://, rediss:// or redis+unix:// URL. Raises ConfigError with what to do."""
    ttl = url.take_seconds("ttl", 0.0)
    connections = url.take_count("connections", 4)
    prefix = url.take("prefix", str, "kvkeep")
    if not prefix or not prefix.isprintable() or set(prefix) & set("{} "):
        raise ConfigError(f"{url}: prefix must be of printable characters, without spaces and braces")
    nodes = nodes_of(url)
    try:
        nodes.refresh(nodes.version)
        tier = RedisTier(nodes, prefix, ttl or None, connections, _limit_of(nodes))
        tier.contains([random.randbytes(KEY_BYTES)])
    except TierUnavailable as error:
        nodes.pool.close()
        raise ConfigError(f"{url}: {error}; {remedy(error)}") from error
    return tier


def _limit_of(nodes: Nodes) -> int:
    """The longest value that the servers take; where they do not tell, it is the usual limit."""
    try:
        reply = nodes.pool.call(nodes.masters()[0], "CONFIG", "GET", "proto-max-bulk-len")
        return min(MAX_VALUE_BYTES, int(reply[1]))
    except (*FAULTS, TypeError, ValueError, IndexError):
        return MAX_VALUE_BYTES
