"""Arguments of the `kvkeep` command; each subcommand is a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from kvkeep import __version__
from kvkeep.errors import CONFIG_EXIT, KVKeepError

__all__ = ["main"]

_COMMANDS = {
    "serve": ("kvkeep.cli.serve", "run a keeper that engines on this host share"),
    "status": ("kvkeep.cli.status", "show what a keeper holds"),
    "clear": ("kvkeep.cli.actions", "make a keeper forget what it holds"),
    "health": ("kvkeep.cli.actions", "whether keepers are up and ready"),
    "lookup": ("kvkeep.cli.actions", "how much of a prompt keepers hold in memory"),
    "pin": ("kvkeep.cli.actions", "keep a prompt, a prefix or a namespace from eviction"),
    "unpin": ("kvkeep.cli.actions", "let eviction have what was pinned"),
    "move": ("kvkeep.cli.actions", "have a prompt in memory, or in a tier, ahead of use"),
    "compress": ("kvkeep.cli.actions", "does nothing yet: there are no codecs"),
    "fsck": ("kvkeep.cli.fsck", "verify, and with --repair mend, all that a tier holds"),
    "warm": ("kvkeep.cli.warm", "have documents prefilled ahead of use"),
    "route": ("kvroute.command", "route requests to the engine that holds most of their prompt"),
    "doctor": ("kvkeep.cli.doctor", "check this machine and its engine for all that kvkeep needs"),
}
_BENCHES = {
    "copy": ("kvbench.copy", "paged KV ⇄ arena against a plain memcpy"),
    "lookup": ("kvbench.lookup", "hashing and lookup of long prompts through the socket"),
    "tier": ("kvbench.tier", "a tier below memory against its raw medium"),
    "policy": ("kvbench.policy", "eviction policies on a request trace"),
    "simulate": ("kvbench.simulate", "how much memory and disk a request trace needs"),
    "serve": ("kvbench.serve", "what users of an OpenAI-compatible server feel, under load"),
    "compare": ("kvbench.compare.command", "a workload over several set-ups in turn: table, picture, report"),
}

_EXTRAS = {"kvbench": "bench", "kvroute": "route"}  # what each package beside the cache needs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors of ours end in a message, not a traceback."""
    parser = argparse.ArgumentParser(
        prog="kvkeep", description="Keeps the KV cache of LLM inference, and gives it back."
    )
    parser.add_argument("--version", action="version", version=f"kvkeep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[:1]
    try:
        _add(commands, _COMMANDS, chosen)  # raises where the default socket's folder is another user's
        bench = commands.add_parser("bench", help="measure")
        benches = bench.add_subparsers(dest="bench", required=True, metavar="WHAT")
        _add(benches, _BENCHES, arguments[1:2] if chosen == ["bench"] else [])
        args = parser.parse_args(arguments)
        return int(args.run(args))
    except KVKeepError as error:
        print(f"kvkeep: {error}", file=sys.stderr)
        return CONFIG_EXIT
    except KeyboardInterrupt:
        return 130


def _add(
    group: argparse._SubParsersAction[argparse.ArgumentParser],
    table: dict[str, tuple[str, str]],
    chosen: list[str],
) -> None:
    for name, (module_name, help_text) in table.items():
        parser = group.add_parser(name, help=help_text, description=help_text)
        if chosen == [name]:  # only the command that runs is imported: `kvkeep status` stays fast
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if (package := module_name.partition(".")[0]) not in _EXTRAS:
                    raise
                remedy = f"pip install 'kvkeep[{_EXTRAS[package]}]'"
                parser.exit(CONFIG_EXIT, f"kvkeep: {name} needs the module {error.name}: {remedy}\n")
            module.add_arguments(parser)
            parser.set_defaults(run=module.run)
