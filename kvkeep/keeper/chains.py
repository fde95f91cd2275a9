"""Pieces of a prompt's chain of chunks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvkeep.errors import RequestRefused
from kvkeep.keeper.index import Records

__all__ = ["check_distinct", "one_kind", "runs"]


def runs(positions: Records) -> list[slice]:
    """Where positions follow on each other without a gap: policies take chains piece by piece."""
    if not len(positions):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def check_distinct(names: npt.NDArray[np.int64] | npt.NDArray[np.uint64]) -> None:
    """Raise RequestRefused on a repeat: one record, leased twice by one claim, would be freed twice."""
    ordered = np.sort(names)  # np.unique takes ten times as long
    if (ordered[1:] == ordered[:-1]).any():
        raise RequestRefused("a request names a chunk twice")


def one_kind(kinds: npt.NDArray[np.int32]) -> int:
    """The kind of one group's chunks. Raises RequestRefused on keys that were made to collide with another
    group's: policies of two kinds must not mix."""
    if (kinds != kinds[0]).any():
        raise RequestRefused("a request names a chunk of another group")
    return int(kinds[0])
