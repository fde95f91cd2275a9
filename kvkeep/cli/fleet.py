"""What the commands for one keeper or many have in common: where they are, and one call to each of them."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kvkeep.config import default_socket
from kvkeep.errors import ConfigError, KeeperUnavailable, KVKeepError, RequestRefused
from kvkeep.tls import client_context

__all__ = ["Keeper", "Outcome", "add_keepers", "choose", "each", "report"]

_AT_ONCE = 16
_REMEDIES = (
    ("self-signed certificate", "; give the file of its CA as --tls"),
    ("unable to get local issuer", "; give the file of its CA as --tls"),
    ("WRONG_VERSION_NUMBER", "; it does not speak TLS there: leave out --tls or https"),
    ("RECORD_LAYER_FAILURE", "; it does not speak TLS there: leave out --tls or https"),
    ("UNKNOWN_CA", "; its CA of clients is another one: give --tls CA CERT KEY with a certificate of that"),
)


class Keeper(NamedTuple):
    """A keeper's HTTP side."""

    url: str
    token: str | None
    timeout: float
    tls: ssl.SSLContext | None = None

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST of a body as JSON. Raises KeeperUnavailable or RequestRefused."""
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout, context=self.tls) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as refusal:
            text = refusal.read(4096).decode(errors="replace").strip()
            if refusal.code == 401:
                text = "it wants its token: give the file as --token"
            with contextlib.suppress(ValueError, LookupError, TypeError):
                text = str(json.loads(text)["error"])
            raise RequestRefused(text or f"status {refusal.code}") from refusal
        except (OSError, ValueError, http.client.HTTPException) as error:
            said = next((what for text, what in _REMEDIES if text in str(error)), "")
            raise KeeperUnavailable(f"no keeper answers: {error}{said}") from error


class Outcome(NamedTuple):
    """What one keeper said, or why it did not."""

    url: str
    said: dict[str, Any]
    error: str | None


def add_keepers(parser: argparse.ArgumentParser) -> None:
    """Options that say which keepers are meant."""
    parser.add_argument(
        "--http",
        action="append",
        metavar="ADDRESS",
        help="address of a keeper's --http, or its URL; several keepers: several times "
        "(default: 127.0.0.1:9400)",
    )
    parser.add_argument(
        "--token", type=Path, metavar="FILE", help="token of these keepers (default: of the keeper here)"
    )
    parser.add_argument(
        "--tls",
        nargs="+",
        metavar="FILE",
        help="the keepers speak TLS: the CA to trust, and this client's certificate and key",
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds per keeper (default: 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def choose(args: argparse.Namespace) -> list[Keeper]:
    """The keepers that are meant. Raises ConfigError on a token or a certificate that cannot be read."""
    token = None
    place = args.token or Path(f"{default_socket()}.token")
    if args.token is not None or place.is_file():
        try:
            token = place.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the token in {place}: {error}") from error
    if args.tls is not None and len(args.tls) > 3:
        raise ConfigError("--tls takes CA [CERT KEY]")
    tls, scheme = (None, "http") if args.tls is None else (client_context(*args.tls), "https")
    urls = [name if "://" in name else f"{scheme}://{name}" for name in args.http or ["127.0.0.1:9400"]]
    return [Keeper(url.rstrip("/"), token, args.timeout, tls) for url in urls]


def each(keepers: list[Keeper], ask: Callable[[Keeper], dict[str, Any]]) -> list[Outcome]:
    """Ask all of them, some at once; one that fails does not keep the others from answering."""

    def one(keeper: Keeper) -> Outcome:
        try:
            return Outcome(keeper.url, ask(keeper), None)
        except KVKeepError as error:
            return Outcome(keeper.url, {}, str(error))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, keepers))


def report(outcomes: list[Outcome], as_json: bool, line: Callable[[dict[str, Any]], str]) -> int:
    """Print what they said, a line for each; returns 1 where one failed."""
    if as_json:
        print(json.dumps({"keepers": [outcome._asdict() for outcome in outcomes]}))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for outcome in outcomes:
            text = line(outcome.said) if outcome.error is None else f"failed: {outcome.error}"
            console.print(f"{outcome.url.partition('://')[2]}  {text}", markup=False)
    return 1 if any(outcome.error is not None for outcome in outcomes) else 0
