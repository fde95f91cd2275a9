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

    def source(self, host: str) -> Source | None:
        """Where the events of the engine at `host` come from; None: it is not followed."""
        name = f"[{host}]" if ":" in host else host
        if self.events is None:
            return None
        return Source(
            self.events.replace("{host}", name), self.replay and self.replay.replace("{host}", name)
        )


@dataclass(frozen=True)
class Options:
    """Options of the router. Sizes in bytes, times in seconds."""

    backends: tuple[Place, ...]
    listen: str = "127.0.0.1:8080"
    policy: str = "kv"
    tokenizer: str | None = None
    session_header: str = "x-session-id"
    prefill_from: int = 64
    at_once: bool = False
    events_listen: str | None = None
    events_open: bool = False
    api_keys: str | None = None
    no_keys: bool = False
    backend_key: str | None = None
    tls: tuple[str, ...] = ()
    backend_tls: tuple[str, ...] = ()
    max_body: int = 32 << 20
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
        for name in ("timeout", "check_interval"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0 seconds")
        if len(self.tls) not in (0, 2, 3):
            raise ConfigError("--tls takes two or three files: CERT KEY [CLIENT_CA]")
        if len(self.backend_tls) not in (0, 1, 3):
            raise ConfigError("--backend-tls takes one or three files: CA [CERT KEY]")
        self._check_address()
        self._check_events()

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

    def client_keys(self) -> list[str]:
        """The API keys that clients may use; none: no key is asked for."""
        return [] if self.api_keys is None else _read_keys(self.api_keys, "--api-keys")

    def key_for_backends(self) -> str | None:
        """What we tell the engines that want a key."""
        return None if self.backend_key is None else _read_keys(self.backend_key, "--backend-key")[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep route`."""
    add, default = parser.add_argument, {field.name: field.default for field in fields(Options)}
    for name, text in (
        ("backend", "engines"),
        ("prefill", "engines that prefill"),
        ("decode", "that decode"),
    ):
        add(
            f"--{name}",
            action="append",
            default=[],
            metavar="PLACE",
            help=f"{text}: {_PLACE}; repeatable; ,events=,replay= behind it: its own",
        )
    _add_events(add)
    add("--listen", metavar="HOST:PORT", help=f"(default: {default['listen']})")
    add("--policy", help=f"one of {', '.join(POLICIES)} (default: {default['policy']})")
    add(
        "--tokenizer",
        metavar="DIR",
        help="count prompts with this tokenizer (default: the engines' /tokenize)",
    )
    add(
        "--session-header",
        metavar="NAME",
        help=f"what names a session (default: {default['session_header']})",
    )
    add(
        "--prefill-from",
        metavar="TOKENS",
        type=int,
        help="a prompt of which the decode engine lacks fewer goes there at once (default: 64)",
    )
    add("--at-once", action="store_true", help="ask both engines at once, where both have kvkeep")
    _add_access(add)
    add("--max-body", metavar="SIZE", type=parse_bytes, help="of a request (default: 32MiB)")
    add("--max-requests", type=int, help=f"at a time (default: {default['max_requests']})")
    add("--queue", type=int, help=f"requests that wait for a turn (default: {default['queue']})")
    add("--queue-wait", type=float, help="seconds that they wait at most (default: 30)")
    add("--timeout", type=float, help="seconds without a byte from an engine (default: 600)")
    add("--retries", type=int, help="other engines tried before the first byte (default: 2)")
    add("--check-interval", type=float, help="seconds between health checks (default: 2)")
    add("--drain", type=float, help="seconds that running requests get after SIGTERM (default: 30)")
    add("--log-interval", type=float, help="seconds between summary lines; 0: none (default: 10)")
    add("--traces", metavar="URL", help="send OpenTelemetry spans to this OTLP/HTTP endpoint")
    add("--kubernetes-api", metavar="URL", help="of the cluster (default: as a pod finds it)")


def _add_events(add: Callable[..., object]) -> None:
    add("--events", metavar="ADDRESS", help="KV events of each engine, e.g. tcp://{host}:5557")
    add("--replay", metavar="ADDRESS", help="where lost events are asked for, e.g. tcp://{host}:5558")
    add("--events-listen", metavar="ADDRESS", help="engines connect here with topic kv@HOST[:PORT]@MODEL")
    add("--events-open", action="store_true", help="… from other hosts too, which is asked for no key")


def _add_access(add: Callable[..., object]) -> None:
    """Who may connect, and what the engines are shown."""
    add("--api-keys", metavar="FILE", help="keys that clients may use, one a line")
    add("--no-keys", action="store_true", help="listen to other hosts without keys")
    add("--backend-key", metavar="FILE", help="the key that the engines want")
    add(
        "--tls",
        nargs="+",
        metavar="FILE",
        help="certificate, key, and the CA of clients whose certificates do as well as a key "
        "(default: no TLS)",
    )
    add(
        "--backend-tls",
        nargs="+",
        metavar="FILE",
        help="for https engines: the CA to trust, and the router's certificate and key "
        "(default: the system's CAs)",
    )


def read_options(args: argparse.Namespace) -> Options:
    """Options from parsed arguments. Raises ConfigError."""
    roles: tuple[tuple[str, Role], ...] = (("backend", "any"), ("prefill", "prefill"), ("decode", "decode"))
    places = [
        parse_place(text, role, args.events, args.replay)
        for name, role in roles
        for text in getattr(args, name)
    ]
    names = [field.name for field in fields(Options) if field.name != "backends"]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Options(tuple(places), **given)


def parse_place(text: str, role: Role = "any", events: str | None = None, replay: str | None = None) -> Place:
    """A place of engines as it is written. Behind a comma it may say where its own events are, as
    `,events=ADDRESS,replay=ADDRESS`. Raises ConfigError."""
    text, *more = text.split(",")
    own = dict(part.partition("=")[::2] for part in more)
    if own.keys() - {"events", "replay"}:
        raise ConfigError(f"{','.join(more)!r} behind {text}: write ,events=ADDRESS and ,replay=ADDRESS")
    events, replay = own.get("events", events), own.get("replay", replay)
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
    return Place(kinds[parts.scheme], parts.hostname, port, parts.scheme == "https", role, events, replay)


def _read_keys(path: str, option: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {option} {path}: {error}") from error
    if not lines or min(map(len, lines)) < _KEY_CHARACTERS:
        raise ConfigError(
            f"{option} {path} must hold keys of {_KEY_CHARACTERS} characters or more, one a line"
        )
    return lines
