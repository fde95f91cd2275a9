"""One OpenAI-compatible server, asked by many requests at once from one event loop."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import aiohttp

from kvbench.load.stream import AnswerStream, StreamError
from kvkeep.errors import ConfigError

__all__ = ["Answer", "Endpoint", "Server"]

_LOOK_SECONDS = 10.0
_KEEP_SECONDS = 3.0  # uvicorn closes idle connections after 5: a request must not meet that
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError, StreamError)
_LABELS = {"system": "", "user": "User: ", "assistant": "Assistant:"}


@dataclass(frozen=True)
class Endpoint:
    """Where and how requests go."""

    url: str
    model: str = ""
    chat: bool = False
    key: str | None = None
    timeout: float = 600.0
    ignore_eos: bool = False


class Answer(NamedTuple):
    """What became of one request. Times are the event loop's; `error` is empty where all went well."""

    sent: float
    times: list[float]
    text: str
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    error: str
    unreachable: bool = False
    """No answer because there was no connection to the server, or it was lost."""


class Server:
    """A client of one endpoint; an asynchronous context manager, which closes its connections."""

    def __init__(self, endpoint: Endpoint) -> None:
        if not endpoint.url.startswith(("http://", "https://")):
            raise ConfigError(f"{endpoint.url!r} is not a server's URL: write it as http://127.0.0.1:8000")
        self.endpoint = endpoint
        self._url = endpoint.url.rstrip("/").removesuffix("/v1")
        self._model = endpoint.model
        self._path = "/v1/chat/completions" if endpoint.chat else "/v1/completions"

    @property
    def model(self) -> str:
        """Name of the model that is asked."""
        return self._model

    async def __aenter__(self) -> Server:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # an open loop bounds no connections
        key = self.endpoint.key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def connect(self) -> None:
        """Find the model's name, unless it was given. Raises ConfigError if no such server answers."""
        if self._model:
            return  # some servers have no list of models
        try:
            self._model = str((await self._json("GET", "/v1/models", None))["data"][0]["id"])
        except (*_FAILURES, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"no OpenAI-compatible server answers at {self._url} ({_said(error)}): "
                "start one, or give --url"
            ) from error

    async def alive(self) -> bool:
        """Whether the server still answers, whatever it says."""
        try:
            await self._json("GET", "/v1/models", None)
        except (aiohttp.ClientResponseError, ValueError):
            return True
        except _FAILURES:
            return False
        return True

    async def count(self, text: str) -> int | None:
        """Tokens of a text by the server's own tokenizer; None where it has no POST /tokenize."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            return int((await self._json("POST", "/tokenize", body))["count"])
        except (*_FAILURES, ValueError, LookupError, TypeError):
            return None

    def body(self, messages: list[tuple[str, str]], answer_tokens: int) -> bytes:
        """The request for a conversation of (role, text), as JSON."""
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint.chat:
            body["messages"] = [{"role": role, "content": text} for role, text in messages]
        else:
            body["prompt"] = _plain(messages)
        if self.endpoint.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": answer_tokens}
        return json.dumps(body).encode()

    async def send(self, body: bytes, on_token: Callable[[float], None] | None = None) -> Answer:
        """Send one request and read its answer to the end. Errors are in the answer, not raised."""
        now = asyncio.get_running_loop().time
        stream, error, lost = AnswerStream(), "", False
        sent = now()
        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.post(self._url + self._path, data=body, headers=headers) as response:
                if response.status != 200:
                    raise StreamError(f"{response.status}: {(await response.text())[:300]}")
                if "event-stream" not in response.content_type:
                    raise StreamError(f"the server does not stream: it sent {response.content_type}")
                async for data in response.content.iter_any():
                    first = not stream.times
                    stream.feed(data, now())
                    if on_token and first and stream.times:
                        on_token(stream.times[0] - sent)
            stream.finish()
        except _FAILURES as failure:
            error = _said(failure)
            lost = isinstance(failure, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)
        tokens = (stream.prompt_tokens, stream.cached_tokens, stream.output_tokens)
        return Answer(sent, stream.times, stream.text, *tokens, error, lost)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        limit = aiohttp.ClientTimeout(total=_LOOK_SECONDS)
        async with self._session.request(method, self._url + path, json=body, timeout=limit) as response:
            response.raise_for_status()
            return json.loads(await response.read())


def _plain(messages: list[tuple[str, str]]) -> str:
    """A conversation as one text, so that each round's prompt begins with the round before and its answer."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(_LABELS[role] + text for role, text in messages) + "\n\nAssistant:"


def _said(error: BaseException) -> str:
    return "timeout" if isinstance(error, TimeoutError | asyncio.TimeoutError) else str(error) or repr(error)
