"""What a redis:// URL says about servers, and what to do where they cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.tiers.redis_nodes import Address, Cluster, Nodes, RedisPool, Sentinel, Single
from kvkeep.tiers.url import TierURL
from kvkeep.tls import client_context

__all__ = ["nodes_of", "remedy"]

_PORT, _SENTINEL_PORT = 6379, 26379
_REMEDIES = (  # by what the error says; the first that fits
    (
        "no sentinel knows",
        "check the option sentinel and the sentinels; sentinel_auth=yes if they want it too",
    ),
    ("NOAUTH", "give a password: redis://:PASSWORD@host, redis://USER:PASSWORD@host or password_file"),
    ("WRONGPASS", "user or password is wrong"),
    ("invalid password", "user or password is wrong"),
    ("without any password configured", "the server has no password: leave it out"),
    ("NOPERM", "allow the user +get +set +exists +del on ~PREFIX:*, and +cluster|slots for a cluster"),
    ("MOVED", "this is a cluster: add ?cluster=yes"),
    ("cluster support disabled", "this is no cluster: leave out cluster=yes"),
    ("CLUSTERDOWN", "the cluster is not whole: see CLUSTER INFO"),
    ("holds slot", "the cluster is not whole: see CLUSTER INFO"),
    ("LOADING", "it is reading its file: start again when it is done"),
    ("DB index", "the number behind the / is a database that it does not have"),
    ("CERTIFICATE_VERIFY_FAILED", "name the file of its CA as tls_ca, or the host as its certificate does"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS there: redis:// instead of rediss://, or another port"),
    ("RECORD_LAYER_FAILURE", "it does not speak TLS there: redis:// instead of rediss://, or another port"),
    ("CERTIFICATE_REQUIRED", "it wants a client's certificate: tls_cert and tls_key"),
    ("EOF occurred", "does it want a client's certificate? Then tls_cert and tls_key"),
    (
        "Timeout connecting",
        "is it running, and can it be reached from here? If rediss://, does it speak TLS there?",
    ),
    ("closed the connection", "does it speak TLS? Then rediss://; if not, its log says why"),
)


def nodes_of(url: TierURL) -> Nodes:
    """The servers that `url` names; nothing is asked yet. Raises ConfigError."""
    timeout = url.take_timeout(2.0)
    unix, tls = url.scheme == "redis+unix", url.scheme == "rediss"
    transport = _tls(url) if tls else {}
    account = _account(url)
    options = {**transport, **account, "db": _database(url, unix)}
    if unix:
        return Single(RedisPool(timeout, options, tls), Address(url.path, 0))
    sentinel, cluster = url.take("sentinel", str, ""), url.take_flag("cluster", False)
    pool = RedisPool(timeout, options, tls, doubts=bool(sentinel) or cluster)
    port = _SENTINEL_PORT if sentinel else _PORT
    addresses = [Address(host or "localhost", given or port) for host, given in url.hosts]
    if sentinel:
        login = account if url.take_flag("sentinel_auth", False) else {}
        return Sentinel(pool, addresses, sentinel, RedisPool(timeout, {**transport, **login}, tls))
    if cluster:
        if options["db"]:
            raise ConfigError(f"{url}: a cluster has database 0 only")
        return Cluster(pool, addresses)
    if len(addresses) > 1:
        raise ConfigError(f"{url}: several servers: add ?cluster=yes, or ?sentinel=NAME for sentinels")
    return Single(pool, addresses[0])


def remedy(error: Exception) -> str:
    """What to do about an error at start."""
    for text, what in _REMEDIES:
        if text in str(error):
            return what
    return "is it running, and can it be reached from here?"


def _account(url: TierURL) -> dict[str, Any]:
    name, password = url.take("password_file", str, ""), url.password
    if name:
        if password:
            raise ConfigError(f"{url}: a password and a password_file: leave one out")
        try:
            password = Path(name).read_text().strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{url}: cannot read password_file={name}: {error}") from error
    if url.user and not password:
        raise ConfigError(
            f"{url}: user {url.user!r} without a password: write USER:PASSWORD@, or password_file"
        )
    return {"username": url.user or None, "password": password or None}


def _database(url: TierURL, unix: bool) -> int:
    text = url.take("db", str, "0") if unix else url.path.strip("/") or "0"
    if not (text.isdigit() and len(text) < 6):
        raise ConfigError(f"{url}: {text!r} is not the number of a database")
    return int(text)


def _tls(url: TierURL) -> dict[str, Any]:
    verify = url.take_flag("tls_verify", True)
    ca, cert, key = (url.take(name, str, "") or None for name in ("tls_ca", "tls_cert", "tls_key"))
    try:
        client_context(ca, cert, key)  # what is wrong with these files, redis-py tells when it connects
    except ConfigError as error:
        raise ConfigError(f"{url}: {error}") from error
    return {
        "ssl_ca_certs": ca,
        "ssl_certfile": cert,
        "ssl_keyfile": key,
        "ssl_cert_reqs": "required" if verify else "none",
        "ssl_check_hostname": verify,
    }
