"""The tokens of a prompt, which the engine will make of it: from a tokenizer here, or by asking an engine."""

from __future__ import annotations

import asyncio
import contextlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from kvkeep.errors import ConfigError
from kvroute.backends import Backend
from kvroute.request import Body
from kvroute.template import read_template

__all__ = ["Cached", "EngineTokens", "LocalTokens", "Tokens", "TokensSource"]

Tokens = npt.NDArray[np.uint32]

_CACHED = 16 << 20  # tokens remembered, 4 bytes each
_PIECE = 2048  # characters tokenized and remembered together, a few more
_SPACE = re.compile(r"\S(?= )")
_ASK_WAIT = 2.0


class TokensSource(Protocol):
    """Where tokens come from."""

    async def tokens(self, body: Body, backends: Sequence[Backend]) -> Tokens | None:
        """The prompt's tokens; None: they cannot be had. `backends`: engines that may be asked."""


class Cached:
    """Token arrays by digest, the least recently used forgotten beyond `most` tokens."""

    def __init__(self, most: int = _CACHED) -> None:
        self._most, self._size = most, 0
        self._arrays: OrderedDict[bytes, Tokens] = OrderedDict()

    def get(self, key: bytes) -> Tokens | None:
        """What was put under this key, if it is still there."""
        if (found := self._arrays.get(key)) is not None:
            self._arrays.move_to_end(key)
        return found

    def put(self, key: bytes, tokens: Tokens) -> None:
        """Remember."""
        if key not in self._arrays:
            self._arrays[key] = tokens
            self._size += len(tokens)
            while self._size > self._most:
                self._size -= len(self._arrays.popitem(last=False)[1])


class _Answer(msgspec.Struct):
    tokens: list[int]


class EngineTokens:
    """Asks the least busy engine's `/tokenize`, as vLLM has it; remembers what was answered."""

    def __init__(self, session: aiohttp.ClientSession, headers: dict[str, str]) -> None:
        self._session = session
        self._headers = {**headers, "Content-Type": "application/json"}
        self._cached = Cached()
        self._decoder = msgspec.json.Decoder(_Answer)

    async def tokens(self, body: Body, backends: Sequence[Backend]) -> Tokens | None:
        """See `TokensSource`."""
        digest = body.digest
        if (found := self._cached.get(digest)) is not None:
            return found
        prompt = given(body)
        if isinstance(prompt, np.ndarray):
            self._cached.put(digest, prompt)
            return prompt
        if (asked := _question(body, prompt)) is None:
            return None
        url = min(backends, key=lambda one: one.in_flight).engine.url + "/tokenize"
        timeout = aiohttp.ClientTimeout(_ASK_WAIT)
        try:
            async with self._session.post(url, data=asked, headers=self._headers, timeout=timeout) as answer:
                if answer.status != 200:
                    return None
                tokens = _array(self._decoder.decode(await answer.read()).tokens)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, msgspec.DecodeError, OverflowError):
            return None
        self._cached.put(digest, tokens)
        return tokens


class _TokenizerFile(msgspec.Struct):
    version: str
    model: dict[str, msgspec.Raw]


class LocalTokens:
    """A tokenizer.json, and the chat template beside it. Text is cut at spaces into pieces, whose tokens are
    remembered: what prompts have in common is tokenized once. A cut may tokenize otherwise than the engine
    does; then the prefix that is found is shorter, and nothing else happens."""

    def __init__(self, folder: str) -> None:
        """Raises ConfigError where there is no tokenizer, or nothing that reads it."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError("--tokenizer needs tokenizers: pip install tokenizers jinja2") from error
        try:
            text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
            msgspec.json.decode(
                text, type=_TokenizerFile
            )  # what the library says of others is a bare Exception
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise ConfigError(f"--tokenizer {folder} has no tokenizer.json to read: {error}") from error
        self._tokenizer = Tokenizer.from_str(text)
        self._template = read_template(Path(folder))
        self._cached = Cached()

    async def tokens(self, body: Body, backends: Sequence[Backend]) -> Tokens | None:
        """See `TokensSource`."""
        text = self._template.render(body) if body.chat and self._template else given(body)
        if not isinstance(text, str):
            return text
        # A template writes the special tokens that begin a text itself.
        pieces = [(piece, number == 0 and not body.chat) for number, piece in enumerate(cut(text))]
        whose = (body.cache_salt or "").encode("utf-8", "replace") + b"\0"
        keys = [xxh3_128_digest(whose + piece.encode("utf-8", "replace"), begins) for piece, begins in pieces]
        found = {key: tokens for key in keys if (tokens := self._cached.get(key)) is not None}
        missing = {key: piece for key, piece in zip(keys, pieces, strict=True) if key not in found}
        if sum(len(piece) for piece, _ in missing.values()) > 2 * _PIECE:  # long enough to hold others up
            found |= await asyncio.to_thread(self._encode, missing)
        else:
            found |= self._encode(missing)
        for key in missing:
            self._cached.put(key, found[key])
        return np.concatenate([found[key] for key in keys]) if keys else None

    def _encode(self, pieces: dict[bytes, tuple[str, bool]]) -> dict[bytes, Tokens]:
        encode = self._tokenizer.encode
        return {
            key: _array(encode(text, add_special_tokens=first).ids) for key, (text, first) in pieces.items()
        }


def cut(text: str) -> list[str]:
    """Pieces of a few thousand characters, each ending before a space; where depends on what is before."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        match = _SPACE.search(text, start + _PIECE)
        if match is None:
            break
        pieces.append(text[start : match.start() + 1])
        start = match.start() + 1
    return [*pieces, text[start:]] if start < len(text) else pieces


def given(body: Body) -> Tokens | str | None:
    """A completion's prompt, as ids or text; of several, the first. None: there is none, or it is a chat."""
    if body.chat:
        return None
    with contextlib.suppress(msgspec.DecodeError, OverflowError, TypeError):
        prompt: Any = msgspec.json.decode(body.prompt, type=str | list[int | str | list[int]])
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if prompt:
            return prompt if isinstance(prompt, str) else _array(prompt)
    return None


def _question(body: Body, prompt: str | None) -> bytes | None:
    """What to ask an engine's /tokenize."""
    if not body.chat:
        return None if prompt is None else msgspec.json.encode({"model": body.model, "prompt": prompt})
    fields = {name: getattr(body, name) for name in ("messages", "tools", "chat_template_kwargs")}
    given = {name: value for name, value in fields.items() if bytes(value) != b"null"}
    return msgspec.json.encode({"model": body.model, **given})


def _array(ids: Sequence[Any]) -> Tokens:
    """Raises OverflowError or TypeError on what is no token id."""
    return np.frombuffer(array("I", ids), np.uint32)
