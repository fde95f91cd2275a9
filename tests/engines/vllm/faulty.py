"""kvkeep's connector, whose copies fail by plan: vLLM loads it by module path, in each of its processes."""

from __future__ import annotations

from typing import Any

from kvkeep.engines import search
from kvkeep.engines.vllm import KVKeepConnector, worker
from kvkeep.errors import KeeperUnavailable
from kvkeep.transfer import make_transfer

__all__ = ["KVKeepConnector"]

FAULTS = {1: KeeperUnavailable("injected"), 3: RuntimeError("injected")}
"""By the number of the load: one that passes, and one that switches the cache off."""


class _Loads:
    count = 0


def _make_faulty(*args: Any) -> Any:
    """A real transfer; a load that is to fail leaves wrong KV in the last group's blocks, and raises."""
    transfer = make_transfer(*args)
    load = transfer.load

    def faulty(group: int, offsets: Any, blocks: Any) -> int:
        _Loads.count += group == 0
        fault = FAULTS.get(_Loads.count)
        if fault is None or group < len(transfer.layouts) - 1:
            return load(group, offsets, blocks)
        for tensor in transfer.layers[group]:
            dim = 0 if tensor.shape[0] == transfer.layouts[group].num_blocks else 1
            for block in blocks.tolist():
                tensor.select(dim, block).fill_(3.0)
        raise fault

    transfer.load = faulty  # type: ignore[method-assign]
    return transfer


search._RETRY_FIRST = 8.0
"""A request whose load failed is over before there is a keeper again: what it computes is not kept."""


worker.make_transfer = _make_faulty
