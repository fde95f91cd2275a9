"""How much of a prompt can be taken from the cache, given what each KV-cache group holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["usable_chunks"]


def usable_chunks(held: Sequence[npt.NDArray[np.bool_]], windows: Sequence[int | None]) -> int:
    """The longest usable run of leading chunks.

    `held[g][i]`: group g holds chunk i; all of one length. `windows[g]`: None for full attention
    (every chunk is needed), otherwise the chunks before the end that a sliding window looks at.
    """
    limit = len(held[0])
    for row, window in zip(held, windows, strict=True):
        if window is None:
            missing = np.flatnonzero(~row[:limit])
            limit = int(missing[0]) if len(missing) else limit
    ends = np.arange(1, limit + 1)
    good = np.ones(limit, np.bool_)
    for row, window in zip(held, windows, strict=True):
        if window is not None:
            last_missing = np.maximum.accumulate(np.where(row[:limit], 0, ends))
            good &= ends - last_missing >= np.minimum(window, ends)
    usable = np.flatnonzero(good)
    return int(usable[-1]) + 1 if len(usable) else 0
