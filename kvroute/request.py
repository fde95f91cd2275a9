"""What we read of a request: a few fields of its body, which is passed on as it came."""

from __future__ import annotations

from typing import Any

import msgspec
from xxhash import xxh3_128_digest

__all__ = ["BadRequest", "Body", "fields_of", "read_body"]


class BadRequest(Exception):
    """The request is wrong; the message says what to do. `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Body(msgspec.Struct):
    """Fields of a completion's or a chat's body that routing needs; all others are ignored."""

    model: str
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    messages: msgspec.Raw = msgspec.Raw(b"null")
    tools: msgspec.Raw = msgspec.Raw(b"null")
    chat_template_kwargs: msgspec.Raw = msgspec.Raw(b"null")
    stream: bool | None = False
    cache_salt: str | None = None
    session_id: Any = None
    user: Any = None
    kv_transfer_params: Any = None

    @property
    def chat(self) -> bool:
        """Whether it is a chat's."""
        return bytes(self.messages) != b"null"

    @property
    def text(self) -> bytes:
        """What the prompt is made of, as JSON: equal beginnings are equal prompts' beginnings."""
        return bytes(self.messages if self.chat else self.prompt)

    @property
    def digest(self) -> bytes:
        """Of all that a prompt's tokens depend on, and of the tenant: none is to be quicker for another's."""
        parts = (self.prompt, self.messages, self.tools, self.chat_template_kwargs)
        names = (name.encode("utf-8", "replace") for name in (self.model, self.cache_salt or ""))
        return xxh3_128_digest(b"\0".join([*names, *map(bytes, parts)]))


def fields_of(data: bytes) -> dict[str, Any]:
    """All fields of a body. Raises BadRequest: of those that nobody has read yet a name may be wrong."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is no JSON object of a request: {error}") from error
    return fields


_decoder = msgspec.json.Decoder(Body)


def read_body(data: bytes, *, chat: bool) -> Body:
    """The body of a request. Raises BadRequest, with what is wrong with it."""
    try:
        body = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is no JSON object of a request: {error}") from error
    if chat and not bytes(body.messages).startswith(b"["):
        raise BadRequest("the body has no list of messages")
    if not chat and not bytes(body.prompt).startswith((b'"', b"[")):
        raise BadRequest("the body has no prompt: give it a text, or a list of token ids")
    if not chat:
        body.messages = msgspec.Raw(b"null")
    if body.kv_transfer_params is not None:
        raise BadRequest("kv_transfer_params is between the router and its engines: leave it out")
    return body
