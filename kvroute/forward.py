"""Passes a request to an engine and its answer back, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from kvroute.backends import Backend, Pool, Visit
from kvroute.figures import Figures
from kvroute.policy import Choice
from kvroute.request import BadRequest

__all__ = ["Forwarder", "upstream_headers"]

_CONNECT_WAIT = 5.0
_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"}
    | {"trailer", "transfer-encoding", "upgrade"}
)
_OURS = _HOP | {"host", "content-length", "expect"}
_BUSY = (502, 503)  # an engine that is starting, draining or overloaded: another may do it
_REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")


class _Failed(Exception):
    """Nothing came from an engine. `gone`: nobody is there; `status`: what it said, or 0."""

    def __init__(self, why: str, *, gone: bool = False, status: int = 0) -> None:
        super().__init__(why)
        self.gone, self.status = gone, status


class Forwarder:
    """Sends to the first choice; to the next ones while there has been no byte of an answer."""

    def __init__(
        self, session: aiohttp.ClientSession, pool: Pool, figures: Figures, *, retries: int, timeout: float
    ) -> None:
        self._session, self._pool, self._figures = session, pool, figures
        self._retries = retries
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_WAIT, sock_read=timeout)

    async def answer(
        self,
        request: web.Request,
        data: bytes,
        headers: CIMultiDict[str],
        choices: Sequence[Choice],
        chosen: Callable[[Choice], None],
        first_byte: Callable[[], None],
    ) -> web.StreamResponse:
        """The engine's answer, as far as it has been passed on. `chosen` is told each choice that is tried.

        Raises BadRequest where no engine answers.
        """
        failed = _Failed("no engine is up")
        for number, choice in enumerate(self._attempts(choices)):
            self._figures.retries += number > 0
            chosen(choice)
            with self._pool.visit(choice.backend, choice.missing) as visit:
                try:
                    upstream, chunk = await self._begin(choice.backend, request.path, data, headers)
                except _Failed as error:
                    failed = error
                    self._note(choice.backend, error)
                    if error.status == 504:  # it had its time, and so had the client
                        break
                    continue
                first_byte()
                return await self._relay(request, upstream, chunk, choice.backend, visit)
        status = failed.status or 502
        raise BadRequest(f"no engine answered: {failed}", status, "engine_unavailable")

    async def prefill(
        self, request: web.Request, data: bytes, headers: CIMultiDict[str], choices: Sequence[Choice]
    ) -> bytes | web.Response:
        """Have the prompt computed; returns the body for the engine that decodes, or the client's answer
        where the request was refused. Where no engine does it, the body is as it was."""
        asked = msgspec.json.encode(_to_prefill(msgspec.json.decode(data, type=dict[str, msgspec.Raw])))
        for choice in self._attempts(choices):
            backend = choice.backend
            with self._pool.visit(backend, choice.missing):
                try:
                    upstream, chunk = await self._begin(backend, request.path, asked, headers)
                    answer = chunk + await _rest(upstream)
                except _Failed as error:
                    self._note(backend, error)
                    continue
            backend.count(f"{upstream.status // 100}xx")
            if 400 <= upstream.status < 500:
                return web.Response(status=upstream.status, body=answer, content_type="application/json")
            if upstream.status == 200:
                return _to_decode(data, answer, urlsplit(backend.engine.url).hostname or "")
        self._figures.prefill_failed += 1
        return data

    def _attempts(self, choices: Sequence[Choice]) -> list[Choice]:
        """A lone engine is asked twice: what failed may have been an idle connection that it closed."""
        return [*choices, choices[0]][: 1 + self._retries] if choices else []

    def _note(self, backend: Backend, error: _Failed) -> None:
        backend.count("busy" if error.status else "gone" if error.gone else "failed")
        if not error.status:
            self._pool.failed(backend, gone=error.gone)

    async def _begin(
        self, backend: Backend, path: str, data: bytes, headers: CIMultiDict[str]
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """The engine's answer and its first bytes. Raises _Failed where there are none."""
        url = backend.engine.url + path
        upstream: aiohttp.ClientResponse | None = None
        try:
            upstream = await self._session.post(
                url, data=data, headers=headers, timeout=self._timeout, allow_redirects=False
            )
            if upstream.status not in _BUSY:
                return upstream, await upstream.content.readany()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Failed(f"{backend.name} cannot be reached", gone=True) from error
        except asyncio.TimeoutError as error:
            if upstream is not None:
                upstream.close()
            raise _Failed(f"{backend.name} takes too long", status=504) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"{backend.name} broke the connection ({type(error).__name__})") from error
        except asyncio.CancelledError:  # the client went away: the engine need not go on
            if upstream is not None:
                upstream.close()
            raise
        upstream.close()
        raise _Failed(f"{backend.name} says {upstream.status}", status=upstream.status)

    async def _relay(
        self,
        request: web.Request,
        upstream: aiohttp.ClientResponse,
        chunk: bytes,
        backend: Backend,
        visit: Visit,
    ) -> web.StreamResponse:
        visit.answered()
        headers = _end_to_end(upstream.headers, _HOP)
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
        try:
            await response.prepare(request)
            while chunk:
                await response.write(chunk)
                chunk = await _next(upstream)
            await response.write_eof()
        except _Failed:
            await self._cut_off(request, response, backend)
            return response
        except (ConnectionError, asyncio.CancelledError):
            self._figures.left += 1
            backend.count("left")
            raise
        finally:
            upstream.close() if not upstream.content.at_eof() else upstream.release()
        backend.count(f"{upstream.status // 100}xx")
        return response

    async def _cut_off(self, request: web.Request, response: web.StreamResponse, backend: Backend) -> None:
        """The engine broke off: the client must see that what it has is not all."""
        self._figures.cut += 1
        backend.count("cut")
        self._pool.failed(backend, gone=False)
        if response.content_type == "text/event-stream":
            error = {"message": f"{backend.name} broke off", "type": "engine_unavailable", "code": 502}
            await response.write(b"\n\ndata: " + msgspec.json.encode({"error": error}) + b"\n\n")
        if request.transport is not None:
            request.transport.close()  # without the end that HTTP wants


async def _next(upstream: aiohttp.ClientResponse) -> bytes:
    try:
        return await upstream.content.readany()
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise _Failed("broke off") from error


async def _rest(upstream: aiohttp.ClientResponse) -> bytes:
    chunks = []
    while chunk := await _next(upstream):
        chunks.append(chunk)
    return b"".join(chunks)


def upstream_headers(request: web.Request, key: str | None, *, ours: bool) -> CIMultiDict[str]:
    """The client's headers for an engine. `key`: the engine's, if it wants one; `ours`: the client's key is
    for us, and nobody else's business."""
    headers = _end_to_end(request.headers, _OURS)
    if ours:
        headers.popall("Authorization", None)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _end_to_end(headers: CIMultiDictProxy[str], without: frozenset[str]) -> CIMultiDict[str]:
    if named := headers.get("Connection"):
        without |= {name.strip().lower() for name in named.split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in without)


def _to_prefill(fields: dict[str, Any]) -> dict[str, Any]:
    """The request as the engine that only prefills gets it."""
    for name in ("stream_options", "min_tokens", "n", "best_of"):
        fields.pop(name, None)
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in fields] or ["max_tokens"]
    fields |= dict.fromkeys(limits, 1)
    wanted = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(_REMOTE)}
    return {**fields, "stream": False, "kv_transfer_params": wanted}


class _Prefilled(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None


def _to_decode(data: bytes, answer: bytes, host: str) -> bytes:
    """The request as the engine that decodes gets it: it fetches what the other one computed."""
    try:
        params = msgspec.json.decode(answer, type=_Prefilled).kv_transfer_params
    except msgspec.DecodeError:
        params = None
    if params is None:  # nothing to fetch by name: the engines share a store
        return data
    if params.get("remote_host") is None:
        params["remote_host"] = host
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({**fields, "kv_transfer_params": params})
