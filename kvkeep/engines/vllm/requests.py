"""What the scheduler side knows of each request: its chain of keys, its claim, how far it is saved."""

from __future__ import annotations

import logging
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from kvkeep.engines.vllm.handover import Awaited, handed_over
from kvkeep.identity import ChainHasher, encode_extra, file_digest, tenant_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["Tracked"]

log = logging.getLogger("kvkeep.vllm")

_MOST_STATE = 512  # characters that W3C wants tracestate to be handed on with; a longer one may be left out
_first_seen: dict[int, str] = {}
"""Digest of each adapter's files when its number was first used here; empty once they were found replaced."""


class Tracked:
    """One request that the engine works on. Owned by the scheduler side."""

    def __init__(
        self, request: Request, namespace: bytes, chunk_tokens: int, hands_over: bool = True
    ) -> None:
        self.request = request
        self._hasher = ChainHasher(namespace, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._mm_index = 0
        self.cacheable = True
        self.tenant = tenant_of(request.cache_salt)
        # vLLM passes its trace on where it traces itself (--otlp-traces-endpoint).
        headers = request.trace_headers or {}
        parent, state = headers.get("traceparent", "")[:64], headers.get("tracestate", "")
        self.trace = f"{parent} {state}" if parent and 0 < len(state) <= _MOST_STATE else parent
        params = request.kv_transfer_params if hands_over else None
        self.awaited = Awaited.of(params)
        self.handed_over = handed_over(params)
        """Another engine goes on with it."""
        self.epoch = 0
        """The request's place in the keeper's time; children of its chain are older than parents."""
        self.load_failed = False
        """The engine computes it: what it waited for did not come, and is not offered again."""
        self.next_save = 0
        """First chunk that has not been offered to the keeper yet."""
        self.kept = 0
        """Leading chunks of which the keeper refused none."""
        self.forget_claim()

    @property
    def plain(self) -> bool:
        """Whether its tokens alone say what its KV is. An update of a streamed prompt may bring media."""
        request = self.request
        more = request.lora_request or request.cache_salt or request.mm_features
        return not more and request.prompt_embeds is None

    def forget_claim(self) -> None:
        """No lease is held: nothing was found, it was handed to the workers, or its keeper is gone."""
        self.lease = 0
        self.asked = (-1, -1)
        self.first = 0
        self.found = 0
        self.offsets: list[npt.NDArray[np.int64]] = []
        self.ticket = 0
        """Not 0: tiers may have more; the engine is told to ask again."""
        self.since = 0.0
        """When that began, by the monotonic clock."""
        self.patience = 0.0
        self.stage = 0
        """How far it is: 0 asking the tiers, 1 reading, 2 done."""

    def loaded(self) -> None:
        """What was found is being loaded: saves go on behind it. Of a prompt that another engine goes on with
        all is offered still, since the keeper may lack what this engine had in its own cache."""
        if not self.handed_over:
            self.next_save = max(self.next_save, self.first + self.found)

    def keys(self, first: int, last: int) -> bytes:
        """Keys of chunks first … last-1; hashes what has not been hashed yet.

        Marks the request as not cacheable, and returns b"", if an id or an extra key has no canonical form.
        """
        if last > self._hasher.chunks:
            start = self._hasher.chunks * self._chunk_tokens
            tokens = self.request.all_token_ids[start : last * self._chunk_tokens]
            try:
                self._hasher.extend(tokens, None if self.plain else self._extras(self._hasher.chunks, last))
            except (TypeError, OSError, struct.error) as error:
                log.warning("request %s is not cached: %s", self.request.request_id, error)
                self.cacheable = False
        return self._hasher.keys(first, last) if self.cacheable else b""

    def _extras(self, first: int, last: int) -> list[bytes | None]:
        """The engine's own extra keys per chunk: LoRA, cache salt, multimodal content, embeddings."""
        out: list[bytes | None] = []
        for chunk in range(first, last):
            start = chunk * self._chunk_tokens
            extra, self._mm_index = generate_block_hash_extra_keys(
                self.request, start, start + self._chunk_tokens, self._mm_index
            )
            if chunk == 0 and self.request.lora_request is not None:
                # An adapter can be replaced under its name and path: its content counts too.
                lora = self.request.lora_request
                content = _loaded(lora.lora_int_id, lora.lora_path)
                self.cacheable &= bool(content)
                extra = (*(extra or ()), content)
            out.append(None if extra is None else encode_extra(extra))
        return out


def _loaded(number: int, path: str) -> str:
    """What the engine computes with under an adapter's number: what was there when it was first used. It does
    not read a known number's files again, whatever the path, until it has evicted them: once they were
    others it may hold either. Empty then, with one warning."""
    now = _adapter(path)
    first = _first_seen.setdefault(number, now)
    if first not in ("", now):
        log.warning("LoRA adapter %d in %s was replaced since its first use; it is not cached", number, path)
        _first_seen[number] = ""
    return _first_seen[number]


def _adapter(path: str) -> str:
    """Digest of an adapter's files. On the engine's loop, for each request: a listing, and a stat of each."""
    try:
        with os.scandir(path) as entries:
            states = [(Path(entry.path), entry.stat()) for entry in entries if entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return "by name"
    return _adapter_digest(tuple(sorted((file, state.st_mtime_ns, state.st_size) for file, state in states)))


@lru_cache(maxsize=256)
def _adapter_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    return file_digest([file for file, _, _ in files])
