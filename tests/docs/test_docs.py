"""The pages say what the code does: links, examples, options, metrics and messages are held against it."""

import argparse
import ast
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.cli.main import _BENCHES, _COMMANDS
from kvkeep.config import EngineConfig, KeeperConfig, parse_bytes
from kvkeep.terms import GroupSpec
from kvkeep.wire import messages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = "# runs in tests"
CURL = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=20).read().decode())"
UNSET = {"none", "automatic", "by content"}  # how a page says None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def section(page: str, heading: str) -> str:
    """Text under one `## heading`, up to the next."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/{page} has no section {heading!r}"
    return found[1]


def first_cells(text: str) -> Iterator[list[str]]:
    """Cells of the table rows that begin with something in backticks."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def console_lines(runnable: bool) -> list[tuple[str, str]]:
    """(page, command) of each `kvkeep …` line in console blocks; `runnable`: of marked ones, `curl …` too."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.splitlines()
            if not runnable or lines[0] == RUNS:
                programs = ("kvkeep ", "curl ") if runnable else ("kvkeep ",)
                found += [(name_of(page), line) for line in lines if line.startswith(programs)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {target}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" in index} == pages


def test_marked_commands_run(keeper_process: Callable[..., Any]) -> None:
    keeper = keeper_process("--http", "127.0.0.1:0")
    (address,) = re.findall(r"http://(127\.0\.0\.1:\d+)", keeper.log.read_text())
    environ = {**os.environ, "KVKEEP_SOCKET": keeper.socket}
    commands = console_lines(runnable=True)
    assert len({command for _, command in commands}) >= 4
    for command in sorted({command for _, command in commands}):
        program, *words = shlex.split(command.replace("127.0.0.1:9400", address), comments=True)
        words[:0] = [sys.executable, *(["-m", "kvkeep.cli"] if program == "kvkeep" else ["-c", CURL])]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert done.stdout.strip(), f"{command} said nothing"


@pytest.mark.parametrize("command", sorted({command for _, command in console_lines(runnable=False)}))
def test_other_commands_have_these_options(command: str) -> None:
    words = shlex.split(command.rstrip(" &"), comments=True)[1:]
    module, options = _COMMANDS.get(words[0], ("", ""))[0], words[1:]
    if words[0] == "bench":
        module, options = _BENCHES[words[1]][0], words[2:]
    parser = argparse.ArgumentParser(f"kvkeep {words[0]}", exit_on_error=False)
    importlib.import_module(module).add_arguments(parser)
    parser.parse_args(options)


def test_commands_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for words in re.findall(r"`kvkeep ([a-z]+(?: [a-z]+)?)", page.read_text()):
            command, _, what = words.partition(" ")
            assert command in {*_COMMANDS, "bench"}, f"{name_of(page)}: kvkeep {words}"
            assert command != "bench" or not what or what in _BENCHES, f"{name_of(page)}: kvkeep {words}"


def test_engine_options() -> None:
    told = {row[0].strip("`"): row[1] for row in first_cells(section("vllm.md", "Options"))}
    fields = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    assert list(told) == list(fields)
    for name, text in told.items():
        assert same(text, fields[name]), f"docs/vllm.md: {name} is {fields[name]!r}, not {text}"


def test_keeper_options() -> None:
    text = (ROOT / "docs" / "keeper.md").read_text()
    told = {row[0].strip("`-").replace("-", "_"): row[1] for row in first_cells(text)}
    many = {"tier": "tiers", "tenant_quota": "tenant_quotas"}  # given once for each
    told = {many.get(name, name): text for name, text in told.items()}
    fields = {field.name: field.default for field in dataclasses.fields(KeeperConfig)}
    assert list(told) == list(fields)
    for name, value in fields.items():
        assert name == "socket" or same(told[name], value), f"docs/keeper.md: {name} is {value!r}"


def same(text: str, value: object) -> bool:
    """Whether a page's word for a default is that default."""
    if value in (None, ()):
        return text in UNSET
    if isinstance(value, bool):
        return text in (("true", "yes") if value else ("false", "no"))
    if isinstance(value, int):
        return parse_bytes(text) == value
    return float(text) == value if isinstance(value, float) else text == value


def test_metrics() -> None:
    # Parsed, not imported: that would import vLLM.
    tree = ast.parse((ROOT / "kvkeep" / "engines" / "vllm" / "stats.py").read_text())
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "COUNTERS"
    ]
    assert table is not None
    counters = {f"vllm:kvkeep_{name}_total" for name in ast.literal_eval(table)}
    told = [row[0].strip("`") for row in first_cells(section("vllm.md", "Metrics"))]
    assert sorted(told) == sorted({*counters, "vllm:kvkeep_attached"})
    for page in PAGES:
        for name in re.findall(r"vllm:kvkeep_\w+\w", page.read_text()):
            assert name in told, f"{name_of(page)}: no metric {name}"


def test_messages() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    told = dict(re.findall(r"^(?:\| |- )`(\w+)\((.*?)\)`", text, re.MULTILINE))
    structs = {
        name: ", ".join(value.__struct_fields__)
        for name in messages.__all__
        if isinstance(value := getattr(messages, name), type) and issubclass(value, msgspec.Struct)
    }
    structs["GroupSpec"] = ", ".join(GroupSpec._fields)
    assert told == structs
    assert f"version {messages.VERSION}" in text.splitlines()[0]
    assert f"{messages.MAX_FRAME >> 20} MiB" in section("protocol.md", "Frames")
    for name in re.findall(r"`([A-Z][A-Za-z]+)`", text):
        assert name in structs, f"docs/protocol.md: no message {name}"


def test_no_local_paths() -> None:
    for page in PAGES:
        assert not re.search(r"/home/|/Users/", page.read_text()), name_of(page)
