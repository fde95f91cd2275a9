"""What `kvkeep route` can be told. Checked before anything listens."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import math
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError
from kvkeep.tls import client_context, server_context
from kvroute.subscribe import Source

__all__ = ["POLICIES", "Options", "Place", "Role", "add_arguments", "parse_place", "read_options"]

POLICIES = ("kv", "session", "prefix-hash", "round-robin")
Role = Literal["any", "prefill", "decode"]

_PLACE = "http://HOST:PORT, dns://NAME:PORT or k8s://SERVICE[.NAMESPACE]:PORT"
_KEY_CHARACTERS = 16


class Place(NamedTuple):
    """Where engines are: at one address, at all that a name resolves to, or behind a Kubernetes service."""

    kind: str
    host: str
    port: str
    secure: bool
    role: Role
    events: str | None
    replay: str | None
    ranks: int = 1
    group: str | None = None

    def source(self, host: str, node: str = "") -> Source | None:
        """Where the events of the engine at `host` come from; None: it is not followed."""
        name = f"[{host}]" if ":" in host else host
        if self.events is None:
            return None
        replay = self.replay and self.replay.replace("{host}", name)
        group = self.group and self.group.replace("{host}", host).replace("{node}", node)
        return Source(self.events.replace("{host}", name), replay, ranks=self.ranks, node=group or None)


@dataclass(frozen=True)
class Options:
    """Options of the router. Sizes in bytes, times in seconds."""

    backends: tuple[Place, ...]
    listen: str = "127.0.0.1:8080"
    policy: str = "kv"
    tokenizer: str | None = None
    session_header: str = "x-session-id"
    prefill_from: int = 64
    prefill_wait: float = 60.0
    at_once: bool = False
    events_listen: str | None = None
    events_open: bool = False
    api_keys: str | None = None
    no_keys: bool = False
    backend_key: str | None = None
    tls: tuple[str, ...] = ()
    backend_tls: tuple[str, ...] = ()
    max_body: int = 32 << 20
    max_bodies: int = 1 << 30
    max_requests: int = 4096
    queue: int = 1024
    queue_wait: float = 30.0
    timeout: float = 600.0
    retries: int = 2
    check_interval: float = 2.0
    drain: float = 30.0
    log_interval: float = 10.0
    traces: str | None = None
    kubernetes_api: str | None = None
    index: str | None = None
    index_from: str | None = None
    index_key: str | None = None

    def __post_init__(self) -> None:
        if not self.backends:
            raise ConfigError(f"no engine to route to: give --backend {_PLACE}")
        roles = {place.role for place in self.backends}
        if roles not in ({"any"}, {"prefill", "decode"}):
            raise ConfigError("give either --backend, or both --prefill and --decode")
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        for name in ("max_requests", "max_body"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more")
        for name in ("queue", "retries", "prefill_from", "queue_wait", "drain", "log_interval"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more")
        if self.max_bodies < self.max_body:
            raise ConfigError("--max-bodies must be as much as --max-body or more")
        for name in ("timeout", "check_interval", "prefill_wait"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0 seconds")
        if len(self.tls) not in (0, 2, 3):
            raise ConfigError("--tls takes two or three files: CERT KEY [CLIENT_CA]")
        if len(self.backend_tls) not in (0, 1, 3):
            raise ConfigError("--backend-tls takes one or three files: CA [CERT KEY]")
        self._check_address()
        self._check_events()
        if self.index_from and not (self.index_key and re.match("https?://", self.index_from)):
            raise ConfigError("--index-from http://ROUTER/kvkeep/index needs that router's --index-key FILE")

    def _check_address(self) -> None:
        host, _ = self.address
        if not (self.loopback or self.api_keys is not None or self.certificates or self.no_keys):
            raise ConfigError(
                f"--listen {self.listen} is open to other hosts, so it needs keys: write them to a file, one "
                "a line (openssl rand -hex 32), and give it as --api-keys FILE; or give a CA of clients, as "
                "--tls CERT KEY CLIENT_CA; or say --no-keys where "
                f"something in front of it asks for them; or listen on 127.0.0.1, not {host}"
            )

    def _check_events(self) -> None:
        """Who sends events is asked for no key."""
        scheme, _, rest = (self.events_listen or "").partition("://")
        host = rest.rpartition(":")[0].strip("[]")
        local = not rest or scheme in ("ipc", "inproc") or host in ("lo", "localhost")
        with contextlib.suppress(ValueError):  # all addresses (*), or the name of an interface
            local = local or ipaddress.ip_address(host).is_loopback
        if not (local or self.events_open):
            raise ConfigError(
                f"--events-listen {self.events_listen} is open to other hosts and asks for no key: who "
                "reaches it can say what engines hold, and so where requests go; say --events-open where "
                "only engines reach it, or listen on tcp://127.0.0.1:PORT"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        host, _, port = self.listen.rpartition(":")
        try:
            return str(ipaddress.ip_address(host.strip("[]"))), int(port)
        except ValueError as error:
            raise ConfigError(f"--listen {self.listen!r} is no address: write 127.0.0.1:8080") from error

    @property
    def loopback(self) -> bool:
        """Whether only this host can connect."""
        return ipaddress.ip_address(self.address[0]).is_loopback

    @property
    def certificates(self) -> bool:
        """Whether a client's certificate does as well as a key."""
        return len(self.tls) == 3

    def server_tls(self) -> ssl.SSLContext | None:
        """What clients are shown; None: no TLS. Raises ConfigError."""
        return server_context(*self.tls, optional=True) if self.tls else None

    def client_tls(self) -> ssl.SSLContext | bool:
        """What is trusted and shown where engines speak TLS; True: the system's CAs. Raises ConfigError."""
        return client_context(*self.backend_tls) if self.backend_tls else True

    def client_keys(self) -> dict[str, str | None]:
        """The API keys that clients may use, and the cache salt of each; none: no key is asked for."""
        return {} if self.api_keys is None else _read_keys(self.api_keys, "--api-keys")

    def index_file(self) -> Path | None:
        """Where the index is kept. Raises ConfigError where it cannot be."""
        path = None if self.index is None else Path(self.index)
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"--index {path} must be a file's name, in a folder that is there")
        return path

    def key_of(self, name: Literal["backend_key", "index_key"]) -> str | None:
        """The key in a file: what engines want, or who may read the index. Raises ConfigError."""
        path, option = getattr(self, name), f"--{name.replace('_', '-')}"
        return None if path is None else next(iter(_read_keys(path, option)))


_ARGUMENTS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("events", "ADDRESS", str, "KV events of each engine, e.g. tcp://{host}:5557"),
    ("replay", "ADDRESS", str, "where lost events are asked for, e.g. tcp://{host}:5558"),
    ("events-listen", "ADDRESS", str, "engines connect here with topic kv@HOST[:PORT]@MODEL"),
    ("listen", "HOST:PORT", str, "(default: {listen})"),
    ("policy", "NAME", str, "one of kv, session, prefix-hash, round-robin (default: {policy})"),
    ("tokenizer", "DIR", str, "count prompts with this tokenizer (default: the engines' /tokenize)"),
    ("session-header", "NAME", str, "what names a session (default: {session_header})"),
    ("prefill-from", "TOKENS", int, "fewer are computed by the decode engine (default: {prefill_from})"),
    ("prefill-wait", "SECONDS", float, "then the decode engine does it (default: {prefill_wait:g})"),
    ("api-keys", "FILE", str, "keys that clients may use: lines of KEY [CACHE_SALT]"),
    ("backend-key", "FILE", str, "the key that the engines want"),
    ("max-body", "SIZE", parse_bytes, "of a request (default: 32MiB)"),
    ("max-bodies", "SIZE", parse_bytes, "of all at a time (default: 1GiB)"),
    ("max-requests", "NUMBER", int, "at a time (default: {max_requests})"),
    ("queue", "NUMBER", int, "requests that wait for a turn (default: {queue})"),
    ("queue-wait", "SECONDS", float, "that they wait at most (default: {queue_wait:g})"),
    ("timeout", "SECONDS", float, "without a byte from an engine (default: {timeout:g})"),
    ("retries", "NUMBER", int, "other engines tried before the first byte (default: {retries})"),
    ("check-interval", "SECONDS", float, "between health checks (default: {check_interval:g})"),
    ("drain", "SECONDS", float, "that running requests get after SIGTERM (default: {drain:g})"),
    ("log-interval", "SECONDS", float, "between summary lines; 0: none (default: {log_interval:g})"),
    ("traces", "URL", str, "send OpenTelemetry spans to this OTLP/HTTP endpoint"),
    ("index", "FILE", str, "what engines hold is kept there for the next start"),
    ("index-from", "URL", str, "or is had from another router, at its /kvkeep/index"),
    ("index-key", "FILE", str, "the key for /kvkeep/index, of this router and that one"),
    ("kubernetes-api", "URL", str, "of the cluster (default: as a pod finds it)"),
)
_FLAGS = {
    "at-once": "ask both engines at once, where both have kvkeep",
    "events-open": "--events-listen for other hosts too, which is asked for no key",
    "no-keys": "listen to other hosts without keys",
}
_FILES = {
    "tls": "certificate, key, and the CA of clients whose certificates do as well as a key (default: no TLS)",
    "backend-tls": "for https engines: the CA to trust, and the router's certificate and key (default: the "
    "system's CAs)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep route`."""
    add, default = parser.add_argument, {field.name: field.default for field in fields(Options)}
    for name, which in {"backend": "engines", "prefill": "that prefill", "decode": "that decode"}.items():
        text = f"{which}: {_PLACE}; repeatable; ,events=,replay=,ranks=,node= behind it: its own"
        add(f"--{name}", action="append", default=[], metavar="PLACE", help=text)
    for name, metavar, kind, text in _ARGUMENTS:
        add(
            f"--{name}", metavar=metavar, type=kind, help=text.replace("{host}", "{{host}}").format(**default)
        )
    for name, text in _FLAGS.items():
        add(f"--{name}", action="store_true", help=text)
    for name, text in _FILES.items():
        add(f"--{name}", nargs="+", metavar="FILE", help=text)


def read_options(args: argparse.Namespace) -> Options:
    """Options from parsed arguments. Raises ConfigError."""
    roles: tuple[tuple[str, Role], ...] = (("backend", "any"), ("prefill", "prefill"), ("decode", "decode"))
    texts = [(text, role) for name, role in roles for text in getattr(args, name)]
    places = [parse_place(text, role, args.events, args.replay) for text, role in texts]
    names = [field.name for field in fields(Options) if field.name != "backends"]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Options(tuple(places), **given)


def parse_place(text: str, role: Role = "any", events: str | None = None, replay: str | None = None) -> Place:
    """A place of engines as it is written. Behind a comma it may say where its own events are, as
    `,events=ADDRESS,replay=ADDRESS`, of how many ranks each engine is, as `,ranks=N`, and which ones share a
    keeper, as `,node=NAME`. Raises ConfigError."""
    text, *more = text.split(",")
    own = dict(part.partition("=")[::2] for part in more)
    events, replay = own.get("events", events), own.get("replay", replay)
    ranks = own.get("ranks", "1")
    if own.keys() - {"events", "replay", "ranks", "node"} or not re.fullmatch("[1-9][0-9]{0,2}", ranks):
        known = ",events=ADDRESS ,replay=ADDRESS ,ranks=NUMBER and ,node=NAME"
        raise ConfigError(f"{','.join(more)!r} behind {text}: write {known}")
    if "node" in own and events is None:
        raise ConfigError(f",node={own['node']} behind {text} needs the engines' events")
    try:
        parts = urlsplit(text)
        named = parts.netloc.partition(":")[2]  # a service's port may have a name
        port = named if parts.scheme == "k8s" else str(parts.port or "")
    except ValueError as error:
        raise ConfigError(f"{text!r} is no place of engines ({error}): write {_PLACE}") from error
    port = port or {"http": "80", "https": "443"}.get(parts.scheme, "")
    kinds = {"http": "url", "https": "url", "dns": "dns", "k8s": "k8s"}
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in kinds or not parts.hostname or not re.fullmatch(r"[\w-]+", port) or not plain:
        raise ConfigError(f"{text!r} is no place of engines: write {_PLACE}")
    kind, secure, more_of_it = kinds[parts.scheme], parts.scheme == "https", (int(ranks), own.get("node"))
    return Place(kind, parts.hostname, port, secure, role, events, replay, *more_of_it)


def _read_keys(path: str, option: str) -> dict[str, str | None]:
    """Keys, and what stands behind each."""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {option} {path}: {error}") from error
    if not lines or any(len(line[0]) < _KEY_CHARACTERS or len(line) > 2 for line in lines):
        raise ConfigError(
            f"{option} {path} must hold keys of {_KEY_CHARACTERS} characters or more, one a line"
        )
    return {key: next(iter(more), None) for key, *more in lines}
