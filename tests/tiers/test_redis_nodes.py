"""The redis tier on clusters and behind Sentinel: keys that move, masters that die."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator

import pytest

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Got, Key, Put, Tier
from tests.tiers.conformance import TierConformance
from tests.tiers.place import PAGE, Place, buffers_of, closing, free_port, keys_of, open_at, wait_until
from tests.tiers.redis_server import (
    RedisPlace,
    Server,
    name_of,
    patiently,
    redis,
    running,
)

SLOTS = 16384


def slot_of(key: Key) -> int:
    return redis.crc.key_slot(name_of(key).encode())


def keys_of_one_slot(count: int) -> list[Key]:
    """Distinct keys that one server holds, wherever their slot goes."""
    first, source = keys_of(1, 77)[0], random.Random(78)
    found = [first]
    while len(found) < count:
        key = first[:8] + source.randbytes(16)
        if slot_of(key) == slot_of(first):
            found.append(key)
    return found


class ClusterServers:
    """Three masters on this host, each with a third of the slots; and replicas, where asked for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.servers = [self._start() for _ in range(3)]
        for number, server in enumerate(self.servers):
            server.call("CLUSTER", "ADDSLOTSRANGE", SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1)
            server.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            self._meet(server)
        wait_until(self.whole, 20)

    def _start(self) -> Server:
        self._bus = free_port()
        options = ("--cluster-enabled", "yes", "--cluster-port", str(self._bus))
        server = self._stack.enter_context(running(*options, "--cluster-node-timeout", "1000"))
        server.bus = self._bus
        return server

    def _meet(self, server: Server) -> None:
        server.call("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, self.servers[0].bus)

    def whole(self) -> bool:
        states = [server.call("CLUSTER", "INFO") for server in self.servers]
        return all(b"cluster_state:ok" in state and b"cluster_known_nodes:3" in state for state in states)

    def replica_of(self, master: Server) -> Server:
        replica = self._start()
        self._meet(replica)
        ident = master.call("CLUSTER", "MYID").decode()
        wait_until(lambda: ident in str(replica.call("CLUSTER", "NODES")), 10)
        replica.call("CLUSTER", "REPLICATE", ident)
        wait_until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"), 10)
        return replica

    def owner(self, slot: int) -> Server:
        return self.servers[next(n for n in range(3) if slot < SLOTS * (n + 1) // 3)]

    def url(self, *options: str) -> str:
        seeds = ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:2])
        return f"redis://{seeds}?" + "&".join(["cluster=yes", *options])


class ClusterPlace(RedisPlace):
    """Looks behind the tier by redis-py's cluster client."""

    def __init__(self, servers: ClusterServers) -> None:
        self.url, self.proxy = servers.url(), None
        self.client = redis.RedisCluster("127.0.0.1", servers.servers[0].port, protocol=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterServers]:
    with contextlib.ExitStack() as stack:
        yield ClusterServers(stack)


@pytest.fixture
def tier(cluster: ClusterServers) -> Iterator[Tier]:
    with closing(open_at(cluster.url("timeout=1s"))) as tier:
        yield tier
    for server in cluster.servers:
        server.call("FLUSHALL")


class TestCluster(TierConformance):
    sizes = TierConformance.sizes[::4]

    @pytest.fixture
    def place(self, cluster: ClusterServers) -> Place:
        place = ClusterPlace(cluster)
        yield place
        place.close()


def test_keys_lie_on_all_masters(cluster: ClusterServers, tier: Tier) -> None:
    keys, sent, back = keys_of(60), buffers_of([16 * PAGE] * 60, 1), buffers_of([16 * PAGE] * 60)
    assert tier.put(keys, sent) == [Put.STORED] * 60
    assert sorted(server.call("DBSIZE") > 5 for server in cluster.servers) == [True] * 3
    assert tier.get(keys, back) == [Got.HIT] * 60
    assert sent == back
    assert tier.usage().values == 60


def test_keys_that_move_are_found(cluster: ClusterServers, tier: Tier) -> None:
    keys, sent, back = keys_of_one_slot(4), buffers_of([64 * PAGE] * 4, 1), buffers_of([64 * PAGE] * 4)
    slot = slot_of(keys[0])
    source = cluster.owner(slot)
    target = next(server for server in cluster.servers if server is not source)
    ids = {server: server.call("CLUSTER", "MYID").decode() for server in (source, target)}
    others, of_others = keys_of(30), buffers_of([PAGE] * 30, 2)  # of all servers, in the same batches
    tier.put(keys[:3], sent[:3])
    tier.put(others, of_others)

    # On the way: two keys are at the target already, one is still at the source, one is new.
    target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    for key in keys[:2]:
        source.call("MIGRATE", "127.0.0.1", target.port, name_of(key), 0, 5000)
    assert tier.contains(others + keys) == [True] * 33 + [False]
    assert tier.get(keys, back) == [Got.HIT] * 3 + [Got.MISS]
    assert sent[:3] == back[:3]
    assert tier.put([*keys, *others], [*sent, *of_others]) == [Put.STORED] * 34
    assert target.call("DBSIZE") >= 3
    source.call("MIGRATE", "127.0.0.1", target.port, name_of(keys[2]), 0, 5000)

    # There: the first batch learns it, and needs no second try.
    for server in (target, source, *cluster.servers):
        server.call("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    assert tier.get(keys, back) == [Got.HIT] * 4
    assert sent == back
    with source.client() as client:
        before = client.info("errorstats").get("errorstat_MOVED", {"count": 0})["count"]
        assert tier.get(keys, back) == [Got.HIT] * 4
        assert client.info("errorstats")["errorstat_MOVED"]["count"] == before > 0
    tier.delete(keys)
    assert tier.contains(keys) == [False] * 4


def test_a_master_of_the_cluster_dies_and_its_replica_takes_over(cluster: ClusterServers) -> None:
    # Servers of its own: what it leaves is no whole cluster.
    with contextlib.ExitStack() as stack:
        own = ClusterServers(stack)
        replica = own.replica_of(own.servers[0])
        keys, sent, back = keys_of(30), buffers_of([PAGE] * 30, 1), buffers_of([PAGE] * 30)
        with closing(open_at(own.url("timeout=500ms"))) as tier:
            assert tier.put(keys, sent) == [Put.STORED] * 30
            wait_until(lambda: replica.call("DBSIZE") == own.servers[0].call("DBSIZE"), 5)
            own.servers[0].kill()
            began = time.monotonic()
            with pytest.raises(TierUnavailable):
                tier.get(keys, back)
            assert time.monotonic() - began < 3
            assert patiently(lambda: tier.get(keys, back), 20) == [Got.HIT] * 30
            assert sent == back
            assert tier.put(keys, sent) == [Put.STORED] * 30


def test_a_cluster_that_is_not_whole_is_a_clear_error(cluster: ClusterServers) -> None:
    with running("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as alone:
        with pytest.raises(ConfigError, match="the cluster is not whole"):
            open_at(f"redis://127.0.0.1:{alone.port}?cluster=yes")
        with pytest.raises(ConfigError, match="the cluster is not whole"):
            open_at(f"redis://127.0.0.1:{alone.port}")
    for attempt in range(3):  # until the key asked for is another server's
        with contextlib.suppress(AssertionError):
            with pytest.raises(ConfigError, match="this is a cluster: add"):
                [open_at(f"redis://127.0.0.1:{cluster.servers[0].port}").close() for _ in range(10)]
            break
        assert attempt < 2


# Sentinel


class SentinelServers:
    """A master, its replica, and one sentinel that decides alone."""

    def __init__(self, stack: contextlib.ExitStack, *options: str) -> None:
        self.master = stack.enter_context(running(*options))
        self.replica = stack.enter_context(running(*options, "--replicaof", f"127.0.0.1 {self.master.port}"))
        wait_until(lambda: b"master_link_status:up" in self.replica.call("INFO", "replication"), 15)
        monitor = f"sentinel monitor kv 127.0.0.1 {self.master.port} 1\n"
        delays = "sentinel down-after-milliseconds kv 500\nsentinel failover-timeout kv 2000\n"
        self.sentinel = stack.enter_context(running("--sentinel", sentinel=monitor + delays))
        wait_until(lambda: b"slaves=1" in self.sentinel.call("INFO", "sentinel"), 20)

    def url(self, *options: str) -> str:
        """With a sentinel before it that is not there."""
        at = f"127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}"
        return f"redis://{at}/0?" + "&".join(["sentinel=kv", *options])

    def named(self) -> int:
        return int(self.sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "kv")[1])


def replication(server: Server) -> bytes:
    """What it says of its role; nothing while it drops its clients to change that."""
    try:
        said: bytes = server.call("INFO", "replication")
    except redis.exceptions.ConnectionError:
        return b""
    return said


def test_sentinel_names_the_master_also_after_it_died() -> None:
    with contextlib.ExitStack() as stack:
        servers = SentinelServers(stack)
        keys, sent, back = keys_of(12), buffers_of([16 * PAGE] * 12, 1), buffers_of([16 * PAGE] * 12)
        with pytest.raises(ConfigError, match="no sentinel knows a master 'vk'"):
            open_at(servers.url().replace("=kv", "=vk"))
        with closing(open_at(servers.url("timeout=1s"))) as tier:
            assert tier.put(keys, sent) == [Put.STORED] * 12
            wait_until(lambda: servers.replica.call("DBSIZE") == 12, 5)

            # On purpose: the old master lives on as a replica, and the tier follows without an error.
            time.sleep(0.5)
            servers.sentinel.call("SENTINEL", "FAILOVER", "kv")
            wait_until(lambda: servers.named() == servers.replica.port, 20)
            assert tier.put(keys, sent) == [Put.STORED] * 12
            wait_until(lambda: b"role:slave" in replication(servers.master), 20)
            wait_until(lambda: b"master_link_status:up" in replication(servers.master), 20)
            assert tier.get(keys, back) == [Got.HIT] * 12
            assert sent == back

            # By kill -9.
            servers.replica.kill()
            began = time.monotonic()
            with pytest.raises(TierUnavailable):
                tier.get(keys, back)
            assert time.monotonic() - began < 3
            assert patiently(lambda: tier.put(keys, sent), 30) == [Put.STORED] * 12
            assert servers.named() == servers.master.port
            assert servers.master.call("DBSIZE") == 12


def test_sentinels_with_a_login() -> None:
    with running("--requirepass", "wache") as master:
        config = f"sentinel monitor kv 127.0.0.1 {master.port} 1\nsentinel auth-pass kv wache\n"
        with running("--sentinel", "--requirepass", "wache", sentinel=config) as sentinel:
            url = f"redis://:wache@127.0.0.1:{sentinel.port}?sentinel=kv"
            with pytest.raises(ConfigError, match="sentinel_auth=yes if they want it too"):
                open_at(url)
            with closing(open_at(url + "&sentinel_auth=yes")) as tier:
                assert tier.put(keys_of(1), buffers_of([PAGE], 1)) == [Put.STORED]
