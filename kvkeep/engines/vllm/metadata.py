"""What scheduler side and worker side of the connector tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvkeep.terms import Reserved

__all__ = ["NOWHERE", "Copies", "Handshake", "Offered", "Place", "Rank", "Session", "StepMeta", "WorkerMeta"]

Rank = tuple[int, int]
"""(pipeline rank, tensor rank), vLLM's key for a worker."""
Place = tuple[str, int]
"""A keeper's identity, and the epoch of a session with it. By the epoch alone a keeper and the one that took
its socket would be the same, and offsets of one would be read in the other's arena."""
NOWHERE: Place = ("", -1)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Worker → scheduler, once, after the KV cache was registered."""

    place: Place
    """The keeper whose arena this worker maps in session 0."""
    layout: list[str]
    """Canonical description of each group's bytes; part of the namespace."""
    block_bytes: list[int]
    """Per group, what one block of this rank takes."""
    unfit: str = ""
    """Why this worker's KV cannot be kept; empty where it can."""
    whole_graphs: bool = False
    """Whether it replays whole graphs for batches that load: no layer can wait for its bytes there."""


@dataclass
class Session:
    """One spell of working with one keeper; a new one begins after the keeper was lost."""

    place: Place = NOWHERE
    part_offset: dict[Rank, list[int]] = field(default_factory=dict)
    """Per rank and group: where in a slot the rank's part begins, in bytes."""
    part: dict[Rank, int] = field(default_factory=dict)
    """Per rank: the part that it commits."""
    replicas: set[Rank] = field(default_factory=set)
    """Ranks that hold the same KV as one before them, which writes it. They commit too: what one of them
    computed from a load that failed has reached the others."""

    @property
    def epoch(self) -> int:
        """How many keepers were lost before."""
        return self.place[1]


@dataclass
class Copies:
    """Copies of one direction in one step, all requests together, by group."""

    offsets: dict[int, list[npt.NDArray[np.int64]]] = field(default_factory=dict)
    """Where each block's bytes begin, in bytes from the slot's start (arena offset of part 0)."""
    blocks: dict[int, list[npt.NDArray[np.int64]]] = field(default_factory=dict)
    index: dict[int, list[npt.NDArray[np.int64]]] = field(default_factory=dict)
    """Which block of its chunk each one is."""
    claims: list[int] = field(default_factory=list)
    """Leases or reservations to report on when the copies are done."""
    tokens: int = 0

    def add(
        self,
        group: int,
        slots: npt.NDArray[np.int64],
        index: npt.NDArray[np.int64],
        blocks: npt.NDArray[np.int64],
    ) -> None:
        """Add blocks of one request: slot of its chunk, place in the chunk, block id."""
        self.offsets.setdefault(group, []).append(slots)
        self.index.setdefault(group, []).append(index)
        self.blocks.setdefault(group, []).append(blocks)


@dataclass
class Offered:
    """What a step completes: the keeper says under `ticket` where it is to be saved, while it is computed."""

    ticket: int
    until: float
    """See `Connection.begin_reserve`; one host, so one clock, has all of an engine's ranks."""
    chunk_tokens: int
    blocks: Copies = field(default_factory=Copies)
    """`offsets`: places in the rows of what was reserved, all items behind each other."""

    def given(self, reserved: Sequence[Reserved]) -> Copies:
        """What has been given slots."""
        out = Copies(claims=[item.reservation for item in reserved if item.reservation])
        given = list[npt.NDArray[np.bool_]]()
        for group in self.blocks.blocks if out.claims else ():
            row = np.concatenate([item.offsets[group] for item in reserved])
            slots = row[np.concatenate(self.blocks.offsets[group])]
            used = slots >= 0
            index, blocks = self.blocks.index[group], self.blocks.blocks[group]
            out.add(group, slots[used], np.concatenate(index)[used], np.concatenate(blocks)[used])
            given.append(row >= 0)
        out.tokens = int(np.any(given, axis=0).sum()) * self.chunk_tokens
        return out


@dataclass
class StepMeta(KVConnectorMetadata):
    """Scheduler → workers, every step."""

    epoch: int
    loads: Copies | None = None
    """What this step's forward reads."""
    apart: dict[str, Copies | None] = field(default_factory=dict)
    """What requests wait for, by their ids, beside the steps; None: could not be planned."""
    saves: Offered | None = None
    session: Session | None = None
    """Present until every worker has joined it."""
    leave: bool = False
    """The scheduler side is off: what this step asks for is the last, and claims are to end."""
    unplanned: list[int] = field(default_factory=list)
    """Blocks of promised loads that could not be planned: to be recomputed."""
    reused: npt.NDArray[np.int64] | None = None
    """Blocks that the step may write, where saves of earlier ones may still read them: on GPUs."""
    idle: bool = False
    """Nothing is loaded, and no session joined: most steps."""
    scheduled_tokens: int = 0
    """Tokens that the step computes, all requests together."""


@dataclass
class WorkerMeta(KVConnectorWorkerMetadata):
    """Workers → scheduler: which session each rank has joined (NOWHERE: it lost its connection)."""

    joined: dict[Rank, Place]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMeta:
        """Several ranks' answers of one step."""
        assert isinstance(other, WorkerMeta)
        return WorkerMeta(self.joined | other.joined)
