"""`kvkeep status`: what a keeper holds, for people or as JSON."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from kvkeep.config import default_socket
from kvkeep.identity import tenant_of
from kvkeep.wire.client import Connection

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvkeep status`."""
    parser.add_argument(
        "--socket", default=default_socket(), help="socket of the keeper (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tenant", metavar="SALT", help="show the tenant of this cache_salt, and its name here"
    )


def run(args: argparse.Namespace) -> int:
    """Ask the keeper and print its figures."""
    with closing(Connection.open(args.socket, f"cli-{os.getpid()}", timeout=10.0)) as connection:
        figures: dict[str, Any] = connection.status(tenant_of(args.tenant))
    if args.json:
        print(json.dumps(figures))
    elif args.tenant:
        named = tenant_of(args.tenant).hex()
        rows = [row for row in figures["tenants"] if row["tenant"] == named]
        Console(highlight=False).print(
            _tenants(rows) if rows else f"tenant {named}: nothing is known of it here"
        )
    else:
        _print(figures)
    return 0


def _print(figures: dict[str, Any]) -> None:
    console = Console(highlight=False)
    counters = figures["counters"]
    console.print(
        f"keeper {figures['keeper'][:8]} (kvkeep {figures['version']}, pid {figures['pid']}), "
        f"up {figures['uptime_s']:.0f} s, policy {figures['policy']}"
    )
    used, total = figures["used_bytes"], figures["memory_bytes"]
    console.print(
        f"memory   {size(used)} of {size(total)} used ({100 * used / total:.0f} %), "
        f"{100 * figures['prefaulted_bytes'] / total:.0f} % prepared, "
        f"{100 * figures['huge_page_bytes'] / total:.0f} % huge pages, index {size(figures['index_bytes'])}"
    )
    console.print(
        f"hits     {_ratio(counters)} of the chunks asked for in {counters['lookups']} lookups; "
        f"{counters['stored_chunks']} stored ({size(counters['stored_bytes'])}), "
        f"{counters['evicted_chunks']} evicted, {counters['refused_chunks']} refused"
    )
    console.print(
        f"clients  {figures['sessions']} sessions, {figures['connections']} connections, "
        f"{figures['leases']} leases, {figures['reservations']} reservations, "
        f"{figures['protocol_errors']} protocol errors"
    )
    if (peers := figures.get("peers")) is not None:
        console.print(
            f"peers    at {peers['address']}: {peers['connections']} connections, "
            f"{peers['given_chunks']} chunks given ({size(peers['given_bytes'])}), "
            f"{peers['dropped']} dropped"
        )
    table = Table("#", "namespace", "fingerprint", "chunks", "bytes", "hit ratio", "lookups")
    for space in figures["namespaces"]:
        table.add_row(
            str(space["namespace"]),
            space["label"],
            space["fingerprint"][:12],
            str(space["chunks"]),
            size(space["used_bytes"]),
            _ratio(space),
            str(space["lookups"]),
        )
    console.print(table)
    if figures["tenants"]:
        console.print(_tenants(figures["tenants"]))
    if figures["tiers"]:
        console.print(_tiers(figures["tiers"]))


def _tenants(tenants: list[dict[str, Any]]) -> Table:
    table = Table(Column("tenant", no_wrap=True), "bytes", "quota", "hit ratio", "evicted", "refused")
    for row in tenants:
        quota = "–" if row["quota_bytes"] is None else size(row["quota_bytes"])
        counts = [str(row[f"{name}_chunks"]) for name in ("evicted", "refused")]
        table.add_row(row["tenant"], size(row["used_bytes"]), quota, _ratio(row), *counts)
    return table


def _tiers(tiers: list[dict[str, Any]]) -> Table:
    table = Table("tier", "state", "hits", "read", "written", "waiting", "lost", "damaged", "errors")
    for tier in tiers:
        rate = tier["read_GBps"]
        table.add_row(
            tier["url"],
            _state(tier),
            f"{tier['hits']} of {tier['hits'] + tier['misses'] + tier['damaged']}",
            size(tier["got_bytes"]) + (f" at {rate:.2f} GB/s" if rate else ""),
            size(tier["put_bytes"]),
            str(tier["waiting_chunks"]),
            str(tier["lost_chunks"]),
            str(tier["damaged"]),
            str(tier["errors"]),
        )
    return table


def _state(tier: dict[str, Any]) -> str:
    if tier["writable"]:
        return "on"
    return f"{'read only' if tier['available'] else 'off'}: {tier['last_error']}"


def _ratio(counters: dict[str, int]) -> str:
    asked = counters["asked_chunks"]
    return f"{100 * counters['hit_chunks'] / asked:.1f} %" if asked else "–"


def size(nbytes: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"
