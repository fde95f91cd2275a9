"""How a row is looked up: its keys, and the keeper's answer, within deadlines where tiers are asked."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from kvkeep.config import EngineConfig
from kvkeep.engines.link import Opened
from kvkeep.identity import ChainHasher, encode_extra
from kvkeep.terms import Found

__all__ = ["chain_keys", "look_up"]

_DONE, _POLL_EVERY = 2, 0.001


def chain_keys(
    fingerprint: bytes, chunk_tokens: int, tokens: npt.NDArray[np.int64], salt: str | None
) -> bytes:
    """Of all whole chunks of a row's tokens."""
    hasher, chunks = ChainHasher(fingerprint, chunk_tokens), len(tokens) // chunk_tokens
    extras = None if salt is None else [None if i else encode_extra(salt) for i in range(chunks)]
    hasher.extend(tokens.tolist(), extras)
    return hasher.keys(0, chunks)


def look_up(keeper: Opened, config: EngineConfig, keys: bytes, tenant: bytes) -> Found:
    """What is held, in memory or, within the deadlines, in tiers. Raises KVKeepError."""
    if not keys:
        return Found(0, 0, 0, [])
    link = keeper.connection
    recompute = -1.0 if config.load == "never" else 0.0
    terms = (keeper.namespace, keys, 0, recompute, config.probe_wait)
    first = link.lookup(*terms, tenant=tenant)
    if not first.ticket:
        return first
    began, stage, patience = time.monotonic(), 0, config.probe_wait
    while stage != _DONE and time.monotonic() - began < patience:
        time.sleep(_POLL_EVERY)
        stage = link.poll([first.ticket])[0]
        patience = config.load_wait if stage else config.probe_wait
    second = link.lookup(*terms, first.ticket, tenant=tenant)
    if first.lease:
        link.release(first.lease)
    return second
