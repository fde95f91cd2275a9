"""Workloads that this field quotes, each a small definition: who asks what, in which order.

A definition says lengths and counts at their published size; `Scale` shrinks them, `Prose` makes the text,
`kvbench.load` sends it. All is the same for the same seed.
"""

from kvbench.workloads.agent import AGENT
from kvbench.workloads.base import Given, Message, Request, Scale, Workload
from kvbench.workloads.conversations import CONVERSATIONS
from kvbench.workloads.documents import LONG, SHORT
from kvbench.workloads.mixed import MIXED
from kvbench.workloads.multi_round import MULTI_ROUND
from kvbench.workloads.prose import Passage, Prose
from kvbench.workloads.rag import RAG
from kvbench.workloads.trace import TRACE
from kvbench.workloads.unique import UNIQUE

__all__ = ["WORKLOADS", "Given", "Message", "Passage", "Prose", "Request", "Scale", "Workload"]

_ALL = (LONG, SHORT, CONVERSATIONS, MULTI_ROUND, RAG, AGENT, MIXED, TRACE, UNIQUE)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}
