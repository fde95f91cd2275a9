"""Passes a request to an engine and its answer back, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import uuid
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
_OURS = _HOP | {"host", "content-length", "expect", "content-encoding"}  # a body is unpacked as it is read
_BUSY = (502, 503)  # an engine that is starting, draining or overloaded: another may do it
_REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
_COMING = {"do_remote_prefill": True, "do_remote_decode": False}


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
                    upstream, chunk = await self._begin(choice.backend, visit, request.path, data, headers)
                except _Failed as error:
                    failed = error
                    self._note(choice.backend, error)
                    if error.status == 504:  # it had its time, and so had the client
                        break
                    continue
                first_byte()
                return await self._relay(request, upstream, chunk, choice.backend, visit)
        raise _nobody(failed)

    async def answer_at_once(
        self,
        request: web.Request,
        data: bytes,
        headers: CIMultiDict[str],
        prefills: Sequence[Choice],
        choices: Sequence[Choice],
        chosen: Callable[[Choice], None],
        first_byte: Callable[[], None],
    ) -> web.StreamResponse:
        """As `prefill` and then `answer`, but the engine that decodes is asked beside the one that prefills,
        and takes chunks as they are computed. Where that one does not keep all of them, which the other would
        wait for, it is asked anew once the prefill has ended. Raises BadRequest."""
        choice, *others = choices
        prefill = asyncio.create_task(self._prefilled(request, data, headers, prefills))
        chosen(choice)
        try:
            with self._pool.visit(choice.backend, choice.missing) as visit:
                asked = self._begin(choice.backend, visit, request.path, _with(data, _COMING), headers)
                begin = asyncio.create_task(asked)
                try:
                    await asyncio.wait({begin, prefill}, return_when=asyncio.FIRST_COMPLETED)
                    if begin.done() or _kept_all(prefill.result()):
                        upstream, chunk = await begin
                        first_byte()
                        return await self._relay(request, upstream, chunk, choice.backend, visit)
                except _Failed as error:
                    self._note(choice.backend, error)
                    if error.status == 504:
                        raise _nobody(error) from error
                    self._figures.retries += 1
                    choices = [*others, choice]
                finally:
                    await _ended(begin)
            params = await prefill
        finally:
            await _ended(prefill)
        if isinstance(params, web.Response):
            return params
        headers = headers.copy()
        headers["X-Request-Id"] = uuid.uuid4().hex  # an engine may still know it by the other
        return await self.answer(request, _with(data, params), headers, choices, chosen, first_byte)

    async def prefill(
        self, request: web.Request, data: bytes, headers: CIMultiDict[str], choices: Sequence[Choice]
    ) -> bytes | web.Response:
        """Have the prompt computed; returns the body for the engine that decodes, or the client's answer
        where the request was refused. Where no engine does it, the body is as it was."""
        params = await self._prefilled(request, data, headers, choices)
        return params if isinstance(params, web.Response) else _with(data, params)

    async def _prefilled(
        self, request: web.Request, data: bytes, headers: CIMultiDict[str], choices: Sequence[Choice]
    ) -> dict[str, Any] | web.Response:
        """The parameters for the engine that decodes: none where there is nothing to fetch by name, since
        engines share a store or none did it; or the client's answer."""
        asked = msgspec.json.encode(_to_prefill(msgspec.json.decode(data, type=dict[str, msgspec.Raw])))
        for choice in self._attempts(choices):
            backend = choice.backend
            with self._pool.visit(backend, choice.missing) as visit:
                try:
                    upstream, chunk = await self._begin(backend, visit, request.path, asked, headers)
                    answer = chunk + await _rest(upstream)
                except _Failed as error:
                    self._note(backend, error)
                    continue
            backend.count(f"{upstream.status // 100}xx")
            if 400 <= upstream.status < 500:
                return web.Response(status=upstream.status, body=answer, content_type="application/json")
            if upstream.status == 200:
                return _told(answer, urlsplit(backend.engine.url).hostname or "")
        self._figures.prefill_failed += 1
        return {}

    def _attempts(self, choices: Sequence[Choice]) -> list[Choice]:
        """A lone engine is asked twice: what failed may have been an idle connection that it closed."""
        return [*choices, choices[0]][: 1 + self._retries] if choices else []

    def _note(self, backend: Backend, error: _Failed) -> None:
        backend.count("busy" if error.status else "gone" if error.gone else "failed")
        if not error.status:
            self._pool.failed(backend, gone=error.gone)

    async def _begin(
        self, backend: Backend, visit: Visit, path: str, data: bytes, headers: CIMultiDict[str]
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """The engine's answer and its first bytes. Raises _Failed where there are none."""
        url = backend.engine.url + path
        upstream: aiohttp.ClientResponse | None = None
        task = asyncio.current_task()
        assert task is not None
        visit.stop = task.cancel
        try:
            upstream = await self._session.post(
                url, data=data, headers=headers, timeout=self._timeout, allow_redirects=False
            )
            if upstream.status not in _BUSY:
                chunk = await upstream.content.readany()
                visit.stop = upstream.close
                backend.heard = time.monotonic()
                return upstream, chunk
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Failed(f"{backend.name} cannot be reached", gone=True) from error
        except asyncio.TimeoutError as error:
            if upstream is not None:
                upstream.close()
            raise _Failed(f"{backend.name} takes too long", status=504) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"{backend.name} broke the connection ({type(error).__name__})") from error
        except asyncio.CancelledError as error:
            if upstream is not None:
                upstream.close()
            if not visit.abandoned:  # the client went away: the engine need not go on
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            raise _Failed(f"{backend.name} is silent", gone=True) from error
        finally:
            if visit.stop == task.cancel:
                visit.stop = None
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
                backend.heard = time.monotonic()
            await response.write_eof()
        except _Failed:
            await self._cut_off(request, response, backend)
            return response
        except (ConnectionError, asyncio.CancelledError) as error:
            self._figures.left += 1
            backend.count("left")
            if isinstance(error, asyncio.CancelledError):
                raise
            return response
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
            with contextlib.suppress(ConnectionError):
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


def _told(answer: bytes, host: str) -> dict[str, Any]:
    """What the engine that prefilled says to the one that decodes."""
    try:
        params = msgspec.json.decode(answer, type=_Prefilled).kv_transfer_params
    except msgspec.DecodeError:
        params = None
    if params is None:
        return {}
    return params if params.get("remote_host") is not None else {**params, "remote_host": host}


def _kept_all(told: dict[str, Any] | web.Response) -> bool:
    """Whether all whole chunks of the prompt will come, as a prefill with kvkeep says."""
    return isinstance(told, dict) and told.get("remote_all") is True


def _with(data: bytes, params: dict[str, Any]) -> bytes:
    """The request as the engine that decodes gets it: it fetches what another one computes."""
    if not params:
        return data
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({**fields, "kv_transfer_params": params})


def _nobody(failed: _Failed) -> BadRequest:
    return BadRequest(f"no engine answered: {failed}", failed.status or 502, "engine_unavailable")


async def _ended(task: asyncio.Task[Any]) -> None:
    """End it, if it has not; an answer that it got and nobody took is closed."""
    task.cancel()
    for got in await asyncio.gather(task, return_exceptions=True):
        if isinstance(got, tuple):
            got[0].close()
