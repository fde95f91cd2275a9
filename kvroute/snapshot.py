"""What a router knows of engines, as a file: for when it starts again, or for another router.

A line that says what it is, a digest of the rest, and msgpack: the seed of our names, when it was taken, and
`Part`s of some hundred blocks each.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec
from xxhash import xxh3_128, xxh3_128_digest

from kvkeep.errors import ConfigError
from kvroute.events import BlockHash

__all__ = ["Part", "Saved", "find", "read", "sealed", "write"]

log = logging.getLogger("kvroute.snapshot")

_MAGIC = b"kvkeep route: index 1\n"
_HEAD = len(_MAGIC) + 16
_WAIT = 60.0
_MOST = 4096  # blocks of a part, which are taken over in one go


class Part(msgspec.Struct, array_like=True, gc=False):
    """Blocks of an engine's rank: its names, ours, and its names of those before them. `media`: levels as
    bits, none where only the name is known. `next`, `last`: the number of the message that was to come, and
    a digest of the one before."""

    engine: str
    rank: int
    next: int
    last: bytes
    group: tuple[bool, int] | None
    sizes: list[int]
    names: list[BlockHash]
    keys: list[int]
    befores: list[BlockHash | None]
    media: bytes


Saved = tuple[int, dict[tuple[str, int], list[bytes]]]
"""The seed, and packed `Part`s by engine and rank."""


def sealed(seed: int, parts: Sequence[bytes]) -> list[bytes]:
    """A whole file, in pieces."""
    encode, digest = msgspec.msgpack.encode, xxh3_128()
    head = b"\x93" + encode(seed) + encode(time.time()) + b"\xdd" + len(parts).to_bytes(4, "big")
    for piece in (head, *parts):
        digest.update(piece)
    return [_MAGIC, digest.digest(), head, *parts]


def write(path: Path, seed: int, parts: Sequence[bytes]) -> None:
    """Replace the file, all of it or nothing; only its owner may read it. Raises OSError."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.writelines(sealed(seed, parts))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read(data: bytes) -> Saved:
    """What a file says, all of it looked at; and logged, how much that is. Raises ConfigError."""
    if not data.startswith(_MAGIC):
        raise ConfigError("it is none, or of another version")
    rest, parts, blocks = memoryview(data)[_HEAD:], dict[tuple[str, int], list[bytes]](), 0
    if xxh3_128_digest(rest) != data[len(_MAGIC) : _HEAD]:
        raise ConfigError("it is damaged, or not whole")
    try:
        seed, taken, raws = msgspec.msgpack.decode(rest, type=tuple[int, float, list[msgspec.Raw]])
        for raw in map(bytes, raws):
            part = msgspec.msgpack.decode(raw, type=Part)
            counts = {len(part.names), len(part.keys), len(part.befores), len(part.media)}
            if len(counts) > 1 or max(counts) > _MOST or min([part.next, *part.sizes]) < 1:
                raise ConfigError("it contradicts itself")
            parts.setdefault((part.engine, part.rank), []).append(raw)
            blocks += len(part.names) - part.media.count(0)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"it is malformed ({error})") from error
    engines, minutes = len({engine for engine, _ in parts}), (time.time() - taken) / 60
    log.info("index of %d blocks of %d engines, %.0f minutes old", blocks, engines, minutes)
    return seed % (1 << 64), parts


async def find(source: str, session: aiohttp.ClientSession, key: str | None) -> Saved | None:
    """What is in a file, or known to the router at a URL; None, and logged, where that cannot be had."""
    try:
        if "://" in source:
            headers = {"Authorization": f"Bearer {key}"}
            wait = aiohttp.ClientTimeout(_WAIT, sock_connect=5)
            async with session.get(source, headers=headers, timeout=wait, raise_for_status=True) as answer:
                return read(await answer.read())
        return read(await asyncio.to_thread(Path(source).read_bytes))
    except FileNotFoundError:
        log.info("no index at %s yet", source)
    except (OSError, aiohttp.ClientError, asyncio.TimeoutError, ConfigError) as error:
        log.warning("the index at %s cannot be used, so nothing is known yet: %s", source, error)
    return None
