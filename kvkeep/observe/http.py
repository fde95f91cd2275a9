"""The keeper's HTTP side: metrics, health, a web page and its actions. Handlers run on the keeper's own
event loop, so they look at its state without locks, and each is as short as a lookup of a long prompt.

Who may do what: on a loopback address anyone on the machine reads, actions need the token. On any other
address all but health and the page's own files need it. A client's certificate does as well as the token,
where there is a CA for clients. On loopback a request that names another host is refused (a web site whose
name was pointed here). No other site can make a browser send the header with the token; nor, where the
browser shows a certificate unasked, an action with a body that says it is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import threading
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec
from aiohttp import web

from kvkeep.config import KeeperConfig
from kvkeep.errors import ConfigError, RequestRefused, TierUnavailable
from kvkeep.identity import KEY_BYTES
from kvkeep.keeper.index import Records
from kvkeep.keeper.namespaces import Namespace
from kvkeep.keeper.operator_moves import move_down, move_up, tier_named
from kvkeep.keeper.pins import chain_records, held_chunks, pin, space_records, unpin
from kvkeep.keeper.tenants import parse_tenant
from kvkeep.observe.listen import Door
from kvkeep.observe.metrics import CONTENT_TYPE, Exporter, Served, arena_bytes
from kvkeep.observe.traces import Traces
from kvkeep.observe.watch import SAMPLE_EVERY, Watch, tier_names
from kvkeep.tiers.base import Usage
from kvkeep.tiers.open import Opened
from kvkeep.tiers.url import TierURL
from kvkeep.tls import read_token, server_context

__all__ = ["Web"]

log = logging.getLogger("kvkeep.http")

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_MOST_BODY, _BODY_WAIT = 1 << 20, 5.0  # keys of 32,000 chunks
_TOKEN_CHARACTERS = 16
_USAGE_EVERY = 10.0
_MEMORY, _MOST_WAIT = "memory", 600.0
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEALTH, _READS = ("/healthz", "/readyz"), ("GET", "HEAD")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Action(msgspec.Struct, forbid_unknown_fields=True):
    """Body of an action: what it is about. With nothing, all. `keys`: those of a prompt's chunks, in hex;
    `tenant`: its name in hex; `to`, `drop`, `wait`: where a prompt is moved, and seconds to wait for that."""

    namespace: int | None = None
    prefix: str | None = None
    keys: str | None = None
    tenant: str | None = None
    to: str = _MEMORY
    drop: bool = False
    wait: Annotated[float, msgspec.Meta(ge=0, le=_MOST_WAIT)] = 5.0


class Web:
    """One HTTP server beside one keeper, on the same event loop."""

    def __init__(self, served: Served, config: KeeperConfig, traces: Traces | None = None) -> None:
        """Raises ConfigError on an address, a token or a certificate that will not do."""
        url = TierURL(f"http://{config.http}")
        self._host, self._port = _address(url)
        self._loopback = ipaddress.ip_address(self._host).is_loopback
        token, cert, key, ca = (url.take(name, str, None) for name in ("token_file", "cert", "key", "ca"))
        url.finish()
        # A certificate is asked for and not demanded: probes of health have none.
        self._tls = server_context(cert, key, ca, optional=True) if cert or key or ca else None
        self._certificates = ca is not None
        if not (self._loopback or self._certificates or token is not None):
            raise ConfigError(
                f"--http {url.netloc} is open to other hosts, so it needs a token (openssl rand -hex 32 > "
                "FILE, and ?token_file=FILE), or the CA of those who may read (ca=, with cert= and key=); or "
                "listen on 127.0.0.1"
            )
        self._token = None if token is None else _read_token(token)
        self._token_file = Path(token or f"{config.socket}.token")
        self._served = served
        self._tiers = [] if served.movers is None else served.movers.tiers
        self._names = tier_names(served.movers)
        self._usage: dict[int, Usage] = {}
        self._watch = served.watch = Watch(served.keeper, self._names, traces)
        self._exporter = Exporter(served, self._watch, self._names, self._usage)
        self._closing = threading.Event()
        self._runner = web.AppRunner(
            self._app(), access_log=None, keepalive_timeout=15.0, max_line_size=2048, max_field_size=4096
        )
        self._door: Door | None = None
        self._listening: asyncio.Server | None = None
        self._sampling: asyncio.Task[None] | None = None
        self._made_token = False

    # Life

    async def start(self) -> None:
        """Listen; not ready yet. Raises ConfigError where the address cannot be had."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._door = Door(server, self._tls)
        try:
            self._listening = await self._door.open(self._host, self._port)
        except OSError as error:
            await self.close()
            raise ConfigError(
                f"cannot listen on --http {self._host}:{self._port}: {error.strerror}"
            ) from error
        self._sampling = asyncio.create_task(self._sample())
        for number, opened in enumerate(self._tiers):
            threading.Thread(
                target=self._ask_usage, args=(number, opened), name="kvkeep-usage", daemon=True
            ).start()

    def announce(self) -> None:
        """The keeper serves its socket: make the token for actions beside it, and say where all is."""
        assert self._listening is not None
        host, port = self._listening.sockets[0].getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        url = f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"
        if self._token is None:
            self._token, self._made_token = secrets.token_urlsafe(32), True
            self._token_file.unlink(missing_ok=True)  # of a keeper that was killed
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self._token_file, flags, 0o600), "w") as file:
                file.write(self._token + "\n")
        about = {"url": url, "token_file": self._token_file}
        log.info("web page and metrics at %(url)s, the token for actions is in %(token_file)s", about)
        if not self._loopback and self._tls is None:
            log.warning(
                "the token goes to %s in the clear: give cert= and key=, or put a TLS proxy in front", url
            )

    async def close(self) -> None:
        """End, and take back what was made."""
        self._closing.set()
        if self._sampling is not None:
            self._sampling.cancel()
        if self._listening is not None:
            self._listening.close()
        if self._door is not None:
            self._door.close()
        await self._runner.cleanup()
        if self._made_token:
            self._token_file.unlink(missing_ok=True)

    async def _sample(self) -> None:
        while True:
            self._watch.sample()
            await asyncio.sleep(SAMPLE_EVERY)

    def _ask_usage(self, number: int, opened: Opened) -> None:
        """How full a tier is, in a thread of its own: a medium may hang."""
        while not self._closing.is_set():
            if opened.guard.available:
                with contextlib.suppress(TierUnavailable):
                    self._usage[number] = opened.tier.usage()
            self._closing.wait(_USAGE_EVERY)

    # Requests

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=_MOST_BODY, middlewares=[self._guard])
        folder = files("kvkeep.observe")
        for path, (name, kind) in _PAGE.items():
            app.router.add_get(path, _fixed((folder / name).read_bytes(), kind))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/api/state", self._state)
        for name in ("clear", "pin", "unpin", "lookup", "move", "drain"):
            app.router.add_post(f"/api/{name}", self._act)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse who may not; and put the headers on every answer."""
        try:
            if self._loopback and not self._is_us(request.host):
                response: web.StreamResponse = web.Response(status=403, text="not the name of this host\n")
            elif not (self._is_open(request) or self._has_token(request) or self._has_certificate(request)):
                response = web.Response(
                    status=401,
                    text="send the header Authorization: Bearer TOKEN\n",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            else:
                response = await handler(request)
        except web.HTTPException as refusal:  # no such path, no such method, too long
            response = web.Response(status=refusal.status, text=f"{refusal.reason}\n")
        response.headers.update(_HEADERS)
        return response

    def _is_us(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        return name in ("localhost", "127.0.0.1", "::1", self._host)

    def _is_open(self, request: web.Request) -> bool:
        """Whether anyone may."""
        return request.path in (*_PAGE, *_HEALTH) or (self._loopback and request.method in _READS)

    def _has_token(self, request: web.Request) -> bool:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        given, right = token.strip().encode(), (self._token or "").encode()
        return kind.lower() == "bearer" and bool(right) and hmac.compare_digest(given, right)

    def _has_certificate(self, request: web.Request) -> bool:
        """Whether the client has shown one: of the CA of clients, else there would be no connection."""
        if not self._certificates or not request.get_extra_info("peercert"):
            return False
        return request.method in _READS or request.content_type == "application/json"

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        """Ready: the arena is mapped, the tiers were opened, and the socket is served. A tier that is away
        does not make a keeper unready: it serves on without."""
        checks = {
            "ready": self._served.ready,
            "tiers": {
                name: "on" if opened.guard.available else "off"
                for name, opened in zip(self._names, self._tiers, strict=True)
            },
        }
        return _json(checks, 200 if self._served.ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._exporter.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _state(self, request: web.Request) -> web.Response:
        figures = self._served.figures()
        tiers: Any = figures.pop("tiers")
        for number, (name, tier) in enumerate(zip(self._names, tiers, strict=True)):
            usage = self._usage.get(number, Usage())
            tier |= {"name": name, "used_bytes": usage.used_bytes, "capacity_bytes": usage.capacity_bytes}
        watch = self._watch
        state = {
            "ready": self._served.ready,
            "keeper": figures,
            "arena": arena_bytes(self._served.keeper),
            "tiers": tiers,
            "history": list(watch.history),
            "prefixes": watch.prefixes(),
            "requests": watch.requests(),
        }
        return _json(state)

    # Actions

    async def _act(self, request: web.Request) -> web.Response:
        try:
            body = await asyncio.wait_for(request.read(), _BODY_WAIT)
            action = msgspec.json.decode(body or b"{}", type=Action)
            name = request.path.rpartition("/")[2]
            done = await self._move(action) if name == "move" else self._do(name, action)
        except asyncio.TimeoutError:
            return _json({"error": "the request's body did not come"}, 408)
        except (msgspec.MsgspecError, ValueError, ConfigError) as error:
            return _json({"error": f"not an action: {error}"}, 400)
        except RequestRefused as error:
            return _json({"error": str(error)}, 409)
        about = {"action": request.path, "body": body[:200].decode(errors="replace"), "done": done}
        log.info("%(action)s %(body)s, by HTTP: %(done)s", about)
        return _json(done)

    async def _move(self, action: Action) -> dict[str, int]:
        keeper, movers, (space, keys) = self._served.keeper, self._served.movers, self._chain(action)
        if movers is None:
            raise RequestRefused("this keeper has no tiers: start it with --tier URL")
        if action.to == _MEMORY:
            return await move_up(keeper, movers, space, keys, _tenant(action), action.wait)
        tier = tier_named(self._names, action.to)
        return await move_down(keeper, movers, space, keys, tier, action.drop, action.wait)

    def _do(self, name: str, action: Action) -> dict[str, object]:
        keeper = self._served.keeper
        if name == "drain":
            self._served.stop()
            return {"draining": True}
        if name == "clear":
            if action.prefix is not None or action.keys is not None:
                raise RequestRefused("only a namespace or everything can be cleared")
            return {"forgotten_chunks": keeper.clear(self._space(action), _tenant(action))}
        if name == "lookup":
            space, keys = self._chain(action)
            found = held_chunks(keeper, space, keys)
            return {"asked_chunks": len(keys) // KEY_BYTES, "held_chunks": found}
        records = self._records(action)
        if name == "pin":
            return {"pinned_chunks": pin(keeper, records)}
        return {"unpinned_chunks": unpin(keeper, records)}

    def _records(self, action: Action) -> Records:
        if action.keys is not None:
            return chain_records(self._served.keeper, *self._chain(action))
        if action.prefix is None:
            return space_records(self._served.keeper, self._space(action))
        prefix = self._watch.prefix(action.prefix)
        if prefix is None:
            raise RequestRefused(f"no prefix {action.prefix} is remembered: it was not used lately")
        return chain_records(self._served.keeper, prefix.space, prefix.keys)

    def _chain(self, action: Action) -> tuple[Namespace, bytes]:
        """The namespace and the keys of a prompt."""
        space, keys = self._space(action), b""
        with contextlib.suppress(ValueError):  # no hex is no keys
            keys = bytes.fromhex(action.keys or "")
        if space is None or action.prefix is not None or not keys or len(keys) % KEY_BYTES:
            raise RequestRefused(f"a prompt is a namespace and keys, of {KEY_BYTES} bytes for each chunk")
        return space, keys

    def _space(self, action: Action) -> Namespace | None:
        spaces = self._served.keeper.namespaces
        if action.namespace is None:
            return None
        if not 0 <= action.namespace < len(spaces):
            raise RequestRefused(f"no namespace {action.namespace} is open here")
        return spaces[action.namespace]


def _tenant(action: Action) -> bytes:
    return b"" if action.tenant is None else parse_tenant(action.tenant)


def _fixed(body: bytes, kind: str) -> _Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=kind, charset="utf-8")

    return answer


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _address(url: TierURL) -> tuple[str, int]:
    host = "127.0.0.1" if url.host == "localhost" else url.host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        host = ""
    if not host or url.port is None:  # port 0: a free one
        raise ConfigError(f"--http takes ADDRESS:PORT, such as 127.0.0.1:9400, not {url.netloc!r}")
    return host, url.port


def _read_token(path: str) -> str:
    token = read_token(path)
    if len(token) < _TOKEN_CHARACTERS or not token.isprintable() or " " in token:
        raise ConfigError(f"the token in {path} must be one word of {_TOKEN_CHARACTERS} characters or more")
    return token
