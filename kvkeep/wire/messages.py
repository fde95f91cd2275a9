"""The messages of protocol version 8, and their framing.

A frame is a little-endian u32 length and that many bytes of msgpack: an array whose first item
names the message. Arrays of numbers travel as bytes (little-endian int64), keys as 16 bytes each.
Decoding validates types and bounds; anything else is a ProtocolError. No pickle anywhere.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, TypeAlias

import msgspec

from kvkeep.errors import ProtocolError
from kvkeep.identity import TENANT_BYTES
from kvkeep.terms import GroupSpec

__all__ = [
    "MAX_FRAME",
    "VERSION",
    "Abort",
    "Changed",
    "Changes",
    "Clear",
    "Cleared",
    "Commit",
    "Forget",
    "Found",
    "Hello",
    "Lookup",
    "Miss",
    "Missed",
    "Namespace",
    "OpenNamespace",
    "Poll",
    "Progress",
    "Refused",
    "Release",
    "Reply",
    "Request",
    "Reservation",
    "Reserve",
    "Reserved",
    "Status",
    "StatusReply",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
    "frame_length",
]

VERSION = 8
"""Raised with every change of a message: `tests/wire/test_version.py` holds each to its version."""
MAX_FRAME = 32 << 20
"""Longest frame in bytes; 2 M chunk keys. A longer one is not from a client of ours."""
HEADER = struct.Struct("<I")

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=1024)]
Ranks = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Blob = Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME)]
Tenant = Annotated[bytes, msgspec.Meta(max_length=TENANT_BYTES)]
"""`kvkeep.identity.tenant_of` the request's cache_salt; empty: none."""


class _Message(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class Hello(_Message):
    """First message of a connection. Answered by Welcome, or Refused and a close."""

    version: int
    session: Name
    arena: bool
    """Whether to send the arena's file descriptor along with the answer."""
    presence: bool = False
    """Whether to send, behind that, the one of what `kvkeep.presence` describes."""


class OpenNamespace(_Message):
    """Open (or find) a namespace. Answered by Namespace."""

    fingerprint: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    label: Annotated[str, msgspec.Meta(max_length=512)]
    groups: Annotated[list[GroupSpec], msgspec.Meta(min_length=1, max_length=256)]
    parts: Ranks
    readers: Ranks
    chunk_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    """Tokens of a chunk, for recordings and for those who look at the keeper; 0: not known."""


class Lookup(_Message):
    """Lease the longest usable run of these chunks. Answered by Found."""

    namespace: Natural
    keys: Blob
    first: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    """Chunks at the start that the engine has already: touched, not looked for."""
    recompute: Annotated[float, msgspec.Meta(ge=-1, le=1e9)] = 0.0
    """Seconds that the engine takes to compute one chunk, against which loading from a tier is weighed
    (0: not known, load). Less than 0: look in memory only."""
    patience: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    """Seconds that the request may wait to hear whether tiers have anything: no ticket where that usually
    takes longer."""
    ticket: Natural = 0
    """A ticket that this lookup settles: its request takes what has landed, and waits no more. 0: none."""
    trace: Annotated[str, msgspec.Meta(max_length=640)] = ""
    """The request's trace, as in W3C's header `traceparent`, and behind a space, where there is one, in
    `tracestate`; empty: none."""
    tenant: Tenant = b""


class Miss(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A request that was not looked up, since nothing of it is held. `chunks`: of its prompt; else as in
    Lookup."""

    chunks: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    first: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    tenant: Tenant = b""


class Missed(_Message):
    """Count these requests as looked up. Not answered."""

    namespace: Natural
    items: Annotated[list[Miss], msgspec.Meta(max_length=65536)]


class Reservation(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Chunks of one chain to be written: positions first, first+1, …; a byte per chunk and group."""

    keys: Blob
    wanted: list[Blob]
    first: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    epoch: Natural
    tenant: Tenant = b""


class Reserve(_Message):
    """Reserve slots for several requests at once. Answered by Reserved."""

    namespace: Natural
    items: Annotated[list[Reservation], msgspec.Meta(max_length=65536)]
    ticket: Natural = 0
    """Not 0: the session's connections that have the arena are sent the answer too."""


class Commit(_Message):
    """A rank has written its part. Not answered."""

    reservation: Natural
    part: Rank


class Abort(_Message):
    """Nobody will write to this reservation. Not answered."""

    reservation: Natural


class Release(_Message):
    """A rank has read what it was leased (None: the whole lease is given back). Not answered."""

    lease: Natural
    rank: Rank | None


class Poll(_Message):
    """Ask how far fetches are. Answered by Progress."""

    tickets: Annotated[list[Natural], msgspec.Meta(max_length=65536)]


class Forget(_Message):
    """Nobody waits for this ticket any more. Not answered."""

    ticket: Natural


class Changes(_Message):
    """Ask what chunks are now, and what has come and gone. Answered by Changed."""

    namespace: Natural
    keys: Blob
    """Chunks, by the keys of their groups, of which to tell what they are now."""
    after: Natural | None
    """Number of the last change that this keeper told; 0: none yet, None: changes are not wanted."""


class Clear(_Message):
    """Forget what is held, of one namespace or (None) of all, of one tenant or (empty) whosever it is.
    Answered by Cleared."""

    namespace: Natural | None
    tenant: Tenant = b""


class Status(_Message):
    """Ask for figures. Answered by StatusReply."""

    tenant: Tenant = b""
    """One to be shown besides those that hold most."""


class Welcome(_Message):
    """The connection is open."""

    version: int
    keeper: str
    arena_bytes: Natural


class Namespace(_Message):
    """The handle of a namespace, valid for any connection to this keeper."""

    namespace: Natural


class Found(_Message):
    """See kvkeep.terms.Found; offsets as int64 per group."""

    lease: Natural
    chunks: Natural
    epoch: Natural
    offsets: list[bytes]
    ticket: Natural
    """More may be on its way from the tiers: `Poll` tells, and a lookup that names the ticket takes it."""


class Progress(_Message):
    """Per ticket: 0 while it is not known whether tiers have anything, 1 while it is read, 2 when done."""

    stages: bytes


class Changed(_Message):
    """See kvkeep.keeper.journal.Changes; a byte per state."""

    last: Natural
    complete: bool
    keys: bytes
    states: bytes
    now: bytes
    """Per key that was asked about, what it is now."""


class Reserved(_Message):
    """Per item: the reservation's number (0: nothing to write), int64 offsets per group, and the epoch."""

    items: list[tuple[int, list[bytes], int]]
    ticket: Natural = 0
    """Of the question."""
    refusal: str = ""
    """Why nothing was reserved, where the question had a ticket: for all who wait."""


class Cleared(_Message):
    """How many chunks were forgotten."""

    chunks: Natural


class StatusReply(_Message):
    """Figures as a plain dict, for people and for JSON."""

    figures: dict[str, Any]


class Refused(_Message):
    """The request was understood and declined; the message says why and what to do."""

    reason: str


Request: TypeAlias = (
    Hello
    | OpenNamespace
    | Lookup
    | Missed
    | Poll
    | Forget
    | Reserve
    | Commit
    | Abort
    | Release
    | Changes
    | Clear
    | Status
)
Reply: TypeAlias = (
    Welcome | Namespace | Found | Progress | Reserved | Changed | Cleared | StatusReply | Refused
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """A whole frame. Raises ProtocolError if the message is longer than a frame may be."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message of {len(body)} bytes exceeds the limit of {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes | bytearray | memoryview) -> int:
    """Length of the body that follows a 4-byte header. Raises ProtocolError when it cannot be ours."""
    (length,) = HEADER.unpack(header)
    if not 0 < length <= MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes: this is not kvkeep's protocol")
    return int(length)


def decode_request(body: bytes | memoryview) -> Request:
    """Decode a client's message. Raises ProtocolError."""
    try:
        return _requests.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8
        raise ProtocolError(f"not a request of protocol version {VERSION}: {error}") from error


def decode_reply(body: bytes | memoryview) -> Reply:
    """Decode the keeper's message. Raises ProtocolError."""
    try:
        return _replies.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a reply of protocol version {VERSION}: {error}") from error
