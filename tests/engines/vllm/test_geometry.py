"""Where each rank's part of a chunk lies, and who has a word in it. No engine is started."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvkeep.engines.vllm.geometry import Geometry, arrange
from kvkeep.engines.vllm.metadata import NOWHERE, Handshake, Offered
from kvkeep.terms import REFUSED, Reserved

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds


@pytest.mark.parametrize(("replicas", "writers"), [(1, 4), (2, 2), (4, 1)])
def test_every_rank_commits_and_one_of_those_with_the_same_kv_writes(replicas: int, writers: int) -> None:
    geometry = Geometry(32, (16, 8), (None, 24))
    ranks = [(pipeline, tensor) for pipeline in range(2) for tensor in range(4)]
    workers = {rank: Handshake(NOWHERE, [], [100, 10 * (1 + rank[0])]) for rank in ranks}
    session, slot = arrange(geometry, workers, replicas)
    assert sorted(session.part.values()) == list(range(8)), "a chunk is readable when all have committed"
    assert session.replicas == {rank for rank in ranks if rank[1] % replicas}
    assert slot == [2 * writers * 100 * 2, writers * (10 + 20) * 4]
    for rank in ranks:
        first = (rank[0], rank[1] - rank[1] % replicas)
        assert session.part_offset[rank] == session.part_offset[first]
    wrote = sorted(session.part_offset[rank] for rank in ranks if rank not in session.replicas)
    ends = [*wrote[1:], slot]
    for (pipeline, _), start, end in zip(sorted(set(ranks) - session.replicas), wrote, ends, strict=True):
        assert [to - at for at, to in zip(start, end, strict=True)] == [200, 40 * (1 + pipeline)]


def test_what_is_saved_of_what_was_offered() -> None:
    """Two requests, two groups, of which one has no blocks of its own at a chunk that left its window."""
    geometry = Geometry(32, (16, 32), (None, 64))
    offered = Offered(1, 0.0, geometry.chunk_tokens)
    geometry.add_save(offered.blocks, [[10, 11, 12, 13], [20, 21]], 0, 0, [b"\1\1", b"\1\1"])
    geometry.add_save(offered.blocks, [[30, 31, 32, 33, 34, 35], [0, 0, 42]], 1, 2, [b"\1\1", b"\0\1"])
    answer = [
        Reserved(7, [np.array([4096, -1]), np.array([8192, REFUSED])]),
        Reserved(9, [np.array([REFUSED, 12288]), np.array([-1, 0])]),
    ]
    copies = offered.given(answer)
    assert copies.claims == [7, 9]
    assert copies.tokens == 2 * 32
    rows = {
        group: list(zip(*(np.concatenate(rows[group]).tolist() for rows in columns), strict=True))
        for columns in [(copies.offsets, copies.index, copies.blocks)]
        for group in copies.blocks
    }
    assert rows == {
        0: [(4096, 0, 10), (4096, 1, 11), (12288, 0, 34), (12288, 1, 35)],
        1: [(8192, 0, 20), (0, 0, 42)],
    }
    nothing = [Reserved(0, [np.array([-1, -1])] * 2)] * 2
    assert not offered.given(nothing).claims
    assert not offered.given([]).claims
