"""From the engine's blocks to chunks: sizes, slots, and which block goes where. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvkeep.engines.vllm.metadata import Copies, Handshake, Rank, Session
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.errors import ConfigError
from kvkeep.layout import chunk_blocks
from kvkeep.wire.messages import Reservation

__all__ = ["Geometry", "arrange", "blocks_written"]

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

BlockTable = Sequence[Sequence[int]]
"""Per group, the request's block ids in order; 0 is the null block outside a sliding window."""


@dataclass(frozen=True)
class Geometry:
    """How one engine's blocks make chunks."""

    chunk_tokens: int
    block_tokens: tuple[int, ...]
    """Per group."""
    windows: tuple[int | None, ...]
    """Per group, tokens that a sliding window looks back on; None for full attention."""

    @classmethod
    def choose(
        cls,
        block_tokens: Sequence[int],
        windows: Sequence[int | None],
        block_bytes: Sequence[int],
        wanted: int | None,
    ) -> Geometry:
        """Chunks of `wanted` tokens, or of the fewest blocks that reach about 1 MiB.

        `block_bytes`: per group, of one block on all ranks. Raises ConfigError if `wanted` is no
        whole number of blocks.
        """
        unit = math.lcm(*block_tokens)
        if wanted is not None and wanted % unit:
            raise ConfigError(
                f"chunk_tokens={wanted} is no multiple of the engine's block size {unit}: "
                f"set it to {unit} or a multiple, or leave it out"
            )
        unit_bytes = sum(
            size * unit // tokens for size, tokens in zip(block_bytes, block_tokens, strict=True)
        )
        return cls(wanted or unit * chunk_blocks(unit_bytes), tuple(block_tokens), tuple(windows))

    def window_chunks(self) -> list[int | None]:
        """Per group, chunks that must be held before the end of a hit; None for all."""
        return [None if window is None else math.ceil(window / self.chunk_tokens) for window in self.windows]

    def add_load(
        self, copies: Copies, tracked: Tracked, table: BlockTable, local: int, external: int
    ) -> None:
        """Blocks of the tokens local … local+external-1, from the slots that a lookup leased."""
        for group, size in enumerate(self.block_tokens):
            blocks = np.array(table[group][local // size : (local + external) // size], np.int64)
            number = local // size + np.arange(len(blocks))
            per_chunk = self.chunk_tokens // size
            slots = tracked.offsets[group][number // per_chunk - tracked.first]
            used = (blocks != 0) & (slots >= 0)
            copies.add(group, slots[used], (number % per_chunk)[used], blocks[used])
        copies.claims.append(tracked.lease)
        copies.tokens += external

    def offer(self, tracked: Tracked, table: BlockTable, first: int, last: int) -> Reservation | None:
        """Chunks first … last-1 of a request as the keeper is asked about them."""
        keys = tracked.keys(first, last)
        if not keys:
            return None
        wanted = []
        for group, size in enumerate(self.block_tokens):
            per_chunk = self.chunk_tokens // size
            blocks = np.array(table[group][first * per_chunk : last * per_chunk], np.int64)
            whole = np.zeros(last - first, np.uint8)
            count = len(blocks) // per_chunk
            whole[:count] = (blocks[: count * per_chunk] != 0).reshape(-1, per_chunk).all(axis=1)
            wanted.append(whole.tobytes())
        return Reservation(keys, wanted, first, tracked.epoch, tracked.tenant)

    def add_save(
        self, copies: Copies, table: BlockTable, first: int, place: int, wanted: Sequence[bytes]
    ) -> None:
        """Blocks of the chunks that are offered: first, first+1, …, the keeper's answer on which begins at
        `place` of its rows. `wanted`: see `Reservation`."""
        for group, size in enumerate(self.block_tokens):
            per_chunk = self.chunk_tokens // size
            chunks = np.flatnonzero(np.frombuffer(wanted[group], np.uint8))
            index = np.tile(np.arange(per_chunk), len(chunks))
            number = np.repeat((first + chunks) * per_chunk, per_chunk) + index
            places = np.repeat(place + chunks, per_chunk)
            copies.add(group, places, index, np.array(table[group], np.int64)[number])


def arrange(
    geometry: Geometry, workers: Mapping[Rank, Handshake], replicas: int
) -> tuple[Session, list[int]]:
    """Where each rank's part lies in a slot, and the bytes of a slot per group.

    Of `replicas` consecutive tensor ranks, which hold the same KV, the first writes the part.
    """
    session = Session()
    slot = [0] * len(geometry.block_tokens)
    for rank in sorted(workers):
        pipeline, tensor = rank
        session.part[rank] = len(session.part)
        if tensor % replicas:
            session.replicas.add(rank)
            session.part_offset[rank] = session.part_offset[(pipeline, tensor - tensor % replicas)]
            continue
        session.part_offset[rank] = list(slot)
        for group, size in enumerate(workers[rank].block_bytes):
            slot[group] += size * geometry.chunk_tokens // geometry.block_tokens[group]
    return session, slot


def blocks_written(output: SchedulerOutput, loads: Sequence[Copies]) -> npt.NDArray[np.int64]:
    """Blocks that a step may write and that others may have had before: all that it was given, or loads into.

    Whatever way a block has come free (preemption, eviction from a window, a request's end), it is written
    again only once it is given out. Blocks of a new request's local hit are read only; a few too many do no
    harm.
    """
    given = [request.block_ids for request in output.scheduled_new_reqs]
    given += [blocks for blocks in output.scheduled_cached_reqs.new_block_ids if blocks is not None]
    parts = [np.array(blocks, np.int64) for groups in given for blocks in groups]
    parts += [row for copies in loads for rows in copies.blocks.values() for row in rows]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
