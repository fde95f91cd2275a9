"""Workloads that this field quotes, each a small definition: who asks what, in which order.

A definition says lengths and counts at their published size; `Scale` shrinks them, `Prose` makes the text,
`kvbench.load` sends it. All is the same for the same seed.
"""

from kvbench.workloads.base import Given, Message, Request, Scale, Workload
from kvbench.workloads.prose import Passage, Prose
from kvbench.workloads.table import WORKLOADS

__all__ = ["WORKLOADS", "Given", "Message", "Passage", "Prose", "Request", "Scale", "Workload"]
