"""kvkeep's connector, met by a KV layout that it does not know."""

from __future__ import annotations

from typing import Any

from kvkeep.engines.vllm import KVKeepConnector, worker
from kvkeep.errors import LayoutError

__all__ = ["KVKeepConnector"]


def _group_layout(*_: Any) -> Any:
    raise LayoutError("layer 0: no clear block dimension")


worker.group_layout = _group_layout
