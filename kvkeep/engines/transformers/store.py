"""One model's tie to the keeper: finds, loads and saves the rows of a batch. Bounded waits, one lock."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Identity, Link, Opened
from kvkeep.engines.transformers.book import Named, name_rows
from kvkeep.engines.transformers.copies import Mapped, as_blocks, find_backend
from kvkeep.engines.transformers.describe import (
    Group,
    describe,
    group_layers,
    model_state,
    probe,
    weights_digest,
)
from kvkeep.engines.transformers.lookup import chain_keys, look_up
from kvkeep.engines.transformers.past import PrefixCache
from kvkeep.errors import KeeperUnavailable, KVKeepError, LayoutError
from kvkeep.identity import KEY_BYTES, fingerprint, tenant_of
from kvkeep.terms import Found, Reserved
from kvkeep.transfer import Transfer
from kvkeep.wire.launch import embedded_socket
from kvkeep.wire.messages import Reservation

__all__ = ["Stats", "Store"]

log = logging.getLogger("kvkeep.transformers")


@dataclass
class Stats:
    """Sums since the start. Tokens are those of the rows; padding does not count."""

    asked_tokens: int = 0
    hit_tokens: int = 0
    """Tokens that were loaded, and used."""
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    """Of the host: on a GPU, to have the copies launched."""
    saved_bytes: int = 0
    save_seconds: float = 0.0
    keeper_losses: int = 0
    errors: int = 0


class _Offer(NamedTuple):
    """Chunks of one row that may be written; its tokens begin at column `start`."""

    item: Reservation
    row: int
    start: int


_States = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Store:
    """State of one model in one process."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.stats = Stats()
        self.config = config
        self.shapes = probe(model)
        self.groups = group_layers(self.shapes)
        self._model = model
        self._state = model_state(model)
        self._weights = config.model_id or weights_digest(model)
        self._lock = threading.Lock()
        self._pid, self._engine_id = os.getpid(), f"transformers-{uuid.uuid4().hex}"
        self._keeper: Opened | None = None
        self._backend = find_backend({shape.device for shape in self.shapes})
        self._mapped: Mapped | None = None
        self._leases: set[int] = set()
        description = describe(model, self.shapes, config.chunk_tokens, self._weights)
        self.chunk_tokens = int(description["chunk_tokens"])
        self._fingerprint = fingerprint(description)
        self._link = self._make_link()

    def _make_link(self) -> Link:
        specs = [(self._group_bytes(group), self._window_chunks(group)) for group in self.groups]
        label = f"{type(self._model).__name__} {self.shapes[0].dtype}"
        who = Identity(self._fingerprint, label, specs, 1, 1, self.chunk_tokens)
        return Link(self.config, self._engine_id, who, arena=True)

    def _group_bytes(self, group: Group) -> int:
        return self.chunk_tokens * sum(self.shapes[layer].token_bytes for layer in group.layers)

    def _window_chunks(self, group: Group) -> int | None:
        """One more than the window covers: a row may be used up to the middle of its last chunk."""
        return None if group.window is None else math.ceil((group.window - 1) / self.chunk_tokens) + 1

    def attach(self) -> None:
        """Find the keeper, or start it. Raises ConfigError, or LayoutError where it refuses us."""
        try:
            self._adopt(self._link.open(0))
        except KeeperUnavailable as error:
            log.warning("kvkeep: %s; generating without it, and looking for it", error)
            self._link.reopen(1)

    def _adopt(self, opened: Opened) -> None:
        self._let_go()
        sizes, device = [self._group_bytes(group) for group in self.groups], self.shapes[0].device
        self._mapped = Mapped(opened.connection, self._backend, self.config.copy_threads, sizes, device)
        self._keeper = opened
        if device.type == "cpu":
            self._mapped.copier([("", torch.empty(1, 1, 1))])  # compiles now, not in the first batch

    def _let_go(self) -> None:
        """Of the mapping; copies under way end first."""
        mapped, self._mapped, self._leases = self._mapped, None, set()  # they end with the connection
        if mapped is not None:
            mapped.close()

    def _attached(self) -> Opened | None:
        """The keeper, if we have one now."""
        if os.getpid() != self._pid:
            self._leave_parent()
        opened = self._link.fresh()
        if opened is not None:
            self._adopt(opened)
        return self._keeper

    def enter(self, past: PrefixCache) -> None:
        """`past` is begun with the model as it is now: with the namespace of that. Raises KVKeepError."""
        past.state = model_state(self._model)
        with self._lock:
            if past.state == self._state:
                return
            if past.state.tensors != self._state.tensors and not self.config.model_id:
                self._weights = weights_digest(self._model)
            again = describe(self._model, self.shapes, self.chunk_tokens, self._weights)
            self._state, self._fingerprint = past.state, fingerprint(again)
            keeper = self._attached()
            if keeper is not None:
                self._link.rename(self._fingerprint)
                self._keeper = self._link.renew(keeper)
            else:
                self._link.stop()
                self._link = self._make_link()
                self._link.reopen(1)

    @property
    def pinned(self) -> float:
        """See `Mapped`."""
        return 1.0 if self._mapped is None else self._mapped.pinned

    def unchanged(self, past: PrefixCache) -> bool:
        """Whether the model is what it was when `past` was begun."""
        return past.state == self._state == model_state(self._model)

    def _leave_parent(self) -> None:
        """We are a fork: the connection is our parent's. Look for its keeper with one of our own."""
        self._pid = os.getpid()
        if self._keeper is not None:
            self._keeper.connection.close()  # our copies of its descriptors; the parent's stay open
        socket = self.config.socket or embedded_socket(self._engine_id)
        self.config = replace(self.config, socket=socket)
        self._engine_id = f"{self._engine_id}-{self._pid}"
        self._backend, self._mapped, self._leases = None, None, set()  # a device does not survive a fork
        self._keeper, self._link = None, self._make_link()
        self._link.reopen(0)

    def lose(self, error: KVKeepError) -> None:
        """Go on without the keeper, and look for the next one in the background."""
        with self._lock:
            if self._keeper is None:
                return
            log.warning("kvkeep: lost the keeper (%s); generating without it, and looking for it", error)
            self.stats.keeper_losses += 1
            lost, self._keeper = self._keeper, None
            self._let_go()
            lost.connection.close()  # its claims end with it: not before the copies
            self._link.reopen(lost.epoch + 1)

    def close(self) -> None:
        """Let go of the keeper; a private one ends by itself."""
        with self._lock:
            self._link.stop()
            found, kept, self._keeper = self._link.fresh(), self._keeper, None
            self._let_go()
            for opened in (found, kept):
                if opened is not None:
                    opened.connection.close()

    # Load

    def load(self, past: PrefixCache) -> None:
        """Fill `past` with the longest prefix that all rows can have. Raises KVKeepError."""
        begun = past.begun
        rows = name_rows(begun.ids, begun.mask)
        begun.whole = all(len(row.tokens) == begun.columns for row in rows)
        with self._lock:
            keeper = self._attached()
            if keeper is None:
                return
            self._settle()
            found: list[Found] = []
            try:
                self._fill(past, rows, keeper, found)
            finally:
                self._leases = {one.lease for one in found if one.lease}
                if self._backend is None:
                    self._settle()

    def settle(self) -> None:
        """End what the last load leased, once the device has read it. Not before the forward that it is for
        is launched, which would wait as well. Raises KVKeepError, or a broken device's RuntimeError."""
        if self._leases:
            with self._lock:
                self._settle()

    def _settle(self) -> None:
        if self._mapped is not None:
            self._mapped.settle()
        leases, self._leases = self._leases, set()
        for lease in leases:
            if self._keeper is not None and not self._keeper.connection.closed:
                self._keeper.connection.release(lease, 0)

    def _fill(self, past: PrefixCache, rows: list[Named], keeper: Opened, found: list[Found]) -> None:
        began = time.perf_counter()
        keys = [self._keys(row, past.begun.salt, len(row.tokens) // self.chunk_tokens) for row in rows]
        tenant = tenant_of(past.begun.salt)
        found += [look_up(keeper, self.config, one, tenant) for one in keys]
        best = list(found)
        columns = self._agree(past, rows, keys, best, keeper, found)
        past.epochs = [one.epoch for one in best]
        self.stats.asked_tokens += sum(len(row.tokens) for row in rows)
        if columns <= 0:
            return
        for group, spec in enumerate(self.groups):
            self._fill_group(past, group, spec, rows, best, columns)
        past.start(columns)
        past.saved = [max(0, columns - row.start) // self.chunk_tokens for row in rows]
        self.stats.hit_tokens += sum(max(0, columns - row.start) for row in rows)
        self.stats.load_seconds += time.perf_counter() - began

    def _agree(
        self,
        past: PrefixCache,
        rows: list[Named],
        keys: list[bytes],
        best: list[Found],
        keeper: Opened,
        found: list[Found],
    ) -> int:
        """How many columns all rows can have; `best` is then what to load for each.

        A sliding layer has KV only under the end of what was found: a row that must stop earlier is
        looked up again, up to there, until all agree.
        """
        size, columns = self.chunk_tokens, past.begun.columns - 1
        while True:
            ends = [row.start + one.chunks * size for row, one in zip(rows, best, strict=True)]
            columns = min([columns, *ends])
            wanted = [max(0, -(-(columns - row.start) // size)) for row in rows]
            late = [i for i, one in enumerate(best) if one.chunks > wanted[i]]
            if not late or all(group.window is None for group in self.groups):
                return columns
            for i in late:
                fewer, tenant = keys[i][: wanted[i] * KEY_BYTES], tenant_of(past.begun.salt)
                best[i] = look_up(keeper, self.config, fewer, tenant)
                found.append(best[i])

    def _keys(self, row: Named, salt: str | None, chunks: int) -> bytes:
        return chain_keys(
            self._fingerprint, self.chunk_tokens, row.tokens[: chunks * self.chunk_tokens], salt
        )

    def _fill_group(
        self, past: PrefixCache, number: int, group: Group, rows: list[Named], best: list[Found], columns: int
    ) -> None:
        size = self.chunk_tokens
        seen = columns if group.window is None else min(columns, group.window - 1)
        firsts = [max(0, columns - seen - row.start) // size for row in rows]
        begins = [row.start + first * size for row, first in zip(rows, firsts, strict=True)]
        base = min(columns - seen, *begins)  # the column that the tensors begin with
        room = (past.begun.columns if group.window is None else columns) + max(size, 256) - base
        states = [self._empty(layer, len(rows), room) for layer in group.layers]
        for i, row in enumerate(rows):
            padding = max(0, min(row.start, columns) - base)
            for tensor in (one for pair in states for one in pair):
                tensor[i, :, :padding] = 0  # masked, but must be finite
            last = -(-(columns - row.start) // size)
            if last > firsts[i]:
                self._load_row(states, i, begins[i] - base, best[i].offsets[number][firsts[i] : last])
        for layer, (keys, values) in zip(group.layers, states, strict=True):
            if group.window is None:
                past.layers[layer].fill(keys, values, columns)
            else:
                cut = slice(columns - seen - base, columns - base)
                past.layers[layer].fill(keys[:, :, cut].clone(), values[:, :, cut].clone(), columns)

    def _empty(self, layer: int, height: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shapes[layer]
        (k_heads, k_size), (v_heads, v_size) = shape.keys, shape.values
        keys = torch.empty((height, k_heads, room, k_size), dtype=shape.dtype, device=shape.device)
        return keys, torch.empty((height, v_heads, room, v_size), dtype=shape.dtype, device=shape.device)

    def _load_row(self, states: _States, row: int, column: int, places: npt.NDArray[np.int64]) -> None:
        if (places < 0).any():
            raise LayoutError("the keeper leased less than it said")
        copier = self._copier(states, row, column)
        self.stats.loaded_bytes += copier.load(0, places.astype(np.int64), np.arange(len(places)))

    def _copier(self, states: _States, row: int, column: int) -> Transfer:
        assert self._mapped is not None
        views = [as_blocks(tensor[row, :, column:], self.chunk_tokens) for pair in states for tensor in pair]
        return self._mapped.copier([(str(index), view) for index, view in enumerate(views)])

    # Save

    def save(self, past: PrefixCache) -> None:
        """Offer the keeper what `past` has beyond what was offered before. Raises KVKeepError."""
        if past.closed or past.book is None or past.book.columns == past.saved_columns:
            return
        if not (self._as_described(past) and self.unchanged(past)):
            past.closed = True  # a forward that failed half way, or something that we do not follow
            return
        past.saved_columns = past.book.columns
        with self._lock:
            keeper = self._attached()
            if keeper is None:
                return
            self._settle()
            offers = [self._offer(past, i, row) for i, row in enumerate(past.book.rows())]
            made = [offer for offer in offers if offer is not None]
            if not made:
                return
            began = time.perf_counter()
            reserved = keeper.connection.reserve(keeper.namespace, [offer.item for offer in made])
            for offer, result in zip(made, reserved, strict=True):
                past.saved[offer.row] = offer.item.first + len(offer.item.keys) // KEY_BYTES
                if result.reservation:
                    self._write(past, offer, result, keeper)
            self.stats.save_seconds += time.perf_counter() - began

    def _as_described(self, past: PrefixCache) -> bool:
        assert past.book is not None
        for layer, shape in zip(past.layers, self.shapes, strict=True):
            found = _shape_of(layer.keys), _shape_of(layer.values), layer.keys.dtype, layer.values.dtype
            expected = shape.keys, shape.values, shape.dtype, shape.dtype
            if found != expected or layer.get_seq_length() != past.book.columns:
                return False
        return True

    def _offer(self, past: PrefixCache, index: int, row: Named) -> _Offer | None:
        count = len(row.tokens)
        if not self.config.save_decoded:
            count = min(count, past.begun.columns - row.start)
        first, last = past.saved[index], count // self.chunk_tokens
        if last <= first:
            return None
        keys = self._keys(row, past.begun.salt, last)[first * KEY_BYTES :]
        starts = row.start + np.arange(first, last) * self.chunk_tokens
        wanted = [(starts >= self._held(past, group)).astype(np.uint8).tobytes() for group in self.groups]
        epoch, tenant = past.epochs[index], tenant_of(past.begun.salt)
        return _Offer(Reservation(keys, wanted, first, epoch, tenant), index, row.start)

    def _held(self, past: PrefixCache, group: Group) -> int:
        return int(past.layers[group.layers[0]].held()[0])

    def _write(self, past: PrefixCache, offer: _Offer, reserved: Reserved, keeper: Opened) -> None:
        done, link = False, keeper.connection
        try:
            for group, places in zip(self.groups, reserved.offsets, strict=True):
                given = np.flatnonzero(places >= 0)
                if len(given):
                    first = offer.item.first + int(given[0])
                    column = offer.start + first * self.chunk_tokens - self._held(past, group)
                    held = [past.layers[layer].held() for layer in group.layers]
                    states = [(keys.detach(), values.detach()) for _, keys, values in held]
                    copier = self._copier(states, offer.row, column)
                    self.stats.saved_bytes += copier.save(0, places[given], given - given[0])
            done = True
        finally:
            if self._mapped is not None:  # also where some was refused: the rest still goes to these slots
                self._mapped.settle()
            if not link.closed:
                link.commit(reserved.reservation, 0) if done else link.abort(reserved.reservation)


def _shape_of(states: torch.Tensor) -> tuple[int, int]:
    return states.shape[1], states.shape[3]
