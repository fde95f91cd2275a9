"""Chunks as objects of an S3-compatible store, one object per value, through obstore (Rust, no GIL).

Objects are named `prefix/<namespace>/<chunk>`. A put is sent from the caller's buffer (values of one
part; larger ones pass through the library's part buffers once). A get is gathered by the library and
copied once more, into the caller's buffer, by our threads, which may do so only until the verb ends.
The store has no bound that we could keep: whoever owns the bucket sets lifecycle rules.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import (
    KEY_BYTES,
    Buffer,
    Capabilities,
    Got,
    Key,
    Listing,
    Put,
    Tier,
    key_name,
)
from kvkeep.tiers.calls import Calls, Gate
from kvkeep.tiers.url import TierURL

__all__ = ["S3Options", "S3Tier", "open_s3"]

_R = TypeVar("_R")
_NAME = re.compile("([0-9a-f]{16})/([0-9a-f]{32})")
_LEAST_PART = 5 << 20  # S3 refuses smaller parts, except the last
_PARTS_AT_ONCE = 4  # of one value; each holds a part's memory in the library
_GIVE_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or profile="
_ERRORS = (BaseError, OSError, ValueError)  # what obstore raises; FileNotFoundError is an OSError


@dataclass(frozen=True)
class S3Options:
    """Where the objects are, and how they are moved."""

    bucket: str
    prefix: str
    """Without slashes at its ends."""
    timeout: float
    """Seconds that one request may take, its body included."""
    part: int
    """Bytes; values longer than this are put and read in parts of this size, side by side."""
    concurrency: int
    """Requests at once: so many that read, and as many that write, so that none waits behind the other."""


class _Piece(NamedTuple):
    """What one GET brings: bytes [start, end) of the value of `keys[place]`."""

    place: int
    start: int
    end: int


class S3Tier(Tier, Listing):
    """One bucket. Owns its threads; the library owns the connections."""

    capabilities = Capabilities(shared=True, persistent=True, concurrency=4)
    overlaps = True

    def __init__(self, store: S3Store, options: S3Options) -> None:
        self._store, self._options = store, options
        self._reads, self._writes = (Calls("s3", options.concurrency, queues=True) for _ in range(2))

    def probe(self) -> None:
        """Ask for an object that nobody has. Raises ConfigError where that is not simply absent."""
        bucket = f"bucket {self._options.bucket!r}"
        try:
            obstore.get(self._store, self._path(random.randbytes(KEY_BYTES)))
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ConfigError(f"{bucket} does not exist: create it, or correct the URL") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise ConfigError(
                f"{bucket} refuses us: {_why(error)}: {_GIVE_CREDENTIALS}; they need s3:GetObject, "
                "s3:PutObject, s3:DeleteObject, and s3:ListBucket (without that one a missing object "
                "reads as a forbidden one)"
            ) from error
        except _ERRORS as error:
            if "/latest/" in str(error).partition(" in ")[0]:  # the instance's metadata, the chain's end
                raise ConfigError(f"no credentials for {bucket}: {_GIVE_CREDENTIALS}") from error
            raise ConfigError(
                f"{bucket} cannot be reached: {_why(error)}: are endpoint= and region= right?"
            ) from error

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        return self._reads.each(self._head, keys)

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        """As the interface says. Parts of two versions of one value are a MISS."""
        part, gate = self._options.part, Gate()
        pieces = [_Piece(place, 0, min(part, len(buffer))) for place, buffer in enumerate(buffers)]

        def read(piece: _Piece) -> tuple[Got, str | None]:
            return self._read(keys[piece.place], buffers[piece.place], piece, gate)

        try:
            firsts = self._reads.each(read, pieces)
            rest = [
                _Piece(place, start, min(start + part, len(buffer)))
                for place, (buffer, (got, _)) in enumerate(zip(buffers, firsts, strict=True))
                if got is Got.HIT
                for start in range(part, len(buffer), part)
            ]
            others = self._reads.each(read, rest)
        finally:
            gate.shut()
        results = [got for got, _ in firsts]
        for piece, other in zip(rest, others, strict=True):
            if other != firsts[piece.place]:
                results[piece.place] = Got.MISS
        for place in {piece.place for piece in rest}:
            if results[place] is Got.HIT and not self.check_value(keys[place], buffers[place]):
                results[place] = Got.DAMAGED
        return results

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        """As the interface says. Requests under way are waited for whatever happens, since they read the
        buffers: for `timeout` at most."""
        pairs = list(zip(keys, buffers, strict=True))
        self._writes.each(lambda pair: self._write(*pair), pairs, wait_for_all=True)
        return [Put.STORED] * len(keys)

    def delete(self, keys: Sequence[Key]) -> None:
        paths = [self._path(key) for key in keys]
        if paths:
            self._writes.run(lambda: self._asked(lambda: obstore.delete(self._store, paths)))

    def keys(self) -> Iterator[tuple[Key, int]]:
        """All objects under the prefix that have a name of ours."""
        prefix = self._options.prefix
        pages = iter(obstore.list(self._store, prefix or None, chunk_size=1000))
        while page := self._reads.run(lambda: self._asked(lambda: next(pages, None))):
            for found in page:
                named = _NAME.fullmatch(found["path"].removeprefix(prefix).lstrip("/"))
                if named is not None:
                    yield bytes.fromhex(named[1] + named[2]), found["size"]

    def peek(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        """A get: the store does not mind."""
        return self.get(keys, buffers)

    def close(self) -> None:
        self._reads.close(0)
        self._writes.close(0)

    def _path(self, key: Key) -> str:
        return f"{self._options.prefix}/{key_name(key)}".lstrip("/")

    def _head(self, key: Key) -> bool:
        return self._asked(lambda: obstore.head(self._store, self._path(key))) is not None

    def _read(self, key: Key, buffer: Buffer, piece: _Piece, gate: Gate) -> tuple[Got, str | None]:
        """Bring one piece; also the version that it is of."""
        whole = len(buffer) <= self._options.part
        options: Any = None if whole else {"range": (piece.start, piece.end)}
        found = self._asked(lambda: obstore.get(self._store, self._path(key), options=options))
        if found is None:
            return Got.MISS, None
        if found.meta["size"] != len(buffer):
            return Got.DAMAGED, None  # its body is not read
        value = self._asked(found.bytes)
        if value is None or len(value) != piece.end - piece.start:
            return Got.MISS, None
        if whole and not self.check_value(key, memoryview(value)):
            return Got.DAMAGED, None
        with gate.passing() as may:
            if may:
                into = np.frombuffer(buffer, np.uint8)[piece.start : piece.end]
                into[:] = np.frombuffer(memoryview(value), np.uint8)  # without the GIL
        return Got.HIT, found.meta["e_tag"]

    def _write(self, key: Key, buffer: Buffer) -> None:
        part = self._options.part
        self.seal_value(key, buffer)
        with _lent(buffer, self._options.timeout) as view:
            try:
                obstore.put(
                    self._store,
                    self._path(key),
                    view,
                    use_multipart=len(buffer) > part,
                    chunk_size=part,
                    max_concurrency=_PARTS_AT_ONCE,
                )
            except _ERRORS as error:
                raise TierUnavailable(f"s3: {_why(error)}") from error

    def _asked(self, request: Callable[[], _R]) -> _R | None:
        """What a request brings; None where there is no such object. Raises TierUnavailable."""
        try:
            return request()
        except FileNotFoundError:
            return None
        except _ERRORS as error:
            raise TierUnavailable(f"s3: {_why(error)}") from error


@contextmanager
def _lent(buffer: Buffer, patience: float) -> Iterator[Buffer]:
    """A view for the library that is certainly given back: after a request that was given up, its
    connection holds the view for a millisecond or so. Raises TierUnavailable after `patience` seconds."""
    view = memoryview(buffer)
    try:
        yield view
    finally:
        deadline = time.monotonic() + patience
        while not _released(view):
            if time.monotonic() > deadline:
                raise TierUnavailable("s3: the library does not let go of a buffer")
            time.sleep(0.001)


def _released(view: Buffer) -> bool:
    try:
        view.release()
    except BufferError:
        return False
    return True


def _why(error: Exception) -> str:
    """The reason in an error of obstore's, which is a page of text: S3's own words where there are some."""
    text, _, debug = str(error).partition("\n\nDebug source")
    code, message = re.search("<Code>(.*?)</Code>", text), re.search("<Message>(.*?)</Message>", text)
    if code is not None:
        return f"{code[1]}: {message[1]}" if message is not None else code[1]
    kind = re.search(r"kind: (Connect|Timeout)", debug)
    said = {"Connect": "cannot connect", "Timeout": "no answer in time"}.get(kind[1]) if kind else None
    where = re.search(r"https?://[^/\s]+", text)
    if said:
        return f"{said} ({where[0]})" if where else said
    return " ".join(text.split())[:300]


def open_s3(url: TierURL) -> S3Tier:
    """A tier from `s3://bucket/prefix?endpoint=…`; see docs/tiers-s3.md. Raises ConfigError."""
    options = S3Options(
        bucket=url.netloc.rpartition("@")[2],  # as written: a URL's host is in lower case
        prefix=url.path.strip("/"),
        timeout=url.take_timeout(5.0),
        part=url.take_bytes("part", 16 << 20) or 0,
        concurrency=url.take_count("concurrency", 16),
    )
    if not options.bucket or ":" in options.bucket:
        raise ConfigError(f"{url}: write it as s3://bucket/prefix; a host and port go into endpoint=")
    if options.part < _LEAST_PART:
        raise ConfigError(f"{url}: part must be {_LEAST_PART >> 20} MiB or more, as S3 asks")
    try:
        store = S3Store(options.bucket, **store_arguments(url, options))
        tier = S3Tier(store, options)
    except _ERRORS as error:
        raise ConfigError(f"{url}: {_why(error)}") from error
    try:
        tier.probe()
    except ConfigError as error:
        tier.close()
        raise ConfigError(f"{url}: {error}") from error
    return tier


def store_arguments(url: TierURL, options: S3Options) -> dict[str, Any]:
    """What obstore is told. What is not named here it takes from the usual AWS_ variables."""
    endpoint = url.take("endpoint", str, "").rstrip("/")
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        raise ConfigError(f"{url}: write endpoint=http://host:port or https://host")
    patience = timedelta(seconds=options.timeout)
    told: dict[str, Any] = {
        "client_options": {
            "allow_http": endpoint.startswith("http://"),
            "timeout": patience,
            "connect_timeout": patience,
            "pool_max_idle_per_host": str(options.concurrency * (1 + _PARTS_AT_ONCE)),
        },
        "retry_config": {"max_retries": 0},  # the guard around the tier retries, and knows when to stop
        "unsigned_payload": not url.take_flag("sign_payload", False),
        "disable_bulk_delete": not url.take_flag("bulk_delete", True),
    }
    if not url.take_flag("path_style", bool(endpoint)):
        told["virtual_hosted_style_request"] = True
        endpoint = endpoint.replace("://", f"://{options.bucket}.", 1)
    if endpoint:
        told["endpoint"] = endpoint
    if region := url.take("region", str, ""):
        told["region"] = region
    profile = url.take("profile", str, "")
    if url.user is not None:
        if not url.password or profile:
            raise ConfigError(f"{url}: give key and secret together, and no profile= beside them")
        told |= {"access_key_id": url.user, "secret_access_key": url.password}
    elif profile:
        told["credential_provider"] = _of_profile(profile)
    return told


def _of_profile(name: str) -> Any:
    """Credentials of a named profile, with all that boto3 knows of (SSO, assumed roles, …)."""
    try:
        from boto3.session import Session
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise ConfigError("profile= needs boto3: pip install boto3") from error
    try:
        return Boto3CredentialProvider(Session(profile_name=name))
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"profile {name!r}: {error}") from error
