"""The cache of one batch: what `generate()` and a forward take as `past_key_values`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from kvkeep.engines.transformers.book import Book
from kvkeep.engines.transformers.layers import FullLayer, SlidingLayer

if TYPE_CHECKING:
    from types import TracebackType

    from kvkeep.engines.transformers.cache import KVKeepCache
    from kvkeep.engines.transformers.describe import LayerShape, ModelState

__all__ = ["Begun", "PrefixCache", "expected_positions"]


def expected_positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions as generate() derives them: tokens counted, padding 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Begun:
    """What `begin` was told: token ids and mask, [rows, columns]."""

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, salt: str | None) -> None:
        self.ids, self.mask, self.salt = ids.detach().clone(), mask, salt  # the caller may write to its own
        self.columns = ids.shape[1]
        self.whole = False
        """No row is known to have padding."""
        self._given, self._version = ids, None if ids.is_inference() else ids._version

    def are(self, ids: torch.Tensor, first: int) -> bool:
        """Whether these are the columns from `first` on of what was given, and still the same. Told without
        waiting for the device, which may be busy with a load."""
        given = self._given[:, first:]
        same = ids.data_ptr() == given.data_ptr() and ids.dtype == given.dtype
        same = same and ids.shape == given.shape and ids.stride() == given.stride()
        return same and self._version is not None and self._version == ids._version

    def select(self, rows: torch.Tensor) -> None:
        """Make these the rows, in this order; they may repeat."""
        rows = rows.to(self.ids.device)
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self._version = None


class PrefixCache(DynamicCache):
    """A `DynamicCache` that may begin with columns that were loaded.

    `loaded`: how many; generate() skips them, a plain forward takes `input_ids[:, past.loaded:]`. Made by
    `KVKeepCache.begin`. As a context manager it saves at the end. One thread at a time.
    """

    def __init__(
        self, owner: KVKeepCache, shapes: list[LayerShape], begun: Begun, config: Any = None
    ) -> None:
        super().__init__(config=config)
        if shapes:
            self.layers = [FullLayer() if s.window is None else SlidingLayer(s.window) for s in shapes]
        self.owner = owner
        self.begun = begun
        self.loaded = 0
        self.book: Book | None = None
        """None: nothing has been computed or loaded, or something happened that cannot be followed."""
        self.closed = not shapes
        """Nothing of this batch will be saved."""
        self.saved: list[int] = [0] * len(begun.ids)
        """Per row, chunks that were loaded or have been offered to the keeper."""
        self.epochs: list[int] = [0] * len(begun.ids)
        self.saved_columns = 0
        self.state: ModelState | None = None
        """Of the model when this was begun."""
        self._last = 0
        """Columns of the last forward; 0 before the first."""

    @property
    def at_start(self) -> bool:
        """Whether nothing has been computed yet."""
        return not self._last

    def due(self, every: int) -> bool:
        """Whether to save before the next forward: there is much, or a sliding layer is about to let go."""
        if self.book is None:
            return False
        lets_go = self._last > 1 and any(isinstance(layer, SlidingLayer) for layer in self.layers)
        return lets_go or self.book.columns - self.saved_columns >= every

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.owner.save(self)

    def start(self, columns: int) -> None:
        """The first `columns` columns of what was begun have been filled in."""
        begun = self.begun
        mask = begun.mask[:, :columns]
        self.book = Book(begun.ids[:, :columns], mask, expected_positions(mask))
        self.loaded = self.saved_columns = columns

    # A forward is about to run

    def continues(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> str | None:
        """Note what a forward is told. Returns what is wrong where it does not follow what was loaded."""
        if self.at_start and self.loaded and (problem := self._check_first(ids, mask, positions)):
            return problem
        if self.book is None:
            self._fit(ids)
            self.book = Book(ids[:, :0], torch.ones_like(ids[:, :0], dtype=torch.bool), ids[:, :0])
        end = self.book.columns + ids.shape[1]
        real = torch.ones((len(ids), end), dtype=torch.bool, device=ids.device) if mask is None else mask != 0
        if real.shape != (len(ids), end) or (positions is not None and positions.dim() != 2):
            self.closed = True
            return None
        if positions is None:
            positions = torch.arange(end - ids.shape[1], end, device=ids.device)[None]
        self.book.note(ids, real, positions)
        self._last = ids.shape[1]
        return None

    def _fit(self, ids: torch.Tensor) -> None:
        """Beams and several answers to a prompt are rows of their own before the first forward."""
        times, rest = divmod(len(ids), len(self.begun.ids))
        if times > 1 and not rest:
            self.batch_repeat_interleave(times)
        if self.book is None and len(self.saved) != len(ids):  # reset, and used for others
            self.saved, self.epochs = [0] * len(ids), [0] * len(ids)

    def _check_first(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> str | None:
        self._fit(ids)
        again = mask is not None and mask.shape[1] == ids.shape[1]
        if mask is None and positions is not None:
            again = not positions.reshape(-1)[0]
        if again:  # all is given, as generate() does with drafts and for a prefill in pieces: compute it
            self.reset()
            return None
        begun, loaded = self.begun, self.loaded
        if mask is None and positions is None and begun.whole and begun.are(ids, loaded):
            return None
        told = slice(loaded, min(begun.columns, loaded + ids.shape[1]))
        count, before = told.stop - loaded, begun.mask[:, :loaded]
        usual = expected_positions(begun.mask)[:, told]
        if positions is None:
            positions = torch.arange(loaded, told.stop, device=ids.device)[None]
        agrees = (
            len(ids) == len(begun.ids)
            and ids[:, :count].equal(begun.ids[:, told])
            and bool(before.all() if mask is None else (mask[:, :loaded] != 0).equal(before))
            and positions.dim() == 2
            and bool((positions[:, :count] == usual)[begun.mask[:, told]].all())
        )
        if agrees:
            return None
        return (
            "the forward does not go on where begin() left off: give both the same input_ids and "
            "attention_mask, a plain forward input_ids[:, past.loaded:] and, with padding, position_ids"
        )

    # What generate() does to rows and columns

    def reset(self) -> None:
        """Empty it; it can be used again for any tokens."""
        super().reset()
        self.book, self.loaded, self.saved_columns = None, 0, 0
        self.saved, self._last = [0] * len(self.saved), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last columns: as in transformers, of which a negative number says how many."""
        before = self.get_seq_length()
        self._forget_seen()
        super().crop(tokens_to_remove)
        if self.book is not None:
            self.book.crop(before - self.get_seq_length())
            self.loaded = min(self.loaded, self.book.columns)
            # Other tokens may follow: offer all again, of which the keeper takes what it has not.
            self.saved_columns, self.saved = 0, [0] * len(self.saved)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search goes on with these rows."""
        self._forget_seen()
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._forget_seen()
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.saved)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._forget_seen()
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: torch.Tensor) -> None:
        if self.book is not None:
            self.book.select(rows)
        if self.at_start:
            self.begun.select(rows)
        picked = torch.arange(len(self.saved))[rows.cpu()].tolist()
        self.saved = [self.saved[row] for row in picked]
        self.epochs = [self.epochs[row] for row in picked]

    def _forget_seen(self) -> None:
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                layer.forget_seen()
