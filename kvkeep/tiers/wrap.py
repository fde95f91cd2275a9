"""What every wrapper shares: it is the tier that it wraps, unless it says otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.tiers.base import Buffer, Capabilities, Check, Got, Key, Put, Seal, Tier, Usage

__all__ = ["Wrapper", "innermost"]


class Wrapper(Tier):
    """Passes every verb on to `inner`, which it owns."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def attach(self, memory: Buffer) -> None:
        self.inner.attach(memory)

    def overlap(self, seal: Seal, check: Check) -> bool:
        return self.inner.overlap(seal, check)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        return self.inner.contains(keys)

    def get(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Got]:
        return self.inner.get(keys, buffers)

    def put(self, keys: Sequence[Key], buffers: Sequence[Buffer]) -> list[Put]:
        return self.inner.put(keys, buffers)

    def delete(self, keys: Sequence[Key]) -> None:
        self.inner.delete(keys)

    def gone(self) -> list[Key]:
        return self.inner.gone()

    def usage(self) -> Usage:
        return self.inner.usage()

    def close(self) -> None:
        self.inner.close()


def innermost(tier: Tier) -> Tier:
    """The tier inside all wrappers."""
    while isinstance(tier, Wrapper):
        tier = tier.inner
    return tier
