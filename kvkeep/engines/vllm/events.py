"""KV events: what this engine can load from its keeper, for those who route requests.

An engine announces the chunks that its own requests met, since only those can it describe: tokens, parent,
LoRA. What became of them the keeper says (`Connection.changes`); nothing is announced on a guess. Block
hashes are the engine's own, so that a chain may go on from blocks in its GPU cache into ours.
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    resolve_block_hashes,
    resolve_kv_cache_block_sizes,
    to_event_extra_keys,
)
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

from kvkeep.engines.link import Opened
from kvkeep.identity import KEY_BYTES, group_keys

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from kvkeep.engines.vllm.requests import Tracked

__all__ = ["Events", "events_wanted"]

_MEDIA = ((1, MEDIUM_CPU), (2, MEDIUM_STORAGE))  # bits as in kvkeep.keeper.journal
_BELOW = 2
_POLL_EVERY = 0.1  # seconds; sooner where a request met new chunks
_WAIT_FOR_COMMIT = 0.5
_MOST_ASKED = 4096
_MOST_KNOWN = 1 << 18

Hash = Any
"""vLLM's ExternalBlockHash: an integer of 64 bits, or bytes where the operator wants them."""


def events_wanted(vllm_config: VllmConfig) -> bool:
    """Whether the operator has switched KV events on."""
    config = vllm_config.kv_events_config
    return config is not None and bool(config.enable_kv_cache_events)


@dataclass(slots=True)
class Chunk:
    """One group's chunk as it is described to others."""

    group: int
    position: int
    hashes: list[Hash]
    """One per block of the engine."""
    parent: Hash | None
    tokens: array.array[int]
    lora: tuple[int, str] | None
    extra: list[tuple[Any, ...] | None] | None
    session: str | None
    media: int = 0
    """Where it has been announced: bits of _MEDIA."""


class Events:
    """All that one engine has announced, and is about to. The scheduler's thread."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_config: KVCacheConfig,
        *,
        most: int = _MOST_KNOWN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        specs = [group.kv_cache_spec for group in kv_config.kv_cache_groups]
        self._sizes = [int(spec.block_size) for spec in specs]
        self._kinds = [get_kv_cache_spec_kind(spec).value for spec in specs]
        self._windows = [get_kv_cache_spec_sliding_window(spec) for spec in specs]
        self._hash_tokens = resolve_kv_cache_block_sizes(kv_config, vllm_config)[1]
        self._most = most
        self._clock = clock
        self._known: dict[bytes, Chunk] = {}
        """By the keys of their groups; those met longest ago first."""
        self._ask: dict[bytes, None] = {}
        """Chunks of which the keeper has not said yet what they are."""
        self._out: list[KVCacheEvent] = []
        self._after = 0
        self._keeper: Opened | None = None
        self._polled = 0.0
        self._awaited: tuple[int, float] = (0, 0.0)
        self._pool: BlockPool | None = None

    def bind(self, pool: BlockPool) -> None:
        """The engine's own cache, which says when it wipes all that consumers know of this engine."""
        self._pool = pool

    def met(self, tracked: Tracked, namespace: bytes, chunk_tokens: int, first: int, last: int) -> None:
        """A request saves or finds chunks first … last-1."""
        base = tracked.keys(first, last)
        for group in range(len(self._sizes)) if base else ():
            named = group_keys(base, namespace, group).tobytes()
            for at in range(last - first):
                key = named[at * KEY_BYTES : (at + 1) * KEY_BYTES]
                chunk = self._known.pop(key, None)
                if chunk is None:
                    chunk = self._describe(tracked, group, first + at, chunk_tokens)
                    self._ask[key] = None
                self._known[key] = chunk
        while len(self._known) > self._most:
            key = next(iter(self._known))
            self._become(self._known[key], 0)
            del self._known[key]

    def awaiting(self, chunks: int) -> None:
        """So many chunks, of all groups, are being written: to be announced also if no request comes."""
        before = self._awaited[0] if self.pending else 0
        self._awaited = (before + chunks, self._clock() + _WAIT_FOR_COMMIT)

    @property
    def pending(self) -> bool:
        """Whether the engine should go on stepping until what it saved is announced; bounded."""
        return self._awaited[0] > 0 and self._clock() < self._awaited[1]

    def look_out(self) -> None:
        """Before each step: where the engine has wiped its own cache, consumers have forgotten ours too."""
        if self._pool is None or not any(
            isinstance(event, AllBlocksCleared) for event in self._pool.kv_event_queue
        ):
            return
        self._out.clear()
        for chunk in sorted(self._known.values(), key=lambda chunk: chunk.position):
            media, chunk.media = chunk.media, 0
            self._become(chunk, media)

    def forget(self) -> None:
        """Nothing that was met so far will be served again."""
        for chunk in self._known.values():
            self._become(chunk, 0)
        self._known.clear()
        self._ask.clear()

    def take(self, keeper: Opened | None) -> list[KVCacheEvent]:
        """Events since the last call. Raises KeeperUnavailable or RequestRefused."""
        if keeper is not self._keeper:
            self._change_keeper(keeper)
        now = self._clock()
        if keeper is not None and (self._ask or self.pending or now - self._polled >= _POLL_EVERY):
            self._polled = now
            self._poll(keeper)
        out, self._out = self._out, []
        return out

    def _change_keeper(self, keeper: Opened | None) -> None:
        """Without a keeper nothing can be loaded; another one is asked about all."""
        for chunk in self._known.values():
            self._become(chunk, 0)
        self._keeper, self._after = keeper, 0
        self._ask = dict.fromkeys(self._known)

    def _poll(self, keeper: Opened) -> None:
        asked = list(islice(self._ask, _MOST_ASKED))
        told = keeper.connection.changes(keeper.namespace, b"".join(asked), self._after)
        for key in asked:
            del self._ask[key]
        if not told.complete:
            self._ask |= dict.fromkeys(self._known)
        self._after = told.last
        for at, state in enumerate(told.states):
            self._is(told.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES], state)
        for key, state in zip(asked, told.now, strict=True):
            chunk = self._known.get(key)
            # Of what is not in memory the keeper does not say whether tiers have it.
            self._is(key, state or (chunk.media & _BELOW if chunk is not None else 0))

    def _is(self, key: bytes, state: int) -> None:
        chunk = self._known.get(key)
        if chunk is None:
            return
        if state & 1 and not chunk.media & 1:
            self._awaited = (max(0, self._awaited[0] - 1), self._awaited[1])
        self._become(chunk, state)

    def _become(self, chunk: Chunk, media: int) -> None:
        """Announce the difference between what was announced and what is."""
        came, went = media & ~chunk.media, chunk.media & ~media
        chunk.media = media
        for bit, medium in _MEDIA:
            if came & bit:
                self._out.append(self._stored(chunk, medium))
            elif went & bit:
                self._removed(chunk, medium)

    def _stored(self, chunk: Chunk, medium: str) -> BlockStored:
        lora_id, lora_name = chunk.lora or (None, None)
        return BlockStored(
            block_hashes=chunk.hashes,
            parent_block_hash=chunk.parent,
            token_ids=chunk.tokens.tolist(),
            block_size=self._sizes[chunk.group],
            lora_id=lora_id,
            medium=medium,
            lora_name=lora_name,
            extra_keys=chunk.extra,
            group_idx=chunk.group,
            kv_cache_spec_kind=self._kinds[chunk.group],
            kv_cache_spec_sliding_window=self._windows[chunk.group],
            session_id=chunk.session,
        )

    def _removed(self, chunk: Chunk, medium: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, BlockRemoved) and (last.medium, last.group_idx) == (medium, chunk.group):
            last.block_hashes.extend(chunk.hashes)
        else:
            self._out.append(BlockRemoved(list(chunk.hashes), medium, chunk.group))

    def _describe(self, tracked: Tracked, group: int, position: int, chunk_tokens: int) -> Chunk:
        request, size = tracked.request, self._sizes[group]
        start, per_chunk = position * chunk_tokens, chunk_tokens // size
        hashes = resolve_block_hashes(request.block_hashes, self._hash_tokens, size)
        first = position * per_chunk
        lora = request.lora_request
        return Chunk(
            group,
            position,
            [maybe_convert_block_hash(hashes[at]) for at in range(first, first + per_chunk)],
            maybe_convert_block_hash(hashes[first - 1]) if position else None,
            array.array("i", request.all_token_ids[start : start + chunk_tokens]),
            None if lora is None else (lora.adapter_id, lora.name),
            None if tracked.plain else _extra_keys(request, range(start, start + chunk_tokens, size), size),
            request.session_id,
        )


def _extra_keys(request: Request, starts: Sequence[int], size: int) -> list[tuple[Any, ...] | None] | None:
    """Per block, as the engine's own events have them."""

    def walk() -> Iterator[tuple[Any, ...] | None]:
        image = 0
        for start in starts:
            keys, image = generate_block_hash_extra_keys(request, start, start + size, image)
            yield keys

    keys: list[tuple[Any, ...] | None] | None = to_event_extra_keys(list(walk()))
    return keys
