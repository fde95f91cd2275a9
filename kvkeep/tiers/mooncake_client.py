"""How a client of a Mooncake Store is set up from a URL."""

from __future__ import annotations

import mmap
import socket
from dataclasses import dataclass, replace
from typing import Any

from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.calls import Calls
from kvkeep.tiers.url import TierURL

try:
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig
except ModuleNotFoundError:
    raise
except ImportError as error:  # the package is there, a library that it needs is not
    raise ConfigError(f"mooncake: {error}: apt-get install libibverbs1 libnuma1 libcurl4") from error

__all__ = [
    "MOST_SECONDS",
    "SETUP_SECONDS",
    "MooncakeOptions",
    "ReplicateConfig",
    "connect",
    "mooncake_options",
]

SETUP_SECONDS = 30.0
"""For what is done once; the client's own tries take up to 90."""
_LEAST_SEGMENT = 16 << 20
MOST_SECONDS = 55.0
"""After 60 the client returns from a transfer that may still be going on."""


@dataclass(frozen=True)
class MooncakeOptions:
    """How a client of ours takes part."""

    master: str
    """host:port."""
    hostname: str
    """Ours, as the other hosts reach it."""
    metadata: str
    protocol: str
    device: str
    """RDMA devices, separated by commas."""
    segment: int
    """Bytes of this process's memory that the store may use; 0: none."""
    buffer: int
    """Bytes of each landing, and of the longest value."""
    replicas: int
    timeout: float
    """Seconds that one call may take."""


def mooncake_options(url: TierURL) -> MooncakeOptions:
    """The options of a URL. Raises ConfigError; also where no master answers, since the client would try
    for 90 s."""
    port = url.port or 50051
    timeout = url.take_timeout(5.0)
    options = MooncakeOptions(
        master=f"{url.host}:{port}",
        hostname=url.take("hostname", str, ""),
        metadata=url.take("metadata", str, "P2PHANDSHAKE"),
        protocol=url.take_choice("protocol", ("tcp", "rdma"), "tcp"),
        device=url.take("device", str, ""),
        segment=url.take_bytes("segment", 0) or 0,
        buffer=url.take_bytes("buffer", 64 << 20) or 0,
        replicas=url.take_count("replicas", 1),
        timeout=timeout,
    )
    if not url.host or url.path not in ("", "/"):
        raise ConfigError(f"{url}: write it as mooncake://master:port")
    if timeout > MOST_SECONDS:
        raise ConfigError(f"{url}: timeout must be {MOST_SECONDS:g} s or less: its client gives up at 60 s")
    if options.buffer < mmap.PAGESIZE:
        raise ConfigError(f"{url}: buffer must be a page or more")
    if 0 < options.segment < _LEAST_SEGMENT:
        raise ConfigError(f"{url}: segment must be 0, or 16 MiB and more")
    reached_from = _our_address(url, (url.host, port), timeout)
    return replace(options, hostname=options.hostname or reached_from)


def _our_address(url: TierURL, master: tuple[str, int], timeout: float) -> str:
    """The address from which we reach the master; also, whether we do: its client tries for 90 s."""
    try:
        with socket.create_connection(master, timeout) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"{url}: no master answers at {master[0]}:{master[1]} ({error}): start mooncake_master there"
        ) from error


def connect(url: TierURL, options: MooncakeOptions) -> Any:
    """A client, ready for use. Raises ConfigError."""
    store, calls = MooncakeDistributedStore(), Calls("mooncake", 1)
    setup = calls.begin(
        lambda: store.setup(
            options.hostname,
            options.metadata,
            options.segment,
            0,  # for calls that we do not use
            options.protocol,
            options.device,
            options.master,
        )
    )
    try:
        code = calls.end(setup, SETUP_SECONDS)
    except TierUnavailable as error:
        setup.add_done_callback(lambda _: store.close())
        raise ConfigError(f"{url}: Mooncake's client does not get ready: {error}") from error
    finally:
        calls.close(0)
    if code:
        raise ConfigError(
            f"{url}: Mooncake's client does not start ({code}): its log on standard error says why; are "
            "protocol=, device=, metadata= and hostname= right?"
        )
    return store
