"""Opens tiers by URL: finds the kind, and puts the wrappers around it.

A kind is a function from a TierURL to a Tier that takes the options it knows, and raises ConfigError
where the place cannot be used as the URL says (unreachable, wrong credentials, another format). Ours
are listed here; others are found by entry points of the group `kvkeep.tiers`, named by scheme.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import NamedTuple

from kvkeep.errors import ConfigError
from kvkeep.tiers.base import Tier
from kvkeep.tiers.faults import Faults, Faulty
from kvkeep.tiers.guard import Guarded
from kvkeep.tiers.meter import Metered
from kvkeep.tiers.seal import Sealed
from kvkeep.tiers.url import TierURL

__all__ = ["Opened", "WriteWhen", "open_raw", "open_tier", "open_tiers"]

_OURS = {
    "fs": "kvkeep.tiers.fs:open_fs",
    "redis": "kvkeep.tiers.redis:open_redis",
    "rediss": "kvkeep.tiers.redis:open_redis",
    "redis+unix": "kvkeep.tiers.redis:open_redis",
    "s3": "kvkeep.tiers.s3:open_s3",
    "mooncake": "kvkeep.tiers.mooncake:open_mooncake",
    "infinistore": "kvkeep.tiers.infinistore:open_infinistore",
    "peer": "kvkeep.tiers.peer:open_peer",
}
_FAULTY = "faulty+"
MOST_TIERS = 16
"""The keeper notes which tiers hold a chunk in so many bits."""


class WriteWhen(enum.Enum):
    """When chunks of the arena are written to a tier."""

    THROUGH = "through"
    """As soon as they are committed, in the background."""
    SECOND_TOUCH = "second-touch"
    """Once they were hit: what is never asked for again does not wear flash."""
    NEVER = "never"
    """Others write to it, this keeper only reads."""


class Opened(NamedTuple):
    """A tier, ready for use, with the wrappers that are asked about it."""

    url: str
    """Without the password."""
    tier: Metered
    guard: Guarded
    write: WriteWhen


def open_raw(url: TierURL) -> Tier:
    """The tier of a URL without wrappers. Raises ConfigError."""
    if url.scheme.startswith(_FAULTY):
        faults = Faults.of(url)
        return Faulty(open_raw(url.inner(url.scheme.removeprefix(_FAULTY))), faults)
    return _kind(url.scheme)(url)


def open_tier(text: str, **suggested: str) -> Opened:
    """The tier of a URL: metered, sealed, guarded. Raises ConfigError with what to do.

    `suggested` are options to use where the URL gives none and the tier knows them.
    """
    url = TierURL(text)
    for name, value in suggested.items():
        url.suggest(name, value)
    raw = open_raw(url)
    try:
        write = _write_when(url, raw.capabilities.readonly)
        url.finish()
    except ConfigError:
        raw.close()
        raise
    guard = Guarded(raw, str(url))
    return Opened(str(url), Metered(Sealed(guard)), guard, write)


def _write_when(url: TierURL, readonly: bool) -> WriteWhen:
    whens = (WriteWhen.NEVER,) if readonly else tuple(WriteWhen)
    return WriteWhen(url.take_choice("write", tuple(when.value for when in whens), whens[0].value))


def open_tiers(urls: Sequence[str]) -> list[Opened]:
    """All tiers of a keeper, the fastest first; all or none. Raises ConfigError."""
    opened: list[Opened] = []
    if len(urls) > MOST_TIERS:
        raise ConfigError(f"{len(urls)} tiers are too many: {MOST_TIERS} at most")
    try:
        for url in urls:
            opened.append(open_tier(url))
    except ConfigError:
        for tier in opened:
            tier.tier.close()
        raise
    return opened


def _kind(scheme: str) -> Callable[[TierURL], Tier]:
    if scheme in _OURS:
        module, name = _OURS[scheme].split(":")
        try:
            found: Callable[[TierURL], Tier] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ConfigError(
                f"{scheme}:// needs {error.name}: pip install 'kvkeep[{module.rsplit('.', 1)[1]}]'"
            ) from error
        return found
    for point in entry_points(group="kvkeep.tiers", name=scheme):
        try:
            loaded: Callable[[TierURL], Tier] = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{scheme}://, which is {point.value}, cannot be loaded: {error}") from error
        return loaded
    known = sorted({*_OURS, *(point.name for point in entry_points(group="kvkeep.tiers"))})
    raise ConfigError(f"no tier of kind {scheme!r}: known are {', '.join(known)}")
