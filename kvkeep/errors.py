"""Every error that kvkeep raises, grouped by what the caller can do about it.

KVKeepError
 ├── ConfigError        an option is wrong: change it (raised before anything is served)
 ├── LayoutError        this engine's KV layout is not supported: run it without kvkeep
 ├── KeeperUnavailable  the keeper is gone or too slow: treat as a miss, reconnect later
 ├── ProtocolError      the other side does not speak our protocol: drop the connection
 ├── RequestRefused     the keeper understood the request and says no: a bug or a stale handle
 ├── TierUnavailable    a place below the arena does not answer or refuses us: go on without it
 │    ├── TierSwitchedOff  it was not asked, after failures
 │    └── TierStillReads   its buffers are not the caller's again yet: leave them alone until they are
 └── DeviceError        a GPU's driver refused a copy: load by the slow path, or compute
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = [
    "CONFIG_EXIT",
    "ConfigError",
    "DeviceError",
    "KVKeepError",
    "KeeperUnavailable",
    "LayoutError",
    "ProtocolError",
    "RequestRefused",
    "TierStillReads",
    "TierSwitchedOff",
    "TierUnavailable",
]


CONFIG_EXIT = 2
"""Exit code of the command after an error of ours; argparse uses the same for its own."""


class KVKeepError(Exception):
    """Base of all errors raised by kvkeep."""


class ConfigError(KVKeepError):
    """An option or its combination is wrong; the message names the remedy."""


class LayoutError(KVKeepError):
    """An engine's KV-cache layout is not one that kvkeep can move without guessing."""


class KeeperUnavailable(KVKeepError):
    """The keeper cannot be reached, went away, or did not answer in time."""


class ProtocolError(KVKeepError):
    """A peer sent bytes that are not a message of this protocol version."""


class RequestRefused(KVKeepError):
    """The keeper refused one request; the connection stays usable."""


class TierUnavailable(KVKeepError):
    """A tier cannot be reached, does not answer in time, or refuses us; it may come back."""

    over: Future[None] | None = None  # see TierStillReads


class TierSwitchedOff(TierUnavailable):
    """A tier was not asked, after failures."""


class TierStillReads(TierUnavailable):
    """A read was given up, and a library may write to its buffers until `over` is done (never, it may be)."""

    def __init__(self, what: str, over: Future[None]) -> None:
        super().__init__(what)
        self.over = over


class DeviceError(KVKeepError):
    """A GPU's driver refused a copy; nothing of it was done, or not all."""
