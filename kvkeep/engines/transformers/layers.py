"""transformers' cache layers, with room to grow in place, and with what has not been saved yet."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["FullLayer", "SlidingLayer"]

_ROOM = 256  # columns


class FullLayer(DynamicLayer):
    """All columns, in a store that has room for more: no copy of the whole at each step, nor behind a
    loaded prefix."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._stores: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, columns, size]; returns all columns, as views."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            super().update(key_states, value_states)  # gradients do not flow through a store
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        have = states.shape[-2] if states.numel() else 0
        store, end = self._stores[which], have + new.shape[-2]
        if store is None or not _continues(store, states, new, end):
            store = new.new_empty(*new.shape[:2], end + max(_ROOM, end // 8), new.shape[3])
            if have:
                store[:, :, :have] = states
            self._stores[which] = store
        store[:, :, have:end] = new
        return store[:, :, :end]

    def fill(self, keys: torch.Tensor, values: torch.Tensor, columns: int) -> None:
        """Take over stores whose first `columns` columns are filled."""
        self.lazy_initialization(keys, values)
        self._stores = [keys, values]
        self.keys, self.values = keys[:, :, :columns], values[:, :, :columns]

    def held(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The first column that is here, and the states from there on."""
        return 0, self.keys, self.values

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        self._stores = [None, None]


def _continues(store: torch.Tensor, states: torch.Tensor, new: torch.Tensor, end: int) -> bool:
    """Whether `states` are the store's first columns still, and `new` may be written behind them."""
    same = states.numel() == 0 or states.data_ptr() == store.data_ptr()
    fits = store.shape[0] == new.shape[0] and end <= store.shape[2] and store.dtype == new.dtype
    return same and fits and (not store.is_inference() or torch.is_inference_mode_enabled())


class SlidingLayer(DynamicSlidingWindowLayer):
    """The window, as in transformers, and until the next forward all that the last one saw."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns the window before, and the new columns."""
        self._seen = super().update(key_states, value_states)
        return self._seen

    def fill(self, keys: torch.Tensor, values: torch.Tensor, columns: int) -> None:
        """Take over the last columns under the window, of `columns` in all."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, columns

    def held(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The first column that is here, and the states from there on."""
        keys, values = self._seen or (self.keys, self.values)
        return self.cumulative_length - keys.shape[-2], keys, values

    def forget_seen(self) -> None:
        """Rows or columns are about to change: keep to the window."""
        self._seen = None

    def reset(self) -> None:
        """Empty it."""
        self._seen = None
        super().reset()
