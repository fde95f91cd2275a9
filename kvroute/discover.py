"""Where the engines are: at fixed addresses, behind a DNS name, or the endpoints of a Kubernetes service."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from kvkeep.config import environment
from kvkeep.errors import ConfigError
from kvroute.backends import Engine
from kvroute.options import Place

__all__ = ["Cluster", "discover", "engine_at", "watch_dns", "watch_service"]

log = logging.getLogger("kvroute.discover")

Report = Callable[[list[Engine]], None]

_RESOLVE_EVERY = 10.0
_RETRY_AFTER = 2.0
_WATCH_SECONDS = 300
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


async def discover(place: Place, report: Report, cluster: Cluster | None) -> None:
    """Report the engines at a place, and again whenever they change, until cancelled."""
    if place.kind == "url":
        report([engine_at(place, place.host, place.port)])
    elif place.kind == "dns":
        await watch_dns(place, report)
    else:
        await watch_service(place, report, cluster or Cluster.of_this_pod())


def engine_at(place: Place, host: str, port: str, node: str = "") -> Engine:
    """The engine at an address. `node`: where it runs, if that is known."""
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    source = place.source(host, node)
    return Engine(name, f"{'https' if place.secure else 'http'}://{name}", place.role, source)


async def watch_dns(place: Place, report: Report, every: float = _RESOLVE_EVERY) -> None:
    """Report all addresses of a name. While it does not resolve, what was reported last stays."""
    loop, last = asyncio.get_running_loop(), None
    while True:
        try:
            found = await loop.getaddrinfo(place.host, int(place.port), type=socket.SOCK_STREAM)
            family = min(one[0] for one in found)  # a name with addresses of both kinds has each engine twice
            hosts = sorted({str(address[0]) for kind, *_, address in found if kind == family})
            if hosts != last:
                report([engine_at(place, host, place.port) for host in hosts])
                last = hosts
        except OSError as error:
            log.warning("%s does not resolve: %s", place.host, error)
        await asyncio.sleep(every)


@dataclass(frozen=True)
class Cluster:
    """A Kubernetes API. `account`: a folder with token, ca.crt and namespace, as pods have it; the token is
    read for each request, since it is replaced while it is used."""

    url: str
    account: Path | None = None

    @classmethod
    def of_this_pod(cls) -> Cluster:
        """The API of the cluster that we run in. Raises ConfigError outside of one."""
        found = environment(["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"])
        if len(found) < 2 or not _ACCOUNT.exists():
            raise ConfigError(
                "not in a pod with a service account: give --kubernetes-api URL (kubectl proxy)"
            )
        host, port = found.values()
        return cls(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}", _ACCOUNT)

    @property
    def namespace(self) -> str:
        """The one of this pod."""
        return "default" if self.account is None else (self.account / "namespace").read_text().strip()

    def headers(self) -> dict[str, str]:
        """Who we are."""
        if self.account is None:
            return {}
        return {"Authorization": f"Bearer {(self.account / 'token').read_text().strip()}"}

    def session(self) -> aiohttp.ClientSession:
        """For requests to it, of any length."""
        trust: ssl.SSLContext | bool = True
        if self.account is not None and self.url.startswith("https"):
            trust = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_WATCH_SECONDS + 30)
        connector = aiohttp.TCPConnector(ssl=trust)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=8 << 20)


class _Meta(msgspec.Struct):
    name: str = ""
    resourceVersion: str = ""


class _Conditions(msgspec.Struct):
    ready: bool | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str] = []
    nodeName: str = ""
    conditions: _Conditions = msgspec.field(default_factory=_Conditions)


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class _Slice(msgspec.Struct):
    metadata: _Meta
    addressType: str = ""
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _Slices(msgspec.Struct):
    metadata: _Meta
    items: list[_Slice]


class _Change(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Expired(Exception):
    """The watch cannot go on from where it was."""


async def watch_service(place: Place, report: Report, cluster: Cluster) -> None:
    """Report the ready endpoints of a service. While the API is away, what was reported last stays."""
    service, _, namespace = place.host.partition(".")
    async with cluster.session() as session:
        while True:
            try:
                space = namespace or cluster.namespace
                path = f"/apis/discovery.k8s.io/v1/namespaces/{space}/endpointslices"
                await _follow(session, cluster, path, service, lambda slices: report(_engines(place, slices)))
            except _Expired:
                log.info("the watch of %s begins anew", place.host)
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError, msgspec.DecodeError) as error:
                log.warning("endpoints of %s are not known: %s %s", place.host, type(error).__name__, error)
            await asyncio.sleep(_RETRY_AFTER)


async def _follow(
    session: aiohttp.ClientSession,
    cluster: Cluster,
    path: str,
    service: str,
    tell: Callable[[list[_Slice]], None],
) -> None:
    """List, then watch until the watch breaks."""
    query = {"labelSelector": f"kubernetes.io/service-name={service}"}
    async with session.get(cluster.url + path, params=query, headers=cluster.headers()) as answer:
        answer.raise_for_status()
        listed = msgspec.json.decode(await answer.read(), type=_Slices)
    slices = {one.metadata.name: one for one in listed.items}
    tell(list(slices.values()))
    version = listed.metadata.resourceVersion
    while True:
        more = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
        more["timeoutSeconds"] = str(_WATCH_SECONDS)
        async with session.get(cluster.url + path, params=query | more, headers=cluster.headers()) as answer:
            if answer.status == 410:
                raise _Expired
            answer.raise_for_status()
            async for line in answer.content:
                version = _take(slices, line) or version
                tell(list(slices.values()))
        await asyncio.sleep(_RETRY_AFTER)


def _take(slices: dict[str, _Slice], line: bytes) -> str:
    """Apply one change; returns the version after it."""
    change = msgspec.json.decode(line, type=_Change)
    if change.type == "ERROR":
        raise _Expired
    one = msgspec.json.decode(change.object, type=_Slice)
    if change.type == "DELETED":
        slices.pop(one.metadata.name, None)
    elif change.type in ("ADDED", "MODIFIED"):
        slices[one.metadata.name] = one
    return one.metadata.resourceVersion


def _engines(place: Place, slices: list[_Slice]) -> list[Engine]:
    found = dict[str, Engine]()
    kind = min((one.addressType for one in slices if one.endpoints), default="")
    for one in slices:
        if one.addressType != kind:  # of a service with addresses of both kinds each pod is there twice
            continue
        ports = [port.port for port in one.ports or () if place.port in (port.name, str(port.port))]
        for endpoint in one.endpoints or ():
            if endpoint.conditions.ready is not False and ports and endpoint.addresses:
                engine = engine_at(place, endpoint.addresses[0], str(ports[0]), endpoint.nodeName)
                found[engine.name] = engine
    return [found[name] for name in sorted(found)]
