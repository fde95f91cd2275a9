"""Hosts of a test's own; it is skipped where they cannot be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvbench import network
from kvbench.network import Host, common_address

__all__ = ["Host", "common_address", "hosts"]


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts."""
    try:
        with network.hosts(count) as made:
            yield made
    except network.Unavailable as error:
        pytest.skip(str(error))
