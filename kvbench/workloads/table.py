"""All workloads by name."""

from __future__ import annotations

from kvbench.workloads.agent import AGENT
from kvbench.workloads.base import Workload
from kvbench.workloads.conversations import CONVERSATIONS
from kvbench.workloads.documents import LONG, SHORT
from kvbench.workloads.mixed import MIXED
from kvbench.workloads.multi_round import MULTI_ROUND
from kvbench.workloads.rag import RAG
from kvbench.workloads.trace import TRACE
from kvbench.workloads.unique import UNIQUE

__all__ = ["WORKLOADS"]

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (LONG, SHORT, CONVERSATIONS, MULTI_ROUND, RAG, AGENT, MIXED, TRACE, UNIQUE)
}
