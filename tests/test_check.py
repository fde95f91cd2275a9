"""scripts/check.py finds what it is there to find: each rule meets a violation planted for it."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load_script()


class Tree:
    """A kvkeep package in a temporary folder, in which each test plants what it needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("kvkeep/__init__.py", '__version__ = "0"\n')

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def sources(self, *folders: str) -> list:
        return check.load(self.root, *(folders or ("kvkeep", "kvbench")))

    def over_budget(self) -> list[tuple[str, str]]:
        return [(where, what) for where, what, _ in check.budgets(self.sources())[1]]

    def crossings(self, *folders: str) -> list[tuple[str, str]]:
        found = check.boundaries(self.sources(*folders))
        return [(where, what.partition(" uses ")[2]) for where, what, _ in found]

    def run(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), str(self.root)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def _function(lines: int, name: str = "f") -> str:
    return f"def {name}():\n" + "".join(f"    {name}{i} = {i}\n" for i in range(lines - 1))


# ---- the script as a whole


def test_a_clean_tree_passes_and_prints_each_figure_with_its_budget(tree: Tree) -> None:
    done = tree.run()
    assert done.returncode == 0, done.stdout + done.stderr
    for budget in (
        f"lines (under {check.PACKAGE_LINES['kvkeep']})",
        *("lines (under 400)", "lines (under 50)", "abstract methods (under 7)"),
        *("fields (under 30)", "functions under 35 lines: 100.0% (at least 90%)"),
    ):
        assert budget in done.stdout
    assert done.stdout.splitlines()[-1] == "check: fine, 1 files"


def test_a_problem_is_told_with_place_and_remedy_and_fails_the_run(tree: Tree) -> None:
    tree.write("kvkeep/keeper/a.py", "import torch\n")
    done = tree.run()
    assert done.returncode == 1
    expected = "kvkeep/keeper/a.py:1: kvkeep.keeper.a uses torch\n    remedy: move it to kvkeep/transfer\n"
    assert expected in done.stdout
    assert done.stdout.splitlines()[-1] == "check: 1 problem(s)"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kvkeep/a.py", _function(50)),
        ("kvkeep/a.py", "try:\n    pass\nexcept Exception:\n    pass\n"),
        ("kvkeep/a.py", "\n".join([*(f"x{i} = 1" for i in range(8)), ""]) * 2),
        ("kvkeep/__init__.py", "import numba_is_not_here\n"),
        ("tests/a.py", "import pickle\n"),
        ("demo/a.py", "import pickle\n"),
        ("scripts/a.py", "import pickle\n"),
        ("benchmarks/a/b.py", "import pickle\n"),
        ("benchmarks/a/b.py", "import vllm\n"),
    ],
)
def test_every_rule_reaches_the_exit_code(tree: Tree, path: str, text: str) -> None:
    tree.write(path, text)
    assert tree.run().returncode == 1


def test_environments_are_not_ours(tree: Tree) -> None:
    tree.write("benchmarks/peer/.venv/lib/a.py", "import pickle\n")
    assert tree.run().returncode == 0


# ---- budgets: the last size that passes, the first that does not


def test_file_length(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "#\n" * 399)
    assert tree.over_budget() == []
    tree.write("kvkeep/a.py", "#\n" * 400)
    assert tree.over_budget() == [("kvkeep/a.py", "400 lines, budget: under 400")]


def _fill(tree: Tree, package: str, lines: int) -> None:
    """Files of together so many lines."""
    for number in range(0, lines, 394):
        tree.write(f"{package}/a{number}.py", "#\n" * min(394, lines - number))


def test_package_length(tree: Tree) -> None:
    """Each part has its own, and an adapter's lines are not the package's too."""
    most = check.PACKAGE_LINES
    adapter = "kvkeep/engines/vllm"
    _fill(tree, "kvkeep", most["kvkeep"] - 10)
    _fill(tree, adapter, most[adapter] - 10)
    assert tree.over_budget() == []
    tree.write("kvkeep/more.py", "#\n" * 9)
    over = [("kvkeep", f"{most['kvkeep']} lines, budget: under {most['kvkeep']}")]
    assert tree.over_budget() == over
    tree.write(f"{adapter}/more.py", "#\n" * 10)
    assert tree.over_budget()[1:] == [(adapter, f"{most[adapter]} lines, budget: under {most[adapter]}")]
    _fill(tree, "kvbench", 6304)
    assert tree.over_budget()[2:] == [("kvbench", "6304 lines, budget: under 6000")]


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_function_length(tree: Tree, keyword: str) -> None:
    short = "".join(_function(2, f"g{i}_") for i in range(20))
    tree.write("kvkeep/a.py", short + _function(49).replace("def", keyword))
    assert tree.over_budget() == []
    tree.write("kvkeep/a.py", short + _function(50).replace("def", keyword))
    assert tree.over_budget() == [("kvkeep/a.py:41 f", "50 lines, budget: under 50")]


def test_nine_functions_of_ten_are_short(tree: Tree) -> None:
    nine = "".join(_function(34, f"g{i}_") for i in range(9))
    tree.write("kvkeep/a.py", nine + _function(35))
    assert tree.over_budget() == []
    tree.write("kvkeep/b.py", _function(35, "h"))
    assert [what.split(" (")[0] for _, what in tree.over_budget()] == ["functions under 35 lines: 81.8%"]


@pytest.mark.parametrize(
    ("base", "decorator"),
    [("ABC", "@abstractmethod"), ("ABC", "@abc.abstractmethod"), ("Protocol", ""), ("Protocol[T]", "")],
)
def test_interface_width(tree: Tree, base: str, decorator: str) -> None:
    methods = [f"    {decorator}\n    def m{i}(self): ...\n" for i in range(7)]
    tree.write("kvkeep/a.py", f"class A({base}):\n" + "".join(methods[:6]))
    assert tree.over_budget() == []
    tree.write("kvkeep/a.py", f"class A({base}):\n" + "".join(methods))
    assert tree.over_budget() == [("kvkeep/a.py:1 A", "7 abstract methods, budget: under 7")]


def test_a_socket_protocol_is_no_interface(tree: Tree) -> None:
    methods = "".join(f"    def m{i}(self): ...\n" for i in range(7))
    tree.write("kvkeep/a.py", f"class A(asyncio.Protocol):\n{methods}")
    assert tree.over_budget() == []


def test_configuration_fields_count_over_all_dataclasses_of_config(tree: Tree) -> None:
    half = "@dataclass(frozen=True)\nclass {}:\n" + "".join(f"    f{i}: int\n" for i in range(15))
    fourteen = (
        half.format("B").replace("    f14: int\n", "    F: int = 0\n    m = 1\n").replace("    f0: int\n", "")
    )
    tree.write("kvkeep/config.py", half.format("A") + fourteen)
    tree.write("kvkeep/other.py", half.format("C") + half.format("D"))  # not configuration
    assert tree.over_budget() == []
    tree.write("kvkeep/config.py", half.format("A") + half.format("B"))
    assert tree.over_budget() == [("kvkeep/config.py", "30 fields, budget: under 30")]


# ---- boundaries


@pytest.mark.parametrize(
    ("path", "line", "target"),
    [
        ("kvkeep/errors.py", "from kvkeep.config import X", "kvkeep.config.X"),
        ("kvkeep/config.py", "from kvkeep.layout import X", "kvkeep.layout.X"),
        ("kvkeep/layout.py", "import kvkeep.identity", "kvkeep.identity"),
        ("kvkeep/identity.py", "from kvkeep.keeper.index import X", "kvkeep.keeper.index.X"),
        ("kvkeep/keeper/a.py", "from kvkeep.engines.vllm import X", "kvkeep.engines.vllm.X"),
        ("kvkeep/keeper/a.py", "from kvkeep.transfer import X", "kvkeep.transfer.X"),
        ("kvkeep/keeper/a.py", "from kvkeep import wire", "kvkeep.wire"),
        ("kvkeep/keeper/a.py", "from ..wire import client", "kvkeep.wire.client"),
        ("kvkeep/keeper/__init__.py", "from .. import wire", "kvkeep.wire"),
        ("kvkeep/keeper/a.py", "from kvkeep.cli import main", "kvkeep.cli.main"),
        ("kvkeep/keeper/a.py", "import torch.nn as nn", "torch.nn"),
        ("kvkeep/wire/client.py", "from kvkeep.keeper.keeper import X", "kvkeep.keeper.keeper.X"),
        ("kvkeep/wire/server.py", "from kvkeep.transfer import X", "kvkeep.transfer.X"),
        ("kvkeep/wire/server.py", "from torch import Tensor", "torch.Tensor"),
        ("kvkeep/transfer/a.py", "from kvkeep.engines import X", "kvkeep.engines.X"),
        ("kvkeep/transfer/a.py", "from vllm import LLM", "vllm.LLM"),
        ("kvkeep/engines/sglang/a.py", "import vllm", "vllm"),
        ("kvkeep/engines/vllm/a.py", "import transformers", "transformers"),
        ("kvkeep/engines/transformers/a.py", "import vllm", "vllm"),
        ("kvkeep/engines/vllm/a.py", "from kvkeep.keeper import X", "kvkeep.keeper.X"),
        ("kvkeep/engines/vllm/a.py", "from kvkeep.cli import main", "kvkeep.cli.main"),
        ("kvkeep/cli/a.py", "import torch", "torch"),
        ("kvbench/a.py", "import vllm", "vllm"),
        ("kvkeep/tiers/a.py", "from kvkeep.keeper import X", "kvkeep.keeper.X"),
        ("kvkeep/tiers/a.py", "from kvkeep.observe.watch import X", "kvkeep.observe.watch.X"),
        ("kvkeep/keeper/a.py", "from kvkeep.observe.watch import X", "kvkeep.observe.watch.X"),
        ("kvkeep/observe/a.py", "from kvkeep.wire.server import X", "kvkeep.wire.server.X"),
        ("kvkeep/observe/histogram.py", "from kvkeep.keeper.keeper import X", "kvkeep.keeper.keeper.X"),
        ("kvkeep/__init__.py", "from kvkeep.keeper import X", "kvkeep.keeper.X"),
        ("kvbench/a.py", "import pickle", "pickle"),
        ("kvkeep/cli/a.py", "from kvbench.engine import X", "kvbench.engine.X"),
        ("kvkeep/config.py", "from cloudpickle import dumps", "cloudpickle.dumps"),
        ("kvkeep/engines/vllm/a.py", "import marshal", "marshal"),
        ("kvkeep/keeper/a.py", "X = np.load(path, allow_pickle=True)", "pickle"),
        ("kvkeep/keeper/a.py", "X = os.environ['X']", "os.environ"),
        ("kvkeep/cli/a.py", "X = os.getenv('X')", "os.getenv"),
        ("kvkeep/engines/vllm/a.py", "from os import path, environ", "os.environ"),
    ],
)
@pytest.mark.parametrize("form", ["{}\n", "def f():\n    {}\n", "if TYPE_CHECKING:\n    {}\n"])
def test_a_crossing_is_found_wherever_it_stands(
    tree: Tree, path: str, line: str, target: str, form: str
) -> None:
    tree.write(path, form.format(line))
    assert tree.crossings() == [(f"{path}:{form.count(chr(10))}", target)]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kvkeep/config.py", "from kvkeep.errors import X"),
        ("kvkeep/config.py", "X = os.environ.get('X')"),
        ("kvkeep/identity.py", "from kvkeep.layout import X"),
        ("kvkeep/keeper/a.py", "from kvkeep.keeper.index import X"),
        ("kvkeep/keeper/a.py", "from .index import X"),
        ("kvkeep/keeper/a.py", "from kvkeep.identity import X"),
        ("kvkeep/keeper/a.py", "X = os.path.join(os.sep, os.fspath(p))"),
        ("kvkeep/keeper/a.py", "X = np.load(path, allow_pickle=False)"),
        ("kvkeep/keeper/a.py", "import torchless, vllmish, numpy"),
        ("kvkeep/wire/server.py", "from kvkeep import __version__"),
        ("kvkeep/wire/server.py", "from kvkeep.keeper.keeper import X"),
        ("kvkeep/wire/server.py", "from kvkeep.wire import messages"),
        ("kvkeep/transfer/a.py", "import torch"),
        ("kvkeep/engines/vllm/a.py", "import torch, vllm.v1"),
        ("kvkeep/engines/vllm/a.py", "from kvkeep.wire.client import X"),
        ("kvkeep/engines/transformers/a.py", "import torch, transformers.cache_utils"),
        ("kvkeep/tiers/a.py", "from kvkeep.tiers.base import X"),
        ("kvkeep/tiers/a.py", "from kvkeep.observe.histogram import X"),
        ("kvkeep/observe/a.py", "from kvkeep.keeper.keeper import X"),
        ("kvkeep/wire/server.py", "from kvkeep.observe.watch import X"),
        ("kvkeep/cli/a.py", "from kvkeep.wire.server import X"),
        ("kvbench/a.py", "import torch\nfrom kvkeep.keeper.keeper import X\nfrom kvbench.b import X"),
    ],
)
def test_what_is_allowed_passes(tree: Tree, path: str, line: str) -> None:
    tree.write(path, line + "\n")
    assert tree.crossings() == []


def test_outside_the_package_only_pickle_is_forbidden(tree: Tree) -> None:
    text = "import os, torch, vllm\nfrom kvkeep.keeper.keeper import X\nY = os.environ\nimport pickle\n"
    for folder in ("demo", "scripts", "tests"):
        tree.write(f"{folder}/a.py", text)
        assert tree.crossings(folder) == [(f"{folder}/a.py:4", "pickle")]


# ---- broad except


@pytest.mark.parametrize(
    "handler",
    ["except Exception as e:", "except:", "except BaseException:", "except (OSError, Exception):"],
)
def test_a_broad_except_is_allowed_once_in_each_engine_adapter(tree: Tree, handler: str) -> None:
    text = f"try:\n    pass\n{handler}\n    pass\n"
    tree.write("kvkeep/engines/vllm/a.py", text)
    tree.write("kvkeep/engines/sglang.py", text)
    assert check.broad_excepts(tree.sources()) == []
    tree.write("kvkeep/engines/vllm/b.py", text)
    tree.write("kvkeep/wire/c.py", text)
    found = [(where, what) for where, what, _ in check.broad_excepts(tree.sources())]
    assert found == [
        ("kvkeep/engines/vllm/b.py:3", "broad except: a second one in kvkeep.engines.vllm"),
        ("kvkeep/wire/c.py:3", "broad except: not at an edge"),
    ]


def test_suppressing_everything_is_a_broad_except(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "with contextlib.suppress(Exception):\n    pass\n")
    assert [problem.where for problem in check.broad_excepts(tree.sources())] == ["kvkeep/a.py:1"]


def test_a_named_or_passed_on_error_is_no_broad_except(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "try:\n    pass\nexcept OSError:\n    pass\n")
    tree.write("kvkeep/b.py", "try:\n    pass\nexcept BaseException:\n    close()\n    raise\n")
    tree.write("kvkeep/c.py", "with suppress(OSError):\n    pass\n")
    assert check.broad_excepts(tree.sources()) == []


# ---- duplicates


def _code(lines: int) -> list[str]:
    return [f"    x{i} = call({i})" for i in range(lines)]


def test_eight_equal_lines_in_two_files_are_a_duplicate(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "\n".join(["def f():", *_code(8)]))
    tree.write("kvkeep/b.py", "\n".join(["", "def g():", *_code(7), "    y = 0"]))
    assert check.duplicates(tree.sources()) == []
    tree.write("kvkeep/b.py", "\n".join(["", "def g():", *_code(8), "    y = 0"]))
    (problem,) = check.duplicates(tree.sources())
    assert (problem.where, problem.what.rpartition(" ")[2]) == ("kvkeep/a.py:2", "kvkeep/b.py:3")


def test_a_long_run_is_told_once(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "\n".join(["def f():", *_code(20)]))
    tree.write("kvkeep/b.py", "\n".join(["def g():", *_code(20)]))
    assert len(check.duplicates(tree.sources())) == 1


def test_layout_and_comments_do_not_hide_a_duplicate(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "\n".join(["def f():", *_code(8)]))
    dressed = [f"    {line}   # {i}\n\n        # why\n" for i, line in enumerate(_code(8))]
    tree.write("kvkeep/b.py", "\n".join(["class A:", "    def g():", '        """Doc."""', *dressed]))
    assert [problem.where for problem in check.duplicates(tree.sources())] == ["kvkeep/a.py:2"]


def test_a_duplicate_within_one_file_counts_but_not_a_run_with_itself(tree: Tree) -> None:
    tree.write("kvkeep/a.py", "\n".join(["def f():", *["    x()"] * 12]))
    assert check.duplicates(tree.sources()) == []
    tree.write("kvkeep/a.py", "\n".join(["def f():", *_code(8), "def g():", *_code(8)]))
    assert [problem.where for problem in check.duplicates(tree.sources())] == ["kvkeep/a.py:2"]


def test_equal_imports_and_docstrings_are_no_duplicate(tree: Tree) -> None:
    text = "\n".join(['"""Doc', *(f"line {i}" for i in range(9)), '"""', *(f"import m{i}" for i in range(9))])
    tree.write("kvkeep/a.py", text)
    tree.write("kvkeep/b.py", text)
    assert check.duplicates(tree.sources()) == []


# ---- import kvkeep


@pytest.mark.parametrize("name", ["torch", "vllm", "numba"])
def test_a_heavy_library_is_found_behind_the_import(tree: Tree, name: str) -> None:
    tree.write(f"{name}.py", "")  # found first: a stand-in that loads at once
    assert check.light_import(tree.root) == []
    tree.write("kvkeep/a.py", f"import {name}\n")
    tree.write("kvkeep/__init__.py", "from kvkeep import a\n")
    assert [problem.what for problem in check.light_import(tree.root)] == [f"pulls {name}"]


def test_a_slow_import_is_found(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "IMPORT_SECONDS", 0.0)
    assert [problem.what.split()[0] for problem in check.light_import(tree.root)] == ["takes"]


def test_a_failing_import_is_told(tree: Tree) -> None:
    tree.write("kvkeep/__init__.py", "import a_module_that_is_not_there\n")
    (problem,) = check.light_import(tree.root)
    assert "a_module_that_is_not_there" in problem.what
