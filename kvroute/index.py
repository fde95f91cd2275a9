"""Which engine holds which prefix, from its KV events.

Engines name blocks by hashes of their own, which differ between versions, seeds and settings. So the index
names them anew: a block's key is a hash of its tokens, seeded with the key of the block before it, so equal
keys mean equal prefixes whoever computed them. Per engine a table leads from its hashes to these keys; per
medium another one from keys to the engines that hold them, as bits. A lookup hashes the prompt once per
block size and follows the chain while any engine is left.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain as chained
from itertools import islice
from typing import Any

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from kvroute.chain import Tokens, chain, encoded, packed, pieces
from kvroute.events import BlockHash, Cleared, Event, Removed, Stored
from kvroute.holders import LEVELS, Holders
from kvroute.snapshot import Part

__all__ = ["MEDIA", "Held", "Index"]

MEDIA = {
    **dict.fromkeys(("GPU", "DEVICE"), 0),
    **dict.fromkeys(("CPU", "CPU_PINNED", "CPU_TIER1"), 1),
    **dict.fromkeys(("STORAGE", "DISK", "NVME", "CPU_TIER2", "EXTERNAL", "NETWORK", "REMOTE", "SHARED"), 2),
}
"""Level of each medium that is known, in upper case. Others count as storage, none as GPU."""

_Block = tuple[int, BlockHash | None]
"""Our key of a block, and the engine's name of the one before it."""

_MOST_SIZES = 16  # block sizes per engine; vLLM also tells of blocks that are not full
_SWEPT = 256  # blocks that each call of `apply` takes off who is gone or cleared
_AT_ONCE = 1024  # and that are forgotten together
_WHOLE = ("full_attention", "mla_attention", "sink_full_attention", None)


class Held(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a prompt's prefix that one engine holds, by the slowest medium that they take.

    `gpu`: how far its GPU's blocks reach; `cpu`: how much further with those of its CPU; `storage`: and with
    all that it can read. An engine loads what follows the blocks on its GPU, so one further on does not count
    before those in between are there.
    """

    gpu: int
    cpu: int
    storage: int

    @property
    def tokens(self) -> int:
        """Length of the prefix, all media together."""
        return self.gpu + self.cpu + self.storage


class _Engine:
    """One engine, or one of its data-parallel ranks: its slot, its names of blocks, and those whose KV it has
    dropped (ghosts) or that we have lost sight of and not swept yet (past)."""

    def __init__(self, name: str, ghosts: int, slot: int) -> None:
        self.name, self.slot = name, slot
        self.held: dict[BlockHash, _Block] = {}
        self.ghosts: dict[BlockHash, _Block] = {}
        self.past: list[dict[BlockHash, _Block]] = []
        self.most_ghosts = ghosts
        self.sizes: set[int] = set()
        self.group: tuple[bool, int] | None = None  # the KV-cache group that stands for all

    def block(self, name: BlockHash | None) -> _Block | None:
        """A block that it holds or held."""
        if name is None:
            return None
        found = self.held.get(name) or self.ghosts.get(name)
        return found or next((one[name] for one in self.past if name in one), None)

    def drop(self, name: BlockHash, block: _Block) -> None:
        """It holds that one no more; its name is remembered for a while."""
        if self.most_ghosts:
            self.ghosts[name] = block
        if len(self.ghosts) > self.most_ghosts + _AT_ONCE:
            for old in list(islice(self.ghosts, _AT_ONCE)):
                del self.ghosts[old]


class Index:
    """Not locked: one thread, or one event loop, owns it. No call takes long, however much an engine held:
    one that is cleared gets another slot, and its blocks are taken off the old one a few at a time.

    `most_blocks` bounds what it remembers, over all engines: beyond it the engine with the most forgets its
    oldest blocks. `ghosts`: names of dropped blocks remembered per engine, at least. What it says is never
    more than the events said; with some of them lost it may be less.
    """

    def __init__(self, most_blocks: int = 4_000_000, ghosts: int = 4096) -> None:
        self.orphans = 0
        """Stored blocks passed over, because the block before them is not known."""
        self.refused = 0
        """Events passed over because they contradict themselves."""
        self.forgotten = 0
        """Blocks forgotten to stay within `most_blocks`."""
        self._most_blocks, self._ghosts = most_blocks, ghosts
        self._blocks = 0
        self._engines: dict[str, dict[int, _Engine]] = {}  # by name and rank
        self._nodes: dict[str, str] = {}
        self._past: deque[tuple[_Engine, int, dict[BlockHash, _Block]]] = deque()
        self._holders = Holders()
        self.seed = secrets.randbits(64)
        """Of our names, so that nobody can make prompts whose keys collide. To be set before all else."""
        self._sizes: tuple[int, ...] = ()

    # What is held

    def lookup(
        self, tokens: Tokens, lora: str | None = None, extra: Sequence[Any] | str | None = None
    ) -> dict[str, Held]:
        """How much of a prompt's prefix each engine holds; engines that hold none of it are left out. Of an
        engine with several ranks the best counts.

        `tokens`: ids, a list or an array of them. `lora`: the adapter's name. `extra`: what else the prompt
        is keyed by, its cache salt. Raises OverflowError or TypeError on what is no token id.
        """
        data, (root, first) = packed(tokens), self._beginning(lora, extra)
        if not self._sizes:
            return {}
        found = [self._holders.walk(data, size, root, first) for size in self._sizes]
        reach = np.maximum.reduce(found) if len(found) > 1 else found[0]
        slots = reach[-1].nonzero()[0]
        near, middle, most = reach[:, slots]
        held = list(map(Held, near.tolist(), (middle - near).tolist(), (most - middle).tolist()))
        names = list(map(self._holders.names.__getitem__, slots.tolist()))
        result = dict(zip(names, held, strict=True))
        if len(result) < len(held):  # several ranks of one engine
            for name, one in zip(names, held, strict=True):
                if result[name].tokens < one.tokens:
                    result[name] = one
        return result

    def _beginning(self, lora: str | None, extra: Sequence[Any] | str | None) -> tuple[int, bytes]:
        return self._root(lora), encoded([extra] if isinstance(extra, str) else extra)

    # What is told

    def apply(self, engine: str, events: Iterable[Event], rank: int = 0) -> None:
        """Take over the events of an engine, or of one of its ranks, in its order."""
        known = self._engine(engine, rank)
        for event in events:
            if isinstance(event, Stored):
                self._store(known, event)
            elif isinstance(event, Removed):
                self._remove(known, event)
            elif isinstance(event, Cleared):
                self._empty(known)
        self._sweep(_SWEPT)

    def hold(self, engine: str, tokens: Tokens, size: int, lora: str | None, extra: str | None) -> list[int]:
        """A prompt's whole blocks are on the engine's GPU. Returns our names, which are its own too."""
        keys = [key for some in pieces(packed(tokens), size, *self._beginning(lora, extra)) for key in some]
        known = self._engine(engine, 0)
        self._learn(known, size)
        self._take(known, 0, keys, keys, None)
        self._sweep(_SWEPT)
        return keys

    def place(self, engine: str, node: str | None) -> None:
        """The engine reads what the others of that node have on a CPU or in storage; None: nobody's."""
        self._nodes.pop(engine, None)
        if node is not None:
            self._nodes[engine] = node
            self._engine(engine, 0)  # it has something to read before it has told anything
        self._pair()

    def clear(self, engine: str, rank: int = 0) -> None:
        """What it holds is not known any more; its names of blocks stay, for what it stores from now on."""
        if known := self._engines.get(engine, {}).get(rank):
            self._empty(known)

    def forget(self, engine: str, rank: int | None = None) -> None:
        """The engine is gone, or was started anew: all its ranks, or one."""
        ranks = self._engines.get(engine, {})
        for number in list(ranks) if rank is None else [rank] if rank in ranks else []:
            known = ranks.pop(number)
            known.most_ghosts = 0
            self._retire(known)
        if not ranks:
            self._engines.pop(engine, None)
        if engine in self._nodes:
            self._engine(engine, 0)
        self._learn_sizes()

    def parts(self, engine: str, rank: int, next: int, last: bytes) -> Iterator[Part]:
        """What a rank holds, for a snapshot, some at a time. Events may be applied in between, and are to be
        applied again, from `next` on, to what was restored."""
        known = self._engines.get(engine, {}).get(rank)
        if known is None:
            return
        slot, blocks = known.slot, chained(known.ghosts.copy().items(), known.held.copy().items())
        while known.slot == slot and (some := list(islice(blocks, _AT_ONCE))):  # else it holds nothing now
            names, keys = [name for name, _ in some], [key for _, (key, _) in some]
            media = bytes([self._holders.media(key, slot) for key in keys])
            befores = [before for _, (_, before) in some]
            yield Part(engine, rank, next, last, known.group, [*known.sizes], names, keys, befores, media)

    def restore(self, part: Part) -> None:
        """Take over a part of a snapshot, made with the same seed; that it is still true is the caller's."""
        known = self._engine(part.engine, part.rank)
        known.group = part.group
        for size in part.sizes:
            self._learn(known, size)
        for name, key, before, media in zip(part.names, part.keys, part.befores, part.media, strict=True):
            for level in range(LEVELS):
                if media >> level & 1:
                    self._put(known, level, name, (key, before))
            if not media:
                known.drop(name, (key, before))
        self._shrink()

    def blocks(self, engine: str) -> int:
        """How many blocks the engine holds, as far as is known."""
        return sum(len(one.held) for one in self._engines.get(engine, {}).values())

    def engines(self) -> list[str]:
        """Engines that have told something."""
        return list(self._engines)

    def _all(self) -> Iterator[_Engine]:
        return (one for ranks in self._engines.values() for one in ranks.values())

    def _engine(self, name: str, rank: int) -> _Engine:
        ranks = self._engines.setdefault(name, {})
        if rank not in ranks:
            ranks[rank] = _Engine(name, self._ghosts, self._holders.seat(name))
            self._pair()
        return ranks[rank]

    def _retire(self, engine: _Engine) -> None:
        """It holds nothing any more, and is swept by and by."""
        self._holders.retire(engine.slot)
        self._past.append((engine, engine.slot, engine.held))
        engine.past.append(engine.held)
        engine.held, engine.slot = {}, -1

    def _empty(self, engine: _Engine) -> None:
        engine.most_ghosts = max(engine.most_ghosts, len(engine.held))
        if engine.held:
            self._retire(engine)
            engine.slot = self._holders.seat(engine.name)
            self._pair()

    def _sweep(self, count: int) -> None:
        """Take some blocks off the slots of those that were retired."""
        while self._past and count > 0:
            engine, slot, held = self._past[0]
            for _ in range(min(count, len(held))):
                name, block = held.popitem()
                self._holders.drop_all(block[0], slot)
                if name not in engine.held:
                    engine.drop(name, block)
                count -= 1
                self._blocks -= 1
            if not held:
                self._past.popleft()
                engine.past.pop(0)
                self._holders.free(slot)

    def _pair(self) -> None:
        nodes: dict[str, list[int]] = {}
        for engine in self._all() if self._nodes else ():
            if node := self._nodes.get(engine.name):
                nodes.setdefault(node, []).append(engine.slot)
        self._holders.pair(list(nodes.values()))

    def _store(self, engine: _Engine, event: Stored) -> None:
        if not self._stands(engine, (event.kv_cache_spec_kind not in _WHOLE, event.group_idx or 0)):
            return
        level = _level(event.medium)
        if len(event.token_ids):
            keys = self._keys(engine, event)
        else:
            keys = [block and block[0] for block in map(engine.block, event.block_hashes)]
        self.orphans += keys.count(None)
        self._take(engine, level, event.block_hashes, keys, event.parent_block_hash)
        if level == 0 and event.kv_cache_spec_kind in _WHOLE:
            self._revive(engine, event.parent_block_hash)
        self._shrink()

    def _take(
        self,
        engine: _Engine,
        level: int,
        names: Sequence[BlockHash],
        keys: Sequence[int | None],
        before: BlockHash | None,
    ) -> None:
        for name, key in zip(names, keys, strict=False):
            if key is not None:
                self._put(engine, level, name, (key, before))
            before = name

    def _put(self, engine: _Engine, level: int, name: BlockHash, block: _Block) -> None:
        if name not in engine.held:
            self._blocks += 1
            engine.ghosts.pop(name, None)
            engine.held[name] = block
        self._holders.hold(level, block[0], engine.slot)

    def _revive(self, engine: _Engine, name: BlockHash | None) -> None:
        """A GPU that computes a block has all before it: where we had lost sight of them, they are held."""
        while (block := engine.block(name)) is not None and not self._holders.media(
            block[0], engine.slot
        ) & 1:
            assert name is not None
            self._put(engine, 0, name, block)
            name = block[1]

    def _keys(self, engine: _Engine, event: Stored) -> Sequence[int | None]:
        """The event's blocks by our names; none where they contradict themselves."""
        names, size, tokens = event.block_hashes, event.block_size, event.token_ids
        parent, lora, extras = event.parent_block_hash, event.lora_name, event.extra_keys or []
        if lora is None and event.lora_id is not None:
            lora = str(event.lora_id)
        block = engine.block(parent)
        before = block[0] if block else self._root(lora) if parent is None else None
        if before is None:
            return [None] * len(names)
        fits = size >= 1 and len(tokens) == size * len(names) and len(extras) in (0, len(names))
        try:
            keys = chain(before, tokens, size, [encoded(extra, lora) for extra in extras]) if fits else []
        except (OverflowError, TypeError, RecursionError):
            keys = []
        if keys and parent is None and not self._learn(engine, size):
            keys = []
        self.refused += not keys
        return keys

    def _remove(self, engine: _Engine, event: Removed) -> None:
        if engine.group is not None and event.group_idx not in (None, engine.group[1]):
            return
        level, slot = _level(event.medium), engine.slot
        for name in event.block_hashes:
            block = engine.held.get(name)
            if block is None:
                continue
            self._holders.drop(level, block[0], slot)
            if not self._holders.media(block[0], slot):
                del engine.held[name]
                self._blocks -= 1
                engine.drop(name, block)

    def _stands(self, engine: _Engine, group: tuple[bool, int]) -> bool:
        """Whether a KV-cache group is the one that is followed: of a hybrid model's, the first that keeps
        the whole prefix. A sliding window drops blocks that nobody needs any more."""
        if engine.group is None or group < engine.group:
            if engine.group is not None:
                self._empty(engine)
            engine.group = group
        return group == engine.group

    def _shrink(self) -> None:
        """Stay within `most_blocks`: forget what is only to be swept, or the oldest of who has the most."""
        while self._blocks > self._most_blocks:
            if self._past:
                self._sweep(_AT_ONCE)
                continue
            engine = max(self._all(), key=lambda one: len(one.held))
            oldest = list(islice(engine.held, min(_AT_ONCE, max(1, self._most_blocks // 64))))
            for name in oldest:
                self._holders.drop_all(engine.held.pop(name)[0], engine.slot)
            self._blocks -= len(oldest)
            self.forgotten += len(oldest)

    def _learn(self, engine: _Engine, size: int) -> bool:
        """Note that it has blocks of this size; False: it has too many sizes."""
        if size not in engine.sizes:
            if len(engine.sizes) >= _MOST_SIZES:
                return False
            engine.sizes.add(size)
            self._learn_sizes()
        return True

    def _learn_sizes(self) -> None:
        self._sizes = tuple(sorted({size for one in self._all() for size in one.sizes}))

    def _root(self, lora: str | None) -> int:
        return self.seed if lora is None else xxh3_64_intdigest(lora.encode("utf-8", "replace"), self.seed)


def _level(medium: str | None) -> int:
    return 0 if medium is None else MEDIA.get(medium.upper(), LEVELS - 1)
