"""`kvkeep serve --record FILE`: what is asked of a keeper, for `kvkeep bench simulate`. Lengths and ids only.

A line per request, in the format of Mooncake's public traces with some more fields (docs/sizing.md). An id
is a digest of the chunk's key under a random salt that is drawn at each start and written nowhere: keys
alone are digests of token ids, so that whoever guesses a text could tell whether it is in the file.

The event loop only notes references to keys, up to a bound; a thread makes lines of them, twice a second.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from blake3 import blake3

from kvkeep.errors import ConfigError
from kvkeep.identity import KEY_BYTES

__all__ = ["FILE_BYTES", "Recorder"]

log = logging.getLogger("kvkeep.keeper")

FILE_BYTES = 256 << 20
"""At this size a file becomes FILE.1, in the place of an older one, and a new one is begun."""
_MOST_NOTED = 64 << 20  # bytes; requests that come on top are not recorded
_REQUEST_BYTES = 512  # that a request takes beside its keys
_HOLD = 60.0  # seconds that a line waits for what its request saves of its answer
_EVERY = 0.5
_ID_BYTES = 6  # numbers of 48 bits: JSON's readers take 53 without loss
_AT_ONCE = 32  # digests, about 40 µs, between which the event loop can have the interpreter


class _Space(NamedTuple):
    number: int
    chunk_tokens: int
    chunk_bytes: int


@dataclass
class _Request:
    at: float
    space: _Space
    keys: bytes
    local: int
    epoch: int
    output: bytes = b""


class Recorder:
    """Writes one file. `opened`, `looked_up` and `saved` are the event loop's, `drain` is the thread's.

    What both touch are single operations on deques, dicts and bytes, whole under the interpreter's lock.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin FILE; one that is there becomes FILE.1. Raises ConfigError where it cannot be written."""
        self._path, self._clock, self._began = Path(path), clock, clock()
        self._salt = secrets.token_bytes(32)
        self._spaces = dict[int, _Space]()
        self._requests = deque[_Request]()
        self._by_epoch = dict[int, _Request]()
        self._noted = self._taken = 0  # bytes, each counted by one side alone
        self._lines = self._dropped = self._size = 0
        self._recording = True  # until it cannot write
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvkeep-record", daemon=True)
        try:
            self._fd = self._begin()
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error.strerror}") from error

    def opened(self, number: int, chunk_tokens: int, chunk_bytes: int) -> None:
        """A namespace; one whose engine does not tell its tokens per chunk (0) is not recorded."""
        if chunk_tokens:
            self._spaces[number] = _Space(number, chunk_tokens, chunk_bytes)

    def looked_up(self, space: int, keys: bytes, local: int, epoch: int) -> None:
        """A request has asked for chunks, for the first time; `epoch` stands for it."""
        if not self._recording or space not in self._spaces:
            return
        if self._noted - self._taken > _MOST_NOTED:
            self._dropped += 1
            return
        request = _Request(self._clock(), self._spaces[space], keys, local, epoch)
        self._noted += len(keys) + _REQUEST_BYTES
        self._requests.append(request)
        self._by_epoch[epoch] = request

    def saved(self, epoch: int, first: int, keys: bytes) -> None:
        """A request has offered chunks first, first+1, … of its chain: behind the prompt are its answer's."""
        request = self._by_epoch.get(epoch)
        if request is not None:
            start = len(request.keys) + len(request.output) - KEY_BYTES * first
            if 0 <= start < len(keys):
                request.output += keys[start:]
                self._noted += len(keys) - start

    def figures(self) -> dict[str, object]:
        """What `kvkeep status --json` shows."""
        on = self._recording
        return {"file": str(self._path), "recording": on, "lines": self._lines, "dropped": self._dropped}

    def start(self) -> None:
        """Begin to write in the background."""
        self._thread.start()

    def close(self) -> None:
        """Write all that is known, and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.drain(everything=True)
        os.close(self._fd)

    def _work(self) -> None:
        while not self._stop.wait(_EVERY):
            self.drain()

    def drain(self, everything: bool = False) -> None:
        """Write the lines that are due."""
        due = self._clock() - _HOLD
        while self._requests and (
            everything or self._requests[0].at < due or self._noted - self._taken > _MOST_NOTED // 2
        ):
            request = self._requests.popleft()
            self._by_epoch.pop(request.epoch, None)
            self._taken += len(request.keys) + len(request.output) + _REQUEST_BYTES
            if self._recording:
                self._write(request)

    def _write(self, request: _Request) -> None:
        ids, output = self._ids(request.keys), self._ids(request.output)
        number, tokens, nbytes = request.space
        line = {
            "timestamp": round(1000 * (request.at - self._began)),
            "input_length": tokens * len(ids),
            "output_length": tokens * len(output),
            "hash_ids": ids,
            "output_ids": output,
            "local": min(request.local, len(ids)),
            "block_tokens": tokens,
            "block_bytes": nbytes,
            "namespace": number,
        }
        try:
            self._append(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            self._recording = False
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)  # no half a line
            log.warning("%s: %s: nothing more is recorded", self._path, error.strerror)

    def _ids(self, keys: bytes) -> list[int]:
        ids = list[int]()
        for at in range(0, len(keys), KEY_BYTES):
            if len(ids) % _AT_ONCE == 0:
                time.sleep(0)
            digest = blake3(keys[at : at + KEY_BYTES], key=self._salt).digest(_ID_BYTES)
            ids.append(int.from_bytes(digest, "little"))
        return ids

    def _append(self, line: bytes) -> None:
        if self._size + len(line) > FILE_BYTES:
            full, self._fd = self._fd, self._begin()
            os.close(full)
        if os.write(self._fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(line)
        self._lines += 1

    def _begin(self) -> int:
        if self._path.is_file():  # nothing else is moved out of the way
            self._path.rename(f"{self._path}.1")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        self._size = 0
        return fd
