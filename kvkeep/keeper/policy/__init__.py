"""Which chunks to give up when there is no room: one interface, three policies, chosen by name.

Why LRU is the default. Prefix-contiguous hit ratios with room for 1, 5, 10 and 25 % of the unique blocks
on Mooncake's two public traces, and ns of policy per block, by `kvkeep bench policy TRACE`
(2 shared cores of an AMD EPYC, 2026-11-24):

    conversation   lru .052 .196 .279 .353   1010 ns    synthetic   lru .038 .157 .262 .444    690 ns
                   arc .065 .210 .284 .335   1360 ns                arc .043 .163 .262 .460   1090 ns
                s3fifo .075 .187 .245 .344   1770 ns             s3fifo .045 .155 .260 .446   1400 ns
                belady .246 .366 .366 .366                       belady .185 .396 .506 .626

None wins everywhere. ARC is half a point ahead on average; from 15 to 25 % of room it is 1 to 3 points
behind LRU on the conversation trace and 1 to 2 ahead on the synthetic one. For that it takes a third
to a half more time and 20 times the memory, and pauses for long where a large table of Python objects
is rebuilt: 85 ms at a million chunks, turned over 32 at a time, against 6 ms for LRU. The keeper must
never be in the way, so LRU; ARC is one word away for a small cache.
"""

from kvkeep.keeper.policy.arc import ArcPolicy
from kvkeep.keeper.policy.base import Policy
from kvkeep.keeper.policy.lru import LruPolicy
from kvkeep.keeper.policy.s3fifo import S3FifoPolicy

__all__ = ["DEFAULT_POLICY", "POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LruPolicy, ArcPolicy, S3FifoPolicy)}
DEFAULT_POLICY = "lru"


def make_policy(name: str, capacity: int) -> Policy:
    """Return a new policy for `capacity` chunks. ValueError for an unknown name or a capacity below 1."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; the known ones are {', '.join(POLICIES)}")
    return POLICIES[name](capacity)
