"""What two keepers say to each other, version 1: a handshake, signed frames, values from memory to memory.

    server → client   magic, version, 32 bytes that were never used before
    client → server   magic, version, 32 such bytes of its own, proof
    server → client   verdict, proof

A proof is a keyed digest (HMAC-SHA256) of both sides' bytes under the token, so what was recorded of one
connection opens no other; without a token its key is empty, and it proves nothing. From then on a frame is
a little-endian u32 length, so many bytes of msgpack, and 16 bytes of a digest over the frame and its number
in the connection, under a key that both derive from the token and the handshake: a frame that was forged,
changed, left out or sent again ends the connection. Values follow their frame as they lie in memory; the
seal that they carry is checked, which tells damage and not intent: that takes TLS, in which all of this is
wrapped where a certificate is given. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import ssl
import struct
import time
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec

from kvkeep.errors import ConfigError, ProtocolError
from kvkeep.tiers.base import KEY_BYTES, Buffer
from kvkeep.tiers.pool import PooledSocket
from kvkeep.tls import read_token as token_in

__all__ = [
    "MOST_KEYS",
    "PORT",
    "VERSION",
    "Back",
    "Channel",
    "Given",
    "Have",
    "Held",
    "Lend",
    "Lent",
    "Meet",
    "Met",
    "Refused",
    "Request",
    "Sorry",
    "State",
    "Take",
    "greet",
    "read_token",
    "welcome",
]

VERSION: Final = 1
PORT: Final = 7440
"""Where keepers serve their peers, unless told otherwise."""
MOST_KEYS: Final = 4096
"""Keys in one request: what the asked keeper's event loop looks up at once."""
_MAGIC = b"kvkpeer\0"
_MOST_FRAME = 1 << 20
_NONCE = 32
_MAC = 16
_TOKEN_CHARACTERS = 16
_CHALLENGE = struct.Struct(f"<8sH{_NONCE}s")
_ANSWER = struct.Struct(f"<8sH{_NONCE}s32s")
_VERDICT = struct.Struct("<H32s")
_LENGTH = struct.Struct("<I")
_WELCOME, _OTHER_VERSION, _OTHER_TOKEN, _CROWDED = range(4)

_Keys = Annotated[bytes, msgspec.Meta(max_length=MOST_KEYS * KEY_BYTES)]
_Lengths = Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=2**40)]], msgspec.Meta(max_length=MOST_KEYS)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Message(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class Have(_Message):
    """Which of these (24 bytes each) are held? Answered by Held."""

    keys: _Keys


class Take(_Message):
    """Send values, each if it is as long as said. Answered by Given, and the values."""

    keys: _Keys
    lengths: _Lengths


class Meet(_Message):
    """Who is the server's NIXL agent? Answered by Met, or Sorry where there is none."""


class Lend(_Message):
    """Keep values where they are until Back, for the client to read them. Answered by Lent."""

    keys: _Keys
    lengths: _Lengths


class Back(_Message):
    """The client has read what it was lent. Not answered."""

    loan: _Natural


class Held(_Message):
    """A byte per key: 1 where it is held."""

    held: bytes


class Given(_Message):
    """A byte per key, of State; the values of those that are GIVEN follow, in order."""

    states: bytes


class Met(_Message):
    """What the server's NIXL agent says of itself."""

    metadata: Annotated[bytes, msgspec.Meta(max_length=1 << 18)]


class Lent(_Message):
    """As Given; where each value that is GIVEN lies in the server's memory, and the number for Back."""

    loan: _Natural
    states: bytes
    addresses: list[_Natural]


class Sorry(_Message):
    """The request was understood and declined."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class State:
    """What became of one value that was asked for."""

    GIVEN, MISSING, OTHER_LENGTH, BUSY = range(4)
    """BUSY: as much as may be lent at once is on its way to others already."""


Request: TypeAlias = Have | Take | Meet | Lend | Back
Reply: TypeAlias = Held | Given | Met | Lent | Sorry

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_T = TypeVar("_T", Held, Given, Met, Lent)


class Refused(ProtocolError):
    """The other side will not talk to us, for a reason that trying again does not mend."""


class Channel(PooledSocket):
    """One connection between keepers.

    Every method raises OSError where the connection is lost or `timeout` seconds pass
    (for each frame or value), ProtocolError where what comes is not the other side's; after either it is of
    no more use.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        super().__init__(sock)
        self._key = b""
        self._sent = self._received = 0
        self._server = False
        self._timeout = 0.0
        with contextlib.suppress(OSError):  # a unix socket pair, in tests
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wait(timeout)

    def secure(self, tls: ssl.SSLContext | None, timeout: float) -> None:
        """As the server, wrap what follows in TLS, if there is a context; within so many seconds."""
        if tls is not None:
            self._sock.settimeout(timeout)
            self._sock = tls.wrap_socket(self._sock, server_side=True)
            self.wait(timeout)

    def wait(self, timeout: float) -> None:
        """From now on, wait so many seconds."""
        self._timeout = timeout
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(timeout)
            return
        # Blocking calls that the kernel bounds: a value is one call, not one for each wake-up.
        self._sock.settimeout(None)
        pair = struct.pack("@ll", int(timeout), max(1, int(timeout % 1 * 1e6)))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, pair)

    @property
    def agreed(self) -> bool:
        """Whether the handshake is over."""
        return bool(self._key)

    def agree(self, token: bytes, ours: bytes, theirs: bytes, server: bool) -> None:
        """The handshake is over: from here on frames are signed. `ours`, `theirs`: of client and server."""
        self._key, self._server = _digest(token, b"frames", ours + theirs), server

    def send(self, message: Request | Reply) -> None:
        """Send one frame."""
        body = _encoder.encode(message)
        if len(body) > _MOST_FRAME:
            raise ProtocolError(f"a message of {len(body)} bytes exceeds the limit of {_MOST_FRAME}")
        mac = self._mac(self._server, self._sent, body)
        self._sent += 1
        self.write(memoryview(_LENGTH.pack(len(body)) + body + mac))

    def request(self) -> Request:
        """The next frame of a client."""
        try:
            return _requests.decode(self._frame())
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"not a request of version {VERSION}: {error}") from error

    def reply(self, expected: type[_T]) -> _T:
        """The next frame of a server. Raises Refused with its reason where it declines."""
        try:
            found = _replies.decode(self._frame())
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"not a reply of version {VERSION}: {error}") from error
        if isinstance(found, Sorry):
            raise Refused(found.reason)
        if not isinstance(found, expected):
            raise ProtocolError(f"{type(found).__name__} where {expected.__name__} was asked for")
        return found

    def write(self, data: Buffer) -> None:
        """Send bytes from where they lie."""
        deadline, at = time.monotonic() + self._timeout, 0
        while at < len(data):
            at += self._try(self._sock.send, data[at:])
            if at < len(data) and time.monotonic() > deadline:
                raise TimeoutError("the other side takes too long to read")

    def fill(self, target: Buffer) -> None:
        """Receive bytes to where they belong."""
        deadline, at = time.monotonic() + self._timeout, 0
        flags = 0 if isinstance(self._sock, ssl.SSLSocket) else socket.MSG_WAITALL
        while at < len(target):
            count = self._try(self._sock.recv_into, target[at:], len(target) - at, flags)
            if not count:
                raise ConnectionResetError("the other side closed the connection")
            at += count
            if at < len(target) and time.monotonic() > deadline:
                raise TimeoutError("no answer in time")

    def read(self, count: int) -> bytes:
        """Receive so many bytes."""
        data = bytearray(count)
        self.fill(memoryview(data))
        return bytes(data)

    def _try(self, call: Any, *args: Any) -> int:
        try:
            return int(call(*args))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise TimeoutError("no answer in time") from error

    def _frame(self) -> bytes:
        (length,) = _LENGTH.unpack(self.read(_LENGTH.size))
        if not 0 < length <= _MOST_FRAME:
            raise ProtocolError(f"a frame of {length} bytes: this is not kvkeep's protocol")
        body = self.read(length)
        mac = self._mac(not self._server, self._received, body)
        self._received += 1
        if not hmac.compare_digest(mac, self.read(_MAC)):
            raise ProtocolError(
                "a frame that the other side did not sign, or not as this one: forged or replayed"
            )
        return body

    def _mac(self, server: bool, number: int, body: bytes) -> bytes:
        return _digest(self._key, b"server" if server else b"client", number.to_bytes(8, "little") + body)[
            :_MAC
        ]


def greet(channel: Channel, token: bytes) -> None:
    """The client's side of the handshake. Raises Refused (another version, another token, no room, or not a
    keeper that has the token), OSError."""
    magic, version, theirs = _CHALLENGE.unpack(channel.read(_CHALLENGE.size))
    if magic != _MAGIC:
        raise Refused("what answers there is no kvkeep: name the address that it serves with --peers")
    if version != VERSION:
        raise Refused(_other_version(version))
    ours = secrets.token_bytes(_NONCE)
    proof = _digest(token, b"client", ours + theirs)
    channel.write(memoryview(_ANSWER.pack(_MAGIC, VERSION, ours, proof)))
    verdict, proof = _VERDICT.unpack(channel.read(_VERDICT.size))
    if verdict == _OTHER_VERSION:
        raise Refused(_other_version(version))
    if verdict == _OTHER_TOKEN:
        what = "another token" if token else "a token"
        raise Refused(f"it wants {what}: give both keepers the same file (token_file=)")
    if verdict != _WELCOME:
        raise ConnectionRefusedError("it has as many connections as it takes")
    if not hmac.compare_digest(proof, _digest(token, b"server", ours + theirs)):
        raise Refused("it does not have our token: give both keepers the same file (token_file=)")
    channel.agree(token, ours, theirs, server=False)


def welcome(channel: Channel, token: bytes, room: bool) -> None:
    """The server's side of the handshake; `room`: whether another client is taken. Raises ProtocolError
    where the client is not one, OSError."""
    ours = secrets.token_bytes(_NONCE)
    channel.write(memoryview(_CHALLENGE.pack(_MAGIC, VERSION, ours)))
    magic, version, theirs, proof = _ANSWER.unpack(channel.read(_ANSWER.size))
    if magic != _MAGIC:
        raise ProtocolError("not a keeper")
    verdict = _WELCOME if room else _CROWDED
    if not hmac.compare_digest(proof, _digest(token, b"client", theirs + ours)):
        verdict = _OTHER_TOKEN
    if version != VERSION:
        verdict = _OTHER_VERSION
    answer = _digest(token, b"server", theirs + ours) if verdict == _WELCOME else bytes(32)
    channel.write(memoryview(_VERDICT.pack(verdict, answer)))
    if verdict != _WELCOME:
        why = {_OTHER_VERSION: f"version {version}", _OTHER_TOKEN: "a wrong token", _CROWDED: "no room"}
        raise ProtocolError(f"a peer was refused: {why[verdict]}")
    channel.agree(token, theirs, ours, server=True)


def _other_version(version: int) -> str:
    return (
        f"it speaks version {version} of the peer protocol, this keeper {VERSION}: "
        "install the same kvkeep on both"
    )


def read_token(path: str | None) -> bytes:
    """The token in a file; none: empty. Raises ConfigError."""
    if path is None:
        return b""
    token = token_in(path)
    if len(token) < _TOKEN_CHARACTERS:
        raise ConfigError(
            f"the token in {path} is shorter than {_TOKEN_CHARACTERS} characters: "
            "openssl rand -hex 32 makes one"
        )
    return token.encode()


def _digest(key: bytes, what: bytes, data: bytes) -> bytes:
    return hmac.digest(key, b"kvkeep peer %d %s " % (VERSION, what) + data, "sha256")
