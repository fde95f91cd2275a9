"""Which token lies in which column of a batch's cache, as the model's forward was told."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Book", "Named", "name_rows"]


class Named(NamedTuple):
    """Tokens of one row whose KV can be named: column `start` holds the first, at position 0."""

    start: int
    tokens: npt.NDArray[np.int64]


def name_rows(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None) -> list[Named]:
    """Per row the first unbroken run of tokens that attend, cut where a position is not its index.

    All of shape [rows, columns]. A row that is all padding has no tokens, and starts behind its end.
    """
    named = []
    host = ids.cpu().numpy()
    where = None if positions is None else positions.cpu().numpy()
    for row, real in enumerate(mask.cpu().numpy()):
        start = int(real.argmax()) if real.any() else len(real)
        length = int(np.argmin(np.append(real[start:], False)))
        if where is not None:
            odd = np.flatnonzero(where[row, start : start + length] != np.arange(length))
            length = int(odd[0]) if len(odd) else length
        named.append(Named(start, host[row, start : start + length].astype(np.int64)))
    return named


class Book:
    """Grows with each forward; follows what beam search and the like do to rows. On the model's device,
    so that a step of decoding waits for nothing."""

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> None:
        self._ids, self._mask, self._positions = ids, mask, positions
        self._agree = torch.ones(len(ids), dtype=torch.bool, device=ids.device)

    @property
    def columns(self) -> int:
        """Columns noted."""
        return self._ids.shape[1]

    @property
    def height(self) -> int:
        """Rows."""
        return self._ids.shape[0]

    @property
    def mask(self) -> torch.Tensor:
        """Which columns hold tokens, not padding."""
        return self._mask

    def note(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> None:
        """A forward of these new columns; `mask` covers the earlier ones too.

        A row whose earlier mask has changed has KV that depends on both masks: it has no name.
        """
        self._agree = self._agree & (mask[:, : self.columns] == self._mask).all(1)
        self._mask = mask
        self._ids = torch.cat([self._ids, ids], 1)
        self._positions = torch.cat([self._positions, positions.expand(ids.shape)], 1)

    def rows(self) -> list[Named]:
        """What can be named now; waits for the device."""
        agree = self._agree.tolist()
        named = name_rows(self._ids, self._mask, self._positions)
        return [row if ok else Named(0, row.tokens[:0]) for row, ok in zip(named, agree, strict=True)]

    def crop(self, count: int) -> None:
        """Forget the last `count` columns."""
        keep = max(0, self.columns - count)
        self._ids, self._positions = self._ids[:, :keep], self._positions[:, :keep]
        self._mask = self._mask[:, :keep]

    def select(self, rows: torch.Tensor) -> None:
        """Make these the rows, in this order; they may repeat."""
        rows = rows.to(self._ids.device)
        self._ids, self._positions, self._mask, self._agree = (
            tensor[rows] for tensor in (self._ids, self._positions, self._mask, self._agree)
        )
