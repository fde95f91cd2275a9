"""What a streamed answer of the OpenAI protocol says, and when: no I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

__all__ = ["AnswerStream", "StreamError"]

_DATA = b"data:"
_DONE = b"[DONE]"


class StreamError(Exception):
    """The server's stream is not what the protocol promises; the message says in what."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENTS = msgspec.json.Decoder(_Event)


@dataclass
class AnswerStream:
    """Fed with what arrives; knows then what was said, and when each piece of it arrived."""

    times: list[float] = field(default_factory=list)
    """When each event with some of the answer arrived. Usually an event is a token."""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that the server says it had; None if it does not say."""
    output_tokens: int = 0
    _texts: list[str] = field(default_factory=list)
    _rest: bytes = b""
    _ended: bool = False
    _counted: bool = False

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts)

    def feed(self, data: bytes, now: float) -> None:
        """Take what arrived at `now`. Raises StreamError at what is no event of the protocol."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._event(line[len(_DATA) :].strip(), now)

    def finish(self) -> None:
        """The server has closed the stream. Raises StreamError if something is missing."""
        if not self._ended:
            raise StreamError("the server broke off its answer")
        if not self._counted:
            raise StreamError("the server reports no usage in streams (stream_options.include_usage)")
        if not self.times:
            raise StreamError("the server ended its answer without a token")

    def _event(self, payload: bytes, now: float) -> None:
        if payload == _DONE:
            self._ended = True
            return
        try:
            event = _EVENTS.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StreamError(f"the server sent a malformed event: {error}") from error
        if event.error is not None:
            raise StreamError(f"the server reports an error: {str(event.error)[:200]}")
        for choice in event.choices:
            self._piece(choice, now)
        if event.usage is not None:
            self._counted = True
            self.prompt_tokens = event.usage.prompt_tokens
            self.output_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            self.cached_tokens = details.cached_tokens if details else None

    def _piece(self, choice: _Choice, now: float) -> None:
        if choice.finish_reason is not None:
            self._ended = True
        if choice.delta is not None:  # chat: its first event only names the role
            said = choice.delta.content or ""
            counts = bool(said or choice.delta.reasoning or choice.delta.reasoning_content)
        else:  # a token may have no text yet: half a character, or a special one
            said = choice.text or ""
            counts = bool(said) or choice.finish_reason is None
        if counts or (choice.finish_reason is not None and not self.times):
            self.times.append(now)
            self._texts.append(said)
