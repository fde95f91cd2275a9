"""Paged KV ⇄ slots: a reference in plain torch, and the fast engine of each device, chosen once."""

from kvkeep.transfer.base import Transfer
from kvkeep.transfer.choose import make_transfer

__all__ = ["Transfer", "make_transfer"]
