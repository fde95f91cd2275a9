"""Passes a request to an engine and its answer back, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from kvroute.backends import Backend, Pool, Visit
from kvroute.figures import Figures
from kvroute.options import Options
from kvroute.policy import Ask, Choice, Expected
from kvroute.request import BadRequest, fields_of
from kvroute.traces import Trace

__all__ = ["Course", "Forwarder", "upstream_headers", "with_params"]

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


@dataclass
class Course:
    """How one request goes. `waited`: seconds since it `arrived` in which others were at work on it."""

    ask: Ask
    trace: Trace
    figures: Figures
    expected: Expected
    arrived: float
    waited: float
    begun: bool = False

    def chosen(self, choice: Choice) -> None:
        """It is on its way there, to be answered."""
        self.trace.chose(choice)
        if self.ask.tokens is not None:
            self.figures.prompt_tokens += len(self.ask.tokens)
            self.figures.held_tokens += choice.held
            self.expected.promise(self.ask, choice.backend.name)
        if not self.begun:
            self.figures.own.add(time.perf_counter() - self.arrived - self.waited)
            self.begun = True

    def first_byte(self) -> None:
        """Its answer begins."""
        self.figures.first_byte.add(time.perf_counter() - self.arrived)
        self.trace.event("first_byte")


class Forwarder:
    """Sends to the first choice; to the next ones while there has been no byte of an answer."""

    def __init__(
        self, session: aiohttp.ClientSession, pool: Pool, figures: Figures, options: Options
    ) -> None:
        self._session, self._pool, self._figures, self._options = session, pool, figures, options
        self._timeout = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_WAIT, sock_read=options.timeout)

    async def answer(
        self,
        request: web.Request,
        data: bytes,
        headers: CIMultiDict[str],
        choices: Sequence[Choice],
        course: Course,
    ) -> web.StreamResponse:
        """The engine's answer, as far as it has been passed on. `course` is told each choice that is tried.

        Raises BadRequest where no engine answers.
        """
        failed = _Failed("no engine is up")
        for number, choice in enumerate(self._attempts(choices)):
            self._figures.retries += number > 0
            course.chosen(choice)
            with self._pool.visit(choice.backend, choice.missing) as visit:
                try:
                    upstream, chunk = await self._begin(choice.backend, visit, request.path, data, headers)
                except _Failed as error:
                    failed = error
                    self._note(choice.backend, error)
                    if error.status == 504:  # it had its time, and so had the client
                        break
                    continue
                course.first_byte()
                return await self._relay(request, upstream, chunk, choice.backend, visit)
        raise _nobody(failed)

    async def answer_at_once(
        self,
        request: web.Request,
        data: bytes,
        headers: CIMultiDict[str],
        prefills: Sequence[Choice],
        choices: Sequence[Choice],
        course: Course,
    ) -> web.StreamResponse:
        """As `prefill` and then `answer`, but the engine that decodes is asked beside the one that prefills,
        and takes chunks as they are computed. Where that one does not keep all of them, which the other would
        wait for, it is asked anew once the prefill has ended. Raises BadRequest."""
        choice, *others = choices
        prefill = asyncio.create_task(self.prefill(request, data, headers, prefills))
        course.chosen(choice)
        try:
            with self._pool.visit(choice.backend, choice.missing) as visit:
                asked = self._begin(choice.backend, visit, request.path, with_params(data, _COMING), headers)
                begin = asyncio.create_task(asked)
                try:
                    await asyncio.wait({begin, prefill}, return_when=asyncio.FIRST_COMPLETED)
                    if begin.done() or _kept_all(prefill.result()):
                        upstream, chunk = await begin
                        course.first_byte()
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
        return await self.answer(request, with_params(data, params), headers, choices, course)

    async def prefill(
        self, request: web.Request, data: bytes, headers: CIMultiDict[str], choices: Sequence[Choice]
    ) -> dict[str, Any] | web.Response:
        """Have the prompt computed. Returns the parameters for the engine that decodes (none where there is
        nothing to fetch by name: engines share a store, or none did it), or the answer of a refusal."""
        asked = msgspec.json.encode(_to_prefill(fields_of(data)))
        clock = asyncio.get_running_loop().time
        until = clock() + self._options.prefill_wait  # for all that are tried
        for choice in self._attempts(choices):
            backend = choice.backend
            with self._pool.visit(backend, choice.missing) as visit:
                whole = self._whole(backend, visit, request.path, asked, headers)
                try:
                    status, answer = await asyncio.wait_for(whole, until - clock())
                except (_Failed, asyncio.TimeoutError) as error:
                    failed = error if isinstance(error, _Failed) else _late(backend)
                    self._note(backend, failed)
                    if failed.status == 504:
                        break
                    continue
            backend.count(f"{status // 100}xx")
            if 400 <= status < 500:
                return web.Response(status=status, body=answer, content_type="application/json")
            if status == 200:
                return _told(answer, urlsplit(backend.engine.url).hostname or "")
        self._figures.prefill_failed += 1
        return {}

    async def _whole(
        self, backend: Backend, visit: Visit, path: str, data: bytes, headers: CIMultiDict[str]
    ) -> tuple[int, bytes]:
        """Status and body of an answer. Raises _Failed."""
        upstream, chunk = await self._begin(backend, visit, path, data, headers)
        chunks = []
        try:
            while chunk:
                chunks.append(chunk)
                chunk = await _next(upstream)
        finally:
            _let_go(upstream)
        return upstream.status, b"".join(chunks)

    def _attempts(self, choices: Sequence[Choice]) -> list[Choice]:
        """A lone engine is asked twice: what failed may have been an idle connection that it closed."""
        return [*choices, choices[0]][: 1 + self._options.retries] if choices else []

    def _note(self, backend: Backend, error: _Failed) -> None:
        backend.count("busy" if error.status else "gone" if error.gone else "failed")
        if error.status == 504:
            self._pool.late(backend)
        elif not error.status:
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
                backend.heard, backend.late = time.monotonic(), 0
                return upstream, chunk
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Failed(f"{backend.name} cannot be reached", gone=True) from error
        except asyncio.TimeoutError as error:
            if upstream is not None:
                upstream.close()
            raise _late(backend) from error
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
            _let_go(upstream)
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


def _let_go(upstream: aiohttp.ClientResponse) -> None:
    """Keep the connection where all has come; else the engine need not go on."""
    upstream.release() if upstream.content.at_eof() else upstream.close()


def _late(backend: Backend) -> _Failed:
    return _Failed(f"{backend.name} takes too long", status=504)


def upstream_headers(request: web.Request, key: str | None, *, ours: bool) -> CIMultiDict[str]:
    """The client's headers for an engine. `key`: the engine's; `ours`: the client's key is for us alone."""
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


def with_params(data: bytes, params: dict[str, Any]) -> bytes:
    """The request as the engine that decodes gets it: it fetches what another one computes."""
    if not params:
        return data
    return msgspec.json.encode({**fields_of(data), "kv_transfer_params": params})


def _nobody(failed: _Failed) -> BadRequest:
    return BadRequest(f"no engine answered: {failed}", failed.status or 502, "engine_unavailable")


async def _ended(task: asyncio.Task[Any]) -> None:
    """End it, if it has not; an answer that it got and nobody took is closed."""
    task.cancel()
    for got in await asyncio.gather(task, return_exceptions=True):
        if isinstance(got, tuple):
            got[0].close()
