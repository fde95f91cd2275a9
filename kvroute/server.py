"""The router's HTTP side: what OpenAI's clients ask, and what operators do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from blake3 import blake3

from kvkeep.errors import ConfigError
from kvkeep.observe.traces import otlp
from kvroute.backends import Backend, Engine, Pool
from kvroute.discover import Cluster, discover
from kvroute.figures import CONTENT_TYPE, Figures, metrics, summary
from kvroute.forward import Course, Forwarder, upstream_headers, with_params
from kvroute.gate import Gate
from kvroute.index import Index
from kvroute.options import Options, Role
from kvroute.policy import PLAIN, Ask, Expected, Kv, Policy
from kvroute.request import BadRequest, Body, fields_of, read_body
from kvroute.snapshot import find, sealed, write
from kvroute.subscribe import Subscriber, say_why
from kvroute.tokens import EngineTokens, LocalTokens, Tokens, TokensSource
from kvroute.traces import Traces

__all__ = ["Router"]

log = logging.getLogger("kvroute.server")

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BODY_WAIT = 30.0
_IDLE = 4.0  # uvicorn, and so vLLM, closes an idle connection after 5 s
_FIRST_CHECK = 10.0
_BACKLOG = 8192  # a full one costs a client seconds
_PROMISES = 20.0  # seconds until events must have told what an engine computed
_GUESSES = 600.0  # where there are no events: what we sent it, it may still hold
_WAIT_AT_ONCE = 4
_INDEX = "/kvkeep/index"
_OPEN = ("/health", _INDEX)  # this one asks for a key of its own
_SAVE_EVERY = 60.0
_TOPIC = re.compile(r"kv@([^@]+)@.*")


class Router:
    """One router. `start`, then it serves until `close`; all of it on the running event loop."""

    def __init__(self, options: Options) -> None:
        """Raises ConfigError on keys, certificates or a tokenizer that cannot be read."""
        self._options = options
        self._backend_key, self._index_key = options.key_of("backend_key"), options.key_of("index_key")
        self._index_file = options.index_file()
        self._keys = {blake3(key.encode()).digest(): salt for key, salt in options.client_keys().items()}
        if self._index_key and blake3(self._index_key.encode()).digest() in self._keys:
            raise ConfigError("--index-key must be no client's: the index tells what all of them asked for")
        self._salts = {salt for salt in self._keys.values() if salt is not None}
        self._tls, self._backend_tls = options.server_tls(), options.client_tls()
        self._local = LocalTokens(options.tokenizer) if options.tokenizer else None
        self._traces = Traces(otlp(options.traces) if options.traces else None)
        self._gate = Gate(options.max_requests, options.queue, options.queue_wait, options.max_bodies)
        self.figures = Figures()
        self.index = Index()
        told = options.events_listen or any(place.events for place in options.backends)
        self.expected = Expected(time.monotonic, _PROMISES if told else _GUESSES)
        plain = PLAIN.get(options.policy)
        self._policy = Kv(self.index, self.expected) if plain is None else Policy(plain)
        self._draining, self._ended = False, asyncio.Event()
        self._saving: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # Life

    async def start(self) -> None:
        """Find the engines, and listen. Raises ConfigError where the address cannot be had."""
        options = self._options
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=options.timeout)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE, ssl=self._backend_tls)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        )
        headers = {} if self._backend_key is None else {"Authorization": f"Bearer {self._backend_key}"}
        self.pool = Pool(self._session, options.check_interval, headers)
        self.pool.lost = self.expected.forget
        self._subscriber = self.pool.subscriber = Subscriber(self.index)
        for source in (options.index, options.index_from):  # the last that is there
            if source and (saved := await find(source, self._session, self._index_key)):
                self.index.seed, self._subscriber.saved = saved
        self._tokens: TokensSource = self._local or EngineTokens(self._session, headers)
        self._forwarder = Forwarder(self._session, self.pool, self.figures, options)
        app = self._app()
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, max_field_size=16384, shutdown_timeout=0.5
        )
        try:
            await self._find_engines()
            await self._runner.setup()
            self._site = web.TCPSite(self._runner, *options.address, backlog=_BACKLOG, ssl_context=self._tls)
            await self._site.start()
            if self._index_file is not None:
                self._saving = asyncio.create_task(self._save(self._index_file), name="saving the index")
                self._saving.add_done_callback(say_why)
        except (OSError, ConfigError) as error:
            await self.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"cannot listen on {options.listen}: {error.strerror or error}") from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._runner.addresses[0][1])

    @property
    def url(self) -> str:
        """The same, as clients write it."""
        host, scheme = self._options.address[0], "http" if self._tls is None else "https"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    async def drain(self) -> None:
        """Take on nothing new, and wait until what runs has ended, as long as the options say."""
        self._draining = True
        log.info("draining: %d requests are running", self._gate.running)
        if not await self._gate.emptied(self._options.drain):
            log.warning("%d requests are cut off after %g s", self._gate.running, self._options.drain)

    async def close(self) -> None:
        """End at once, with the index in its file."""
        self._ended.set()
        if self._saving is not None:
            await asyncio.wait([self._saving])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runner.cleanup()
        await self._subscriber.close()
        await self._session.close()
        await asyncio.to_thread(self._traces.close)

    async def _find_engines(self) -> None:
        """Look everywhere, in the background; the first look is waited for, though not long."""
        options = self._options
        if options.events_listen is not None:
            self.events = self._subscriber.listen(options.events_listen, self._engine_of, "kv@")
            log.info("engines can send their events to %s", self.events)
        cluster = None
        if any(place.kind == "k8s" for place in options.backends):
            url = options.kubernetes_api
            cluster = Cluster.of_this_pod() if url is None else Cluster(url.rstrip("/"))
        looked = []
        for place in options.backends:
            first = asyncio.Event()

            def report(engines: list[Engine], place: object = place, first: asyncio.Event = first) -> None:
                self.pool.found(place, engines)
                first.set()

            self._keep(discover(place, report, cluster))
            looked.append(first.wait())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*looked), _FIRST_CHECK)
        await self.pool.check_all()
        self._keep(self.pool.check())
        if options.log_interval:
            self._keep(self._log())

    async def _save(self, path: Path) -> None:
        """Now and then, and at the end."""
        while not self._ended.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _SAVE_EVERY)
            try:
                await asyncio.to_thread(write, path, self.index.seed, await self._subscriber.parts())
            except OSError as error:
                log.warning("the index is not saved: %s", error)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it until the end."""
        task = asyncio.create_task(work, name=getattr(work, "__qualname__", "a task"))
        task.add_done_callback(say_why)
        self._tasks.append(task)

    def _engine_of(self, topic: str) -> str | None:
        """Whose events they are, by a topic kv@HOST[:PORT]@MODEL."""
        match = _TOPIC.fullmatch(topic)
        named = match[1] if match else ""
        found = [name for name in self.pool.backends if name == named or name.rpartition(":")[0] == named]
        return found[0] if len(found) == 1 else None

    async def _log(self) -> None:
        while True:
            before, every = self.figures.totals(), self._options.log_interval
            await asyncio.sleep(every)
            log.info("%s", summary(self.figures.totals() - before, every, self.pool))

    # Requests

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=self._options.max_body, middlewares=[self._guard])
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get(_INDEX, self._give_index)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse who may not; and say what was wrong in the words of OpenAI's API."""
        try:
            self._admit(request)
            return await handler(request)
        except BadRequest as error:
            return self._refusal(error)
        except web.HTTPRequestEntityTooLarge:
            most = self._options.max_body
            return self._refusal(BadRequest(f"the body is longer than {most} bytes", 413, "too_large"))
        except web.HTTPException as error:  # no such path, no such method
            return self._refusal(BadRequest(error.reason, error.status, "invalid_request_error"))

    def _admit(self, request: web.Request) -> None:
        certificates = self._options.certificates
        if self._keys or certificates:
            known = _key(request) in self._keys or (certificates and bool(request.get_extra_info("peercert")))
            if not known and request.path not in _OPEN:
                ways = ["send the header Authorization: Bearer KEY"] if self._keys else []
                ways += ["show a client's certificate"] if certificates else []
                raise BadRequest(", or ".join(ways), 401, "authentication_error")
        elif self._options.loopback:
            # A web site whose name was pointed at this host must not get in.
            name = re.sub(r":\d+$", "", request.host).strip("[]").lower()
            if name not in ("localhost", "127.0.0.1", "::1", self._options.address[0]):
                raise BadRequest("that is not the name of this host", 403, "permission_error")

    def _refusal(self, error: BadRequest) -> web.Response:
        self.figures.refuse(error.kind)
        said = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = msgspec.json.encode({"error": said})
        return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        """A completion or a chat."""
        if self._draining:
            raise BadRequest("this router is about to end", 503, "overloaded")
        if request.content_type != "application/json":
            raise BadRequest("send the header Content-Type: application/json", 415)
        most, size = self._options.max_body, request.content_length
        if size is None or size > most or "Content-Encoding" in request.headers:
            size = most  # for all that is known
        async with self._gate.turn(size) as turn:  # before the body: what waits takes no memory
            try:
                data = await asyncio.wait_for(request.read(), _BODY_WAIT)
            except asyncio.TimeoutError as error:
                raise BadRequest(f"the body did not come within {_BODY_WAIT:g} s", 408) from error
            self._gate.resize(turn, len(data))
            arrived = time.perf_counter()
            body = read_body(data, chat=request.path.endswith("/chat/completions"))
            data = self._salted(data, body, self._keys.get(_key(request)))
            if self.pool.serves(body.model) is False:
                raise BadRequest(f"no engine serves the model {body.model!r}", 404, "not_found_error")
            self.figures.requests += 1
            return await self._route(request, data, body, arrived)

    def _salted(self, data: bytes, body: Body, salt: str | None) -> bytes:
        """The body with the cache salt that the client's key is bound to, and with no other's."""
        given = body.cache_salt
        if given not in (None, salt) and (salt is not None or given in self._salts):
            raise BadRequest("that cache_salt is not this key's: leave it out", 403, "permission_error")
        if salt is None:
            return data
        body.cache_salt = salt
        return msgspec.json.encode({**fields_of(data), "cache_salt": salt})

    async def _route(
        self, request: web.Request, data: bytes, body: Body, arrived: float
    ) -> web.StreamResponse:
        headers = upstream_headers(request, self._backend_key, ours=bool(self._keys))
        headers.setdefault("X-Request-Id", uuid.uuid4().hex)  # prefill and decode know it by one name
        with self._traces.request(headers) as trace:
            split = self._options.backends[0].role != "any"
            first = self._usable(body.model, "prefill" if split else "any")
            tokens, waited = await self._tokens_of(body, first)
            ask = Ask(body.text, _session_of(request, body, self._options), tokens, salt=body.cache_salt)
            if self.pool.is_lora(body.model):
                ask = ask._replace(lora=body.model)
            trace.note(model=body.model, prompt_tokens=-1 if tokens is None else len(tokens))
            ask = self._policy.look(ask)
            course = Course(ask, trace, self.figures, self.expected, arrived, waited)
            choices = self._policy.rank(ask, first)
            if not split:
                return await self._forwarder.answer(request, data, headers, choices, course)
            there = self._policy.rank(ask, self._usable(body.model, "decode"))
            if ask.tokens_to_compute(there[0]) < self._options.prefill_from:
                self.figures.prefill_skipped += 1
                return await self._forwarder.answer(request, data, headers, there, course)
            self.expected.promise(ask, choices[0].backend.name)
            trace.event("prefill")
            # It begins now, and few wait where it is waited for.
            begins = choices[0].backend.waiting == 0 and there[0].backend.waiting < _WAIT_AT_ONCE
            if self._options.at_once and begins:
                return await self._forwarder.answer_at_once(request, data, headers, choices, there, course)
            began = time.perf_counter()
            prefilled = await self._forwarder.prefill(request, data, headers, choices)
            course.waited += time.perf_counter() - began
            trace.event("prefilled")
            if isinstance(prefilled, web.Response):
                return prefilled
            there = self._policy.rank(ask, self._usable(body.model, "decode"))  # the load is another now
            data = with_params(data, prefilled)
            return await self._forwarder.answer(request, data, headers, there, course)

    def _usable(self, model: str, role: Role) -> list[Backend]:
        if found := self.pool.usable(model, role):
            return found
        raise BadRequest(f"no engine that serves {model!r} is up", 503, "engine_unavailable")

    async def _tokens_of(self, body: Body, backends: Sequence[Backend]) -> tuple[Tokens | None, float]:
        """The prompt's tokens, where the policy wants them, and how long it took."""
        if not self._policy.wants_tokens:
            return None, 0.0
        began = time.perf_counter()
        tokens = await self._tokens.tokens(body, backends)
        took = time.perf_counter() - began
        self.figures.tokenize.add(took)
        self.figures.unknown_tokens += tokens is None
        return tokens, took

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": list(self.pool.models())})

    async def _health(self, request: web.Request) -> web.Response:
        """Healthy: requests are taken on, and an engine of each kind is up."""
        up = dict.fromkeys((place.role for place in self._options.backends), 0)
        for one in self.pool.backends.values():
            up[one.engine.role] += one.up
        healthy = not self._draining and all(up.values())
        return _json({"healthy": healthy, "draining": self._draining, "up": up}, 200 if healthy else 503)

    async def _give_index(self, request: web.Request) -> web.StreamResponse:
        """The whole index, and the seed of its names: only for the key that is for nothing else."""
        if self._index_key is None or _key(request) != blake3(self._index_key.encode()).digest():
            raise BadRequest(
                "the index is given for the key of --index-key only", 401, "authentication_error"
            )
        pieces = await asyncio.to_thread(sealed, self.index.seed, await self._subscriber.parts())
        answer = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await answer.prepare(request)
        for piece in pieces:
            await answer.write(piece)
        return answer

    async def _metrics(self, request: web.Request) -> web.Response:
        text = metrics(self.figures, self.pool, self._gate, self.index, self._subscriber)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


def _key(request: web.Request) -> bytes:
    """Of the key that a client sends, a digest."""
    kind, _, key = request.headers.get("Authorization", "").partition(" ")
    return blake3(key.strip().encode("utf-8", "replace")).digest() if kind.lower() == "bearer" else b""


def _session_of(request: web.Request, body: Body, options: Options) -> str | None:
    """What names the request's session: a header, or a field of the body."""
    given = request.headers.get(options.session_header) or body.session_id or body.user
    return None if given is None else str(given)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
