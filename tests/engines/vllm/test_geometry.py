"""Where each rank's part of a chunk lies, and who has a word in it. No engine is started."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from kvkeep.engines.vllm.geometry import Geometry, arrange
from kvkeep.engines.vllm.metadata import NOWHERE, Handshake

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
