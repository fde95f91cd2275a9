"""Who reads KV events, as strict as the strictest of those that exist: see docs/events.md."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

_decoder = msgspec.msgpack.Decoder(KVEventBatch)


class Consumer:
    """An index of one engine's blocks, by medium and group. Refuses what a real one drops or takes ill."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.held: dict[tuple[str | None, int | None], dict[int, int | None]] = {}
        """Per medium and group, each block's parent."""
        self.tokens: dict[int, list[int]] = {}
        """Per block that was ever announced, its tokens."""
        self.events: list[Any] = []

    def read(self, payload: bytes) -> None:
        """One message, as vLLM's publisher sends it."""
        for event in _decoder.decode(payload).events:
            self.events.append(event)
            match event:
                case BlockStored():
                    self._stored(event)
                case BlockRemoved():
                    self._removed(event)
                case AllBlocksCleared():
                    self.held.clear()

    def prefix(self, tokens: list[int], *media: str, group: int = 0) -> int:
        """How many leading tokens of a prompt are held in these media, going from one to the other."""
        parent, length = None, 0
        while True:
            block = tokens[length : length + self.block_size]
            found = [
                key
                for medium in media
                for key, before in self.held.get((medium, group), {}).items()
                if before == parent and self.tokens[key] == block
            ]
            if not found or len(block) < self.block_size:
                return length
            parent, length = found[0], length + self.block_size

    def _stored(self, event: BlockStored) -> None:
        assert event.block_size == self.block_size
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        parent = event.parent_block_hash
        assert parent is None or parent in self.tokens, "a parent that nobody has heard of"
        held = self.held.setdefault((event.medium, event.group_idx), {})
        for at, key in enumerate(event.block_hashes):
            assert isinstance(key, int)
            assert 0 <= key < 2**64
            block = event.token_ids[at * event.block_size : (at + 1) * event.block_size]
            assert self.tokens.setdefault(key, block) == block
            if event.medium != "GPU":  # vLLM announces a block again where it holds it twice
                assert key not in held, "announced twice"
            held[key] = parent
            parent = key

    def _removed(self, event: BlockRemoved) -> None:
        held = self.held.get((event.medium, event.group_idx), {})
        for key in event.block_hashes:
            assert key in held, "removed, and was never announced"
            del held[key]
