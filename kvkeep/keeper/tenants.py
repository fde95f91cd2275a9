"""Who holds how much of the arena, and may: what a request's `cache_salt` keeps apart can be bounded too.

A tenant is known by a digest of its salt (`identity.tenant_of`). Chunks of different salts have different
keys, so each chunk has one tenant. Number 0 is what has no salt; it has no books and no quota.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvkeep.config import parse_bytes
from kvkeep.errors import ConfigError, RequestRefused
from kvkeep.identity import TENANT_BYTES
from kvkeep.keeper.index import Records

__all__ = ["Numbers", "Tenants", "first_to_go", "parse_tenant"]

Numbers = npt.NDArray[np.uint16]
"""uint16 [n]: the tenant of each chunk."""

_MOST = 4096  # told apart at a time; 0.4 MiB
_OTHERS, _FIRST = 1, 2  # those beyond have one number, and one default quota, together
_KEPT = 32  # the first ones keep their numbers, and so their labels in metrics
_SPARE = 64  # a tenant at its quota gives up this part of it at a time: looking for the oldest is a scan
_COUNTERS = ("asked", "hit", "stored", "fetched", "refused", "evicted", "aborted")
_FIELDS = ["used_bytes", "chunks", "quota_bytes", "seen", *(f"{name}_chunks" for name in _COUNTERS)]
_NO_QUOTA = -1


class Tenants:
    """Books and bounds of one keeper's tenants. One owner, no locks."""

    def __init__(self, quotas: Sequence[str] = ()) -> None:
        """`quotas`: TENANT=SIZE each, TENANT as `kvkeep status` shows it, or `default` for every tenant that
        has none of its own. Raises ConfigError."""
        own, self._default = _parse(quotas)
        self._books = np.zeros(_MOST, [(name, np.int64) for name in _FIELDS])
        self._books["quota_bytes"] = self._default
        self._names = [b"", b""]
        self._numbers = {b"": 0}
        self._kept, self._clock = _FIRST + max(_KEPT, len(own)), 0
        for name, nbytes in own.items():
            self._books["quota_bytes"][self.number(name)] = nbytes

    @property
    def known(self) -> bool:
        """Whether there is any: without, nothing is counted."""
        return len(self._names) > _FIRST

    def number(self, name: bytes) -> int:
        """What stands for a tenant, valid until this is called again or it holds something."""
        if not name:
            return 0
        self._clock += 1
        number = self._numbers.get(name) or self._new(name)
        self._books["seen"][number] = self._clock
        return number

    def find(self, name: bytes) -> int | None:
        """The number of a tenant that is known. Raises RequestRefused where it may be one of `others`."""
        number = self._numbers.get(name)
        if number is None and self._books["chunks"][_OTHERS]:
            raise RequestRefused(f"more than {_MOST} tenants are here, and this one is not told apart")
        return number

    def asked(self, name: bytes, chunks: int, found: int) -> None:
        """A request of a tenant has asked for chunks, and got so many."""
        if name:
            number = self.number(name)
            self._books["asked_chunks"][number] += chunks
            self._books["hit_chunks"][number] += found

    def count(self, what: str, numbers: Numbers) -> None:
        """One event of a kind for each of these chunks' tenants."""
        if self.known:
            np.add.at(self._books[what], numbers, 1)

    def took(self, number: int, slots: int, slot_bytes: int) -> None:
        """A tenant's chunks were given slots."""
        self._books["chunks"][number] += slots
        self._books["used_bytes"][number] += slots * slot_bytes

    def freed(self, numbers: Numbers, sizes: Records) -> None:
        """Slots of these tenants are free again."""
        np.subtract.at(self._books["chunks"], numbers, 1)
        np.subtract.at(self._books["used_bytes"], numbers, sizes)

    def excess(self, number: int) -> tuple[int, int]:
        """Bytes that a tenant holds above its quota, and what it should give up beside them."""
        quota = int(self._books["quota_bytes"][number])
        bounded = number != 0 and quota != _NO_QUOTA
        return (int(self._books["used_bytes"][number]) - quota, quota // _SPARE) if bounded else (0, 0)

    def heaviest(self, most: int, named: bytes = b"") -> list[int]:
        """The numbers of those that hold most, and of one more by name."""
        order = np.argsort(-self._books["used_bytes"][_FIRST : len(self._names)], kind="stable") + _FIRST
        shown: list[int] = order[:most].tolist()
        number = self._numbers.get(named, 0)
        return shown if not number or number in shown else [*shown, number]

    def first(self, most: int = _KEPT) -> list[int]:
        """Numbers that stand for the same tenants as long as this keeper lives."""
        return list(range(_FIRST, min(len(self._names), _FIRST + most)))

    def report(self, shown: Iterable[int]) -> list[dict[str, object]]:
        """Figures of these tenants, and behind them (where there are any) the sum of all others."""
        shown = list(shown)
        rest = np.setdiff1d(np.arange(_OTHERS, len(self._names)), shown)
        rows = [(self._names[number].hex(), self._books[number].tolist()) for number in shown]
        if len(rest) > 1 or self._books["asked_chunks"][_OTHERS] or self._books["chunks"][_OTHERS]:
            sums = [int(self._books[name][rest].sum()) for name in _FIELDS]
            rows.append(("others", [*sums[:2], _NO_QUOTA, *sums[3:]]))
        return [
            {
                "tenant": name,
                **{field: value for field, value in zip(_FIELDS, row, strict=True) if field != "seen"},
                "quota_bytes": None if row[2] == _NO_QUOTA else row[2],
            }
            for name, row in rows
        ]

    def check_integrity(self, numbers: Numbers, sizes: Records) -> None:
        """Raise AssertionError unless the books are those of these chunks, and within the quotas."""
        if self.known:
            for name, values in (("chunks", np.ones_like(sizes)), ("used_bytes", sizes)):
                sums = np.zeros(_MOST, np.int64)
                np.add.at(sums, numbers, values)
                assert np.array_equal(sums[_OTHERS:], self._books[name][_OTHERS:]), name
            assert all(self.excess(number)[0] <= 0 for number in range(len(self._names)))
        assert {name: number for number, name in enumerate(self._names) if name} | {b"": 0} == self._numbers

    def _new(self, name: bytes) -> int:
        number = len(self._names)
        if number < _MOST:
            self._names.append(name)
        else:
            idle = np.flatnonzero(self._books["chunks"][self._kept :] == 0) + self._kept
            if not len(idle):
                return _OTHERS
            number = int(idle[self._books["seen"][idle].argmin()])
            for counter in _COUNTERS:
                self._books[f"{counter}_chunks"][_OTHERS] += self._books[f"{counter}_chunks"][number]
            self._books[number] = 0
            self._books["quota_bytes"][number] = self._default
            del self._numbers[self._names[number]]
            self._names[number] = name
        self._numbers[name] = number
        return number


def first_to_go(ages: Records, sizes: Records, newcomers: int, nbytes: int, spare: int) -> Records:
    """Which of a tenant's chunks go, so that `nbytes` are free: the oldest, by `ages`, where the last
    `newcomers` of them have yet to be admitted; and at most `spare` besides, up to the first of those."""
    most = min(len(ages) - 1, (nbytes + spare) // int(sizes.min()))
    order = np.argpartition(ages, most)[: most + 1]
    order = order[np.argsort(ages[order], kind="stable")]
    ends = np.cumsum(sizes[order])
    need = int(np.searchsorted(ends, nbytes)) + 1
    more = max(need, int(np.searchsorted(ends, nbytes + spare, "right")))
    new = np.flatnonzero(order[need:more] >= len(ages) - newcomers)
    going: Records = order[: need + int(new[0]) if len(new) else more]
    return going


def parse_tenant(text: str) -> bytes:
    """A tenant as `kvkeep status` shows it. Raises ConfigError."""
    if not re.fullmatch(rf"[0-9a-f]{{{2 * TENANT_BYTES}}}", text):
        raise ConfigError(
            f"{text!r} is no tenant: write its {2 * TENANT_BYTES} hex digits; `kvkeep status --tenant SALT` "
            "prints them"
        )
    return bytes.fromhex(text)


def _parse(quotas: Sequence[str]) -> tuple[dict[bytes, int], int]:
    given = dict(text.partition("=")[::2] for text in quotas)
    default = given.pop("default", None)
    own = {parse_tenant(name): parse_bytes(size) for name, size in given.items()}
    if len(own) > _MOST // 2:
        raise ConfigError(f"quotas of {len(own)} tenants: {_MOST // 2} at most")
    return own, _NO_QUOTA if default is None else parse_bytes(default)
