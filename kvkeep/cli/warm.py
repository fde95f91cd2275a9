"""`kvkeep warm FILE…`: have documents prefilled ahead of use, by an engine that keeps what it computes.

Each file is sent as the beginning of a prompt to an OpenAI-compatible server that runs with kvkeep,
for one token of answer. Requests that begin with the same text find its KV afterwards, on every host that
shares the tiers.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvkeep.cli.fleet import fetch
from kvkeep.cli.prompt import read_text
from kvkeep.errors import ConfigError

__all__ = ["add_arguments", "run"]


class Warmed(NamedTuple):
    """What became of one file."""

    file: str
    tokens: int
    seconds: float
    error: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep warm`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text files, UTF-8")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the engine's server (default: %(default)s)"
    )
    parser.add_argument("--model", help="name of the model (default: the first that the server has)")
    parser.add_argument(
        "--chat", action="store_true", help="send each as a user's message, as /v1/chat/completions will be"
    )
    parser.add_argument("--before", default="", help="text that prompts have before the document")
    parser.add_argument("--key", help="API key, if the server wants one")
    parser.add_argument("--parallel", type=int, default=1, help="requests at once (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per file (default: 600)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Send all files; returns 1 if any failed."""
    texts = [(path, read_text(str(path))) for path in args.files]
    if args.parallel < 1:
        raise ConfigError("--parallel must be 1 or more")
    server = _Server(args.url.rstrip("/"), args.key, args.timeout)
    model = args.model or server.first_model()
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(args.parallel) as pool:
        task = progress.add_task("prefilling", total=len(texts))
        jobs = [
            pool.submit(server.prefill, model, path, args.before + text, args.chat) for path, text in texts
        ]
        done = []
        for job in jobs:
            done.append(job.result())
            progress.advance(task)
    _report(done, args.json, console)
    return 1 if any(one.error for one in done) else 0


def _report(done: list[Warmed], as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps({"files": [one._asdict() for one in done]}))
        return
    for one in done:
        what = one.error or f"{one.tokens} tokens in {one.seconds:.2f} s"
        style = "red" if one.error else None
        console.print(f"{one.file}: {what}", soft_wrap=True, markup=False, highlight=False, style=style)


class _Server:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def first_model(self) -> str:
        """Name of the first model. Raises ConfigError if no server answers."""
        try:
            return str(self._call("/v1/models", None)["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"no engine answers at {self._url} ({error}): start one with kvkeep, or give --url"
            ) from error

    def prefill(self, model: str, path: Path, text: str, chat: bool) -> Warmed:
        """Send one document."""
        body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        began = time.perf_counter()
        try:
            answer = self._call("/v1/chat/completions" if chat else "/v1/completions", body)
            tokens, error = int(answer["usage"]["prompt_tokens"]), None
        except urllib.error.HTTPError as refused:
            tokens, error = 0, f"{refused.code}: {refused.read(500).decode(errors='replace')}"
        except (OSError, ValueError, LookupError, TypeError) as failed:
            tokens, error = 0, str(failed) or type(failed).__name__
        return Warmed(str(path), tokens, round(time.perf_counter() - began, 3), error)

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        return fetch(self._url + path, body, self._timeout, self._headers)
