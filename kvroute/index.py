"""Which engine holds which prefix, from its KV events.

Engines name blocks by hashes of their own, which differ between versions, seeds and settings. So the index
names them anew: a block's key is a hash of its tokens, seeded with the key of the block before it, so equal
keys mean equal prefixes whoever computed them. Per engine a table leads from its hashes to these keys; per
medium another one from keys to the engines that hold them, as bits of an integer. A lookup hashes the prompt
once per block size and follows the chain while any engine is left.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvkeep.identity import encode_extra
from kvroute.events import BlockHash, Cleared, Event, Removed, Stored

__all__ = ["MEDIA", "Held", "Index"]

MEDIA = {
    **dict.fromkeys(("GPU", "DEVICE"), 0),
    **dict.fromkeys(("CPU", "CPU_PINNED", "CPU_TIER1"), 1),
    **dict.fromkeys(("STORAGE", "DISK", "NVME", "CPU_TIER2", "EXTERNAL", "NETWORK", "REMOTE", "SHARED"), 2),
}
"""Level of each medium that is known, in upper case. Others count as storage, none as GPU."""

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]

_Block = tuple[int, BlockHash | None]
"""Our key of a block, and the engine's name of the one before it."""

_LEVELS = 3
_PIECE = 128  # blocks hashed at a time: a prompt that nobody holds costs one piece
_MOST_SIZES = 16  # block sizes per engine; vLLM also tells of blocks that are not full
_LEAST_GHOSTS = 4096
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
    """One engine: its bit, its names of blocks, and those whose KV it has dropped (ghosts)."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.held: dict[BlockHash, _Block] = {}
        self.ghosts: dict[BlockHash, _Block] = {}
        self.most_ghosts = _LEAST_GHOSTS
        self.sizes: set[int] = set()
        self.group: tuple[bool, int] | None = None  # the KV-cache group that stands for all

    def block(self, name: BlockHash | None) -> _Block | None:
        """A block that it holds or held."""
        return None if name is None else self.held.get(name) or self.ghosts.get(name)


class Index:
    """Not locked: one thread, or one event loop, owns it.

    `most_blocks` bounds what it remembers, over all engines: beyond it the engine with the most forgets its
    oldest blocks. What it says is never more than the events said; with some of them lost it may be less.
    """

    def __init__(self, most_blocks: int = 4_000_000) -> None:
        self.orphans = 0
        """Stored blocks passed over, because the block before them is not known."""
        self.refused = 0
        """Events passed over because they contradict themselves."""
        self.forgotten = 0
        """Blocks forgotten to stay within `most_blocks`."""
        self._most_blocks = most_blocks
        self._blocks = 0
        self._engines: dict[str, _Engine] = {}
        self._names: list[str | None] = []
        self._holders: tuple[dict[int, int], ...] = tuple({} for _ in range(_LEVELS))
        self._seed = secrets.randbits(64)  # so that nobody can make prompts whose keys collide
        self._sizes: tuple[int, ...] = ()
        self._last = (0, 0, 0)

    # What is held

    def lookup(
        self, tokens: Tokens, lora: str | None = None, extra: Sequence[Any] | str | None = None
    ) -> dict[str, Held]:
        """How much of a prompt's prefix each engine holds; engines that hold none of it are left out.

        `tokens`: ids, a list or an array of them. `lora`: the adapter's name. `extra`: what else the prompt
        is keyed by, its cache salt. Raises OverflowError or TypeError on what is no token id.
        """
        data = _packed(tokens)
        root, first = self._root(lora), _encoded([extra] if isinstance(extra, str) else extra)
        reach: list[dict[int, int]] = [{} for _ in range(_LEVELS)]
        for size in self._sizes:
            self._walk(data, size, root, first, reach)
        return self._result(*reach)

    def _result(self, gpu: dict[int, int], cpu: dict[int, int], storage: dict[int, int]) -> dict[str, Held]:
        """Written out: with a thousand engines this is a third of a lookup."""
        found, names = {}, self._names
        for slot in {**gpu, **cpu, **storage}:
            first = gpu.get(slot, 0)
            second = cpu.get(slot, 0)
            second = first if second < first else second  # noqa: FURB136
            third = storage.get(slot, 0)
            third = second if third < second else third  # noqa: FURB136
            if (name := names[slot]) is not None:
                found[name] = Held(first, second - first, third - second)
        return found

    def _walk(self, data: bytes, size: int, root: int, first: bytes, reach: list[dict[int, int]]) -> None:
        """Follow one chain; `reach` gets, per level, how many tokens each engine holds at least."""
        levels = [level for level, holders in enumerate(self._holders) if holders]
        alive, tokens = dict.fromkeys(levels, 0), 0
        for keys in _pieces(data, size, root, first):
            masks: list[int] = []
            for level in levels:
                masks = _joined(masks, list(map(self._holders[level].get, keys)))
                left = alive[level] if tokens else masks[0]
                alive[level] = _descend(left, masks, tokens, size, reach[level])
            tokens += len(keys) * size
            if not any(alive.values()):
                return
        for level, left in alive.items():
            _note(left, tokens, reach[level])

    # What is told

    def apply(self, engine: str, events: Iterable[Event]) -> None:
        """Take over an engine's events, in its order."""
        known = self._engines.get(engine) or self._join(engine)
        for event in events:
            if isinstance(event, Stored):
                self._store(known, event)
            elif isinstance(event, Removed):
                self._remove(known, event)
            elif isinstance(event, Cleared):
                self._empty(known)

    def clear(self, engine: str) -> None:
        """What the engine holds is not known any more (events were lost). Its names of blocks stay, so that
        what it stores from now on finds its place."""
        if known := self._engines.get(engine):
            self._empty(known)

    def forget(self, engine: str) -> None:
        """The engine is gone, or was started anew."""
        if known := self._engines.get(engine):
            self._empty(known)
            del self._engines[engine]
            self._names[known.slot] = None
            self._learn_sizes()

    def blocks(self, engine: str) -> int:
        """How many blocks the engine holds, as far as is known."""
        known = self._engines.get(engine)
        return len(known.held) if known else 0

    def engines(self) -> list[str]:
        """Engines that have told something."""
        return list(self._engines)

    def _join(self, name: str) -> _Engine:
        slot = self._names.index(None) if None in self._names else len(self._names)
        self._names[slot : slot + 1] = [name]
        self._engines[name] = engine = _Engine(slot)
        return engine

    def _store(self, engine: _Engine, event: Stored) -> None:
        if not self._stands(engine, (event.kv_cache_spec_kind not in _WHOLE, event.group_idx or 0)):
            return
        holders = self._holders[_level(event.medium)]
        before = event.parent_block_hash
        if event.token_ids:
            keys = self._keys(engine, event)
        else:
            keys = [block and block[0] for block in map(engine.block, event.block_hashes)]
        self.orphans += keys.count(None)
        for name, key in zip(event.block_hashes, keys, strict=False):
            if key is not None:
                if name not in engine.held:
                    self._blocks += 1
                    engine.ghosts.pop(name, None)
                    engine.held[name] = key, before
                self._hold(holders, key, engine.bit)
            before = name
        if holders is self._holders[0] and event.kv_cache_spec_kind in _WHOLE:
            self._revive(engine, event.parent_block_hash)
        if self._blocks > self._most_blocks:
            self._shrink()

    def _revive(self, engine: _Engine, name: BlockHash | None) -> None:
        """A GPU that computes a block has all before it: where we had lost sight of them, they are held."""
        holders = self._holders[0]
        while (block := engine.block(name)) is not None and not holders.get(block[0], 0) & engine.bit:
            assert name is not None
            if engine.ghosts.pop(name, None):
                self._blocks += 1
                engine.held[name] = block
            self._hold(holders, block[0], engine.bit)
            name = block[1]

    def _keys(self, engine: _Engine, event: Stored) -> Sequence[int | None]:
        """The event's blocks by our names; none where they contradict themselves."""
        names, size, tokens, parent = (
            event.block_hashes,
            event.block_size,
            event.token_ids,
            event.parent_block_hash,
        )
        lora, extras = event.lora_name, event.extra_keys or []
        if lora is None and event.lora_id is not None:
            lora = str(event.lora_id)
        block = engine.block(parent)
        before = block[0] if block else self._root(lora) if parent is None else None
        if before is None:
            return [None] * len(names)
        fits = size >= 1 and len(tokens) == size * len(names) and len(extras) in (0, len(names))
        try:
            keys = _chain(before, tokens, size, [_encoded(extra, lora) for extra in extras]) if fits else []
        except (OverflowError, TypeError):
            keys = []
        if keys and parent is None and size not in engine.sizes:
            if len(engine.sizes) < _MOST_SIZES:
                engine.sizes.add(size)
                self._learn_sizes()
            else:
                keys = []
        self.refused += not keys
        return keys

    def _remove(self, engine: _Engine, event: Removed) -> None:
        if engine.group is not None and event.group_idx not in (None, engine.group[1]):
            return
        holders, bit = self._holders[_level(event.medium)], engine.bit
        for name in event.block_hashes:
            block = engine.held.get(name)
            if block is None:
                continue
            _drop(holders, block[0], bit)
            if not any(level.get(block[0], 0) & bit for level in self._holders):
                del engine.held[name]
                self._blocks -= 1
                engine.ghosts[name] = block
                if len(engine.ghosts) > engine.most_ghosts:
                    del engine.ghosts[next(iter(engine.ghosts))]

    def _stands(self, engine: _Engine, group: tuple[bool, int]) -> bool:
        """Whether a KV-cache group is the one that is followed: of a hybrid model's, the first that keeps
        the whole prefix. A sliding window drops blocks that nobody needs any more."""
        if engine.group is None or group < engine.group:
            if engine.group is not None:
                self._empty(engine)
            engine.group = group
        return group == engine.group

    def _empty(self, engine: _Engine) -> None:
        for holders in self._holders:
            for key, _ in engine.held.values():
                _drop(holders, key, engine.bit)
        self._blocks -= len(engine.held)
        engine.most_ghosts = max(engine.most_ghosts, len(engine.held))
        engine.ghosts |= engine.held
        engine.held = {}
        for name in list(engine.ghosts)[: -engine.most_ghosts]:
            del engine.ghosts[name]

    def _shrink(self) -> None:
        """Forget a few of the oldest blocks of the engine that has the most."""
        engine = max(self._engines.values(), key=lambda one: len(one.held))
        oldest = list(engine.held)[: max(1, self._most_blocks // 64)]
        for name in oldest:
            key, _ = engine.held.pop(name)
            for holders in self._holders:
                _drop(holders, key, engine.bit)
        self._blocks -= len(oldest)
        self.forgotten += len(oldest)

    def _hold(self, holders: dict[int, int], key: int, bit: int) -> None:
        """Blocks that follow each other mostly have the same holders: they share one integer."""
        before = holders.get(key, 0)
        last_before, last_bit, last = self._last
        if before is not last_before or bit != last_bit:
            last = before | bit
            self._last = (before, bit, last)
        holders[key] = last

    def _learn_sizes(self) -> None:
        self._sizes = tuple(sorted({size for engine in self._engines.values() for size in engine.sizes}))

    def _root(self, lora: str | None) -> int:
        return self._seed if lora is None else xxh3_64_intdigest(lora.encode("utf-8", "replace"), self._seed)


def _pieces(data: bytes, size: int, key: int, first: bytes) -> Iterator[list[int]]:
    """Keys of a prompt's whole blocks, some at a time. `first`: what its first block is keyed by as well."""
    step, at = 4 * size, 0
    whole = len(data) - len(data) % step
    while at < whole:
        stop, keys = min(whole, at + _PIECE * step), []
        for start in range(at, stop, step):
            block = data[start : start + step]
            key = xxh3_64_intdigest(block + first if first and start == 0 else block, key)
            keys.append(key)
        yield keys
        at = stop


def _chain(key: int, tokens: Sequence[int], size: int, extras: Sequence[bytes]) -> list[int]:
    """Keys of whole blocks of `size` tokens that follow the block `key`."""
    data, step, keys = _packed(tokens), 4 * size, []
    for number, at in enumerate(range(0, len(data), step)):
        block = data[at : at + step]
        key = xxh3_64_intdigest(block + extras[number] if extras else block, key)
        keys.append(key)
    return keys


def _packed(tokens: Tokens) -> bytes:
    return tokens.astype("u4").tobytes() if isinstance(tokens, np.ndarray) else array("I", tokens).tobytes()


def _encoded(extra: Sequence[Any] | None, lora: str | None = None) -> bytes:
    """What a block is keyed by beside its tokens; an engine repeats its LoRA there, which the root has.

    Raises TypeError on what has no canonical encoding.
    """
    rest = [item for item in extra or () if item != lora or lora is None]
    return encode_extra(rest) if rest else b""


def _level(medium: str | None) -> int:
    return 0 if medium is None else MEDIA.get(medium.upper(), _LEVELS - 1)


def _drop(holders: dict[int, int], key: int, bit: int) -> None:
    mask = holders.get(key, 0)
    if mask & bit:
        if mask == bit:
            del holders[key]
        else:
            holders[key] = mask ^ bit


def _joined(faster: list[int], found: list[int | None]) -> list[int]:
    """Who holds each block on this medium or on a faster one."""
    if not faster:
        return [mask or 0 for mask in found]
    if not any(found):
        return faster
    return [
        mask if not one else one if not mask else mask | one for mask, one in zip(faster, found, strict=True)
    ]


def _descend(alive: int, masks: list[int], start: int, size: int, reach: dict[int, int]) -> int:
    """Who of `alive` holds all these blocks; the others are noted with where they stopped."""
    last = alive
    for number, mask in enumerate(masks):
        if mask is last:
            continue
        last = mask
        kept = alive & mask
        if kept != alive:
            _note(alive ^ kept, start + number * size, reach)
            if not kept:
                return 0
            alive = kept
    return alive


def _note(engines: int, tokens: int, reach: dict[int, int]) -> None:
    while engines:
        slot = engines.bit_length() - 1
        engines ^= 1 << slot
        if tokens > reach.get(slot, 0):
            reach[slot] = tokens
