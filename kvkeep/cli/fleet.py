"""What the commands for one keeper or many have in common: where they are, and one call to each of them."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kvkeep.config import default_socket
from kvkeep.errors import ConfigError, KeeperUnavailable, KVKeepError, RequestRefused
from kvkeep.tls import client_context, read_token

__all__ = ["Keeper", "add_keepers", "each", "fetch"]

_AT_ONCE = 16
_MOST = 64 << 20  # bytes of an answer
_STRANGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What comes of taking a stranger's answer for a keeper's."""
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

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `fetch`. Raises KeeperUnavailable or RequestRefused."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            said: dict[str, Any] = fetch(self.url + path, body, self.timeout, headers, self.tls)
            return said
        except urllib.error.HTTPError as refusal:
            text = refusal.read(4096).decode(errors="replace").strip()
            if refusal.code == 401:
                text = "it wants its token: give the file as --token"
            with contextlib.suppress(*_STRANGE):
                text = str(json.loads(text)["error"])
            raise RequestRefused(text or f"status {refusal.code}") from refusal
        except (OSError, ValueError) as error:
            remedy = next((what for text, what in _REMEDIES if text in str(error)), "")
            raise KeeperUnavailable(f"no keeper answers: {error}{remedy}") from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: token and prompt are for the address that the operator named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def fetch(
    url: str,
    body: dict[str, Any] | None,
    timeout: float,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Any:
    """GET, or POST of a body as JSON, by no proxy; what is answered, JSON of a bounded size. Raises OSError
    (HTTPError for a refusal), ValueError, and ConfigError where it is no URL."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a server's URL: write it as http://127.0.0.1:8000")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls), _Stay()
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            text = answer.read(_MOST + 1)
        if len(text) > _MOST:
            raise ValueError(f"an answer of more than {_MOST >> 20} MiB")
        return json.loads(text)
    except (RecursionError, http.client.HTTPException) as error:
        raise ValueError(f"no answer in JSON over HTTP: {error!r}") from error


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


def _choose(args: argparse.Namespace) -> list[Keeper]:
    """The keepers that are meant. Raises ConfigError on a token or a certificate that cannot be read."""
    token = None
    place = args.token or Path(f"{default_socket()}.token")
    if args.token is not None or place.is_file():
        token = read_token(place)
    if args.tls is not None and len(args.tls) > 3:
        raise ConfigError("--tls takes CA [CERT KEY]")
    tls, scheme = (None, "http") if args.tls is None else (client_context(*args.tls), "https")
    urls = [name if "://" in name else f"{scheme}://{name}" for name in args.http or ["127.0.0.1:9400"]]
    return [Keeper(url.rstrip("/"), token, args.timeout, tls) for url in urls]


def each(
    args: argparse.Namespace, ask: Callable[[Keeper], dict[str, Any]], line: Callable[[dict[str, Any]], str]
) -> int:
    """Ask all keepers that are meant, some at once, and print what they say, by `line` or as JSON; returns 1
    where one failed, which does not keep the others from answering. Raises ConfigError as `_choose`."""

    def one(keeper: Keeper) -> tuple[dict[str, Any], str]:
        try:
            said = ask(keeper)
            return {"url": keeper.url, "said": said, "error": None}, line(said)
        except KVKeepError as failure:
            error = str(failure)
        except (*_STRANGE, http.client.HTTPException) as stranger:
            error = f"what answers there is not a keeper of this version ({stranger!r})"
        return {"url": keeper.url, "said": {}, "error": error}, f"failed: {error}"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        outcomes = list(pool.map(one, _choose(args)))
    if args.json:
        print(json.dumps({"keepers": [outcome for outcome, _ in outcomes]}))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for outcome, text in outcomes:
            console.print(f"{outcome['url'].partition('://')[2]}  {text}", markup=False)
    return 1 if any(outcome["error"] is not None for outcome, _ in outcomes) else 0
