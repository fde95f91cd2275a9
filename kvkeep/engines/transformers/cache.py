"""The edge to transformers: what an embedding program calls, and one hook on the model.

The hook, on the decoder's forward, is how token ids come to be known: `Cache.update` gets only states.
It sees what was really computed, by generate() or by a plain forward, with which mask and positions.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvkeep import config as configuration
from kvkeep.engines.transformers.past import Begun, PrefixCache
from kvkeep.engines.transformers.store import Stats, Store
from kvkeep.errors import ConfigError, KVKeepError, LayoutError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["KVKeepCache"]

log = logging.getLogger("kvkeep.transformers")
_T = TypeVar("_T")

_SAVE_EVERY = 256  # columns; fewer where a sliding window is short


class KVKeepCache:
    """Keeps what one model computes, and begins its batches with what is held.

        with KVKeepCache.for_model(model, memory="4GiB") as cache:
            past = cache.begin(inputs.input_ids, inputs.attention_mask)
            out = model.generate(**inputs, past_key_values=past)

    Several threads may generate, each with caches of its own; a fork looks for its parent's keeper.
    A keeper that is gone, full or slow (`timeout`, each call) is a miss.
    """

    def __init__(self, model: Any, options: configuration.EngineConfig) -> None:
        self._model = model
        self._store: Store | None = None
        self._errors = Stats()
        self._local = threading.local()
        self._hook: Any = None
        self._every = _SAVE_EVERY
        self._config = model.config.get_text_config(decoder=True)
        self._guard(lambda: self._start(options), None)

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> KVKeepCache:
        """Tie a model (`…ForCausalLM`) to a keeper. `options`: fields of `EngineConfig`, such as `socket`
        of a shared keeper, or `memory` of a private one. Raises ConfigError for a wrong one."""
        return cls(model, configuration.load(configuration.EngineConfig, options))

    def _start(self, options: configuration.EngineConfig) -> None:
        store = Store(self._model, options)
        windows = [group.window for group in store.groups if group.window is not None]
        self._every = min([_SAVE_EVERY, *(max(1, window // 2) for window in windows)])
        store.attach()
        decoder = self._model.get_decoder()
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._hook = decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        self._store = store

    @property
    def stats(self) -> Stats:
        """Sums since the start."""
        return self._errors if self._store is None else self._store.stats

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk: what is found is cut to these. 0 where the cache is off."""
        return 0 if self._store is None else self._store.chunk_tokens

    @property
    def pinned(self) -> float:
        """The share of the arena that a GPU reaches directly: grows to 1 after the start; 1 on a CPU."""
        return 1.0 if self._store is None else self._store.pinned

    # What a program calls

    def begin(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, salt: str | None = None
    ) -> PrefixCache:
        """A cache for this batch, filled with the longest prefix that is held for all of its rows.

        `input_ids`, `attention_mask`: [rows, columns], as the model will be given them; at least the last
        column is left to compute. `salt`: only batches with the same one share KV. Saves this thread's
        last batch first.
        """
        self.save()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        begun = Begun(input_ids, mask != 0, salt)
        store = self._store
        past = PrefixCache(self, store.shapes if store else [], begun, None if store else self._config)
        if store is None:
            return past
        self._guard(lambda: store.enter(past), None)
        hidden = attention_mask is None and self._may_be_padded(input_ids)
        if not (past.closed or hidden or self._model.training):
            self._guard(lambda: store.load(past), None)
        if not past.loaded:
            past.reset()  # of what a fault left half done
        self._local.last = past
        return past

    def _may_be_padded(self, ids: torch.Tensor) -> bool:
        """Without a mask generate() makes one, if there are pad tokens: it may not be all ones."""
        config = getattr(self._model, "generation_config", self._config)
        pad = config.pad_token_id
        return pad is not None and bool((ids == pad).any())

    def save(self, past: PrefixCache | None = None) -> None:
        """Offer the keeper what this thread's last batch, or `past`, has computed; lets go of it."""
        if past is None:
            past = getattr(self._local, "last", None)
        if past is not None and past is getattr(self._local, "last", None):
            self._local.last = None
        store = self._store
        if store is not None and past is not None:
            self._guard(lambda: store.save(past), None)

    def close(self) -> None:
        """Save this thread's last batch, and let go of model and keeper. Caches go on as plain ones."""
        self.save()
        self._off()

    def __enter__(self) -> KVKeepCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVKeepCache:
        return self  # a copied cache of a batch saves to the same keeper

    # The hook

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = {**dict(zip(self._names, args, strict=False)), **kwargs}
        past = told.get("past_key_values")
        if not isinstance(past, PrefixCache) or past.owner is not self or past.closed:
            return
        problem = self._guard(lambda: self._note(past, told, module.training), None)
        if problem is not None:
            raise ValueError(problem)

    def _note(self, past: PrefixCache, told: dict[str, Any], training: bool) -> str | None:
        ids, mask = told.get("input_ids"), told.get("attention_mask")
        plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        if ids is None or not plain or training:
            past.closed = True
            return None
        assert self._store is not None
        if not past.at_start:
            self._store.settle()
        if past.due(self._every):
            self._store.save(past)
        if past.at_start and not self._store.unchanged(past):
            if past.loaded:
                return "the model has changed since begin(): call begin() again"
            past.closed = True
            return None
        return past.continues(ids, mask, told.get("position_ids"))

    def _guard(self, action: Callable[[], _T], otherwise: _T) -> _T:
        """Run what may fail; on a fault count it, log it, and generate as without the cache."""
        try:
            return action()
        except ConfigError:
            raise  # raised at the start only: the operator must hear of it
        except LayoutError as error:
            log.warning("kvkeep is off for this model: %s", error)
            self._off()
        except KVKeepError as error:
            if self._store is not None:
                self._store.lose(error)
        except Exception:
            log.exception("kvkeep: an unexpected error; the cache is off for this model from here on")
            self._off()
        self.stats.errors += 1
        return otherwise

    def _off(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._store is not None:
            self._errors = self._store.stats
            self._store.close()
        self._hook, self._store = None, None
