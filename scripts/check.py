#!/usr/bin/env python3
"""Checks that no linter makes: size budgets, import boundaries, a light `import kvkeep`, our own duplicates.

    python scripts/check.py [ROOT]      # prints each figure against its budget, then what is wrong

Exit code 1 when anything is wrong. Needs nothing but the standard library.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

# All budgets: stay under. By what is read together: the cache, one engine's adapter, what measures it.
PACKAGE_LINES = {
    "kvkeep": 16_250,  # without the adapters
    "kvkeep/engines/vllm": 3_150,
    "kvkeep/engines/transformers": 1_500,
    "kvbench": 6_000,
    "kvroute": 4_000,
}
FILE_LINES, FUNCTION_LINES = 400, 50
USUAL_FUNCTION_LINES, USUAL_SHARE = 35, 0.9  # nine functions of ten stay under this
ABSTRACT_METHODS, CONFIG_FIELDS = 7, 30
DUPLICATE_LINES, IMPORT_SECONDS = 8, 1.0

# What a part of the tree may import or use of GUARDED, beside itself; the longest name that fits counts.
_LOW = (
    *("kvkeep.errors", "kvkeep.config", "kvkeep.layout"),
    *(
        "kvkeep.identity",
        "kvkeep.terms",
        "kvkeep.background",
        "kvkeep.pages",
        "kvkeep.presence",
        "kvkeep.tls",
    ),
)
_ENGINE = (*_LOW, "kvkeep.wire", "kvkeep.observe", "kvkeep.transfer", "torch")
MAY_USE: dict[str, tuple[str, ...]] = {
    "kvkeep": (*_LOW, "kvkeep.wire", "kvkeep.observe"),  # whatever is not named below
    "kvkeep.errors": (),
    "kvkeep.background": (),
    "kvkeep.terms": (),
    "kvkeep.pages": ("kvkeep.background", "kvkeep.errors"),
    "kvkeep.presence": ("kvkeep.pages",),
    "kvkeep.tls": _LOW[:1],
    "kvkeep.config": (*_LOW[:1], "os"),
    "kvkeep.layout": _LOW[:2],
    "kvkeep.identity": _LOW[:3],
    "kvkeep.observe": (*_LOW, "kvkeep.keeper", "kvkeep.tiers"),
    "kvkeep.observe.histogram": (),
    "kvkeep.keeper": _LOW,
    **dict.fromkeys(("kvkeep.keeper.movers", "kvkeep.keeper.probes"), (*_LOW, "kvkeep.tiers")),
    "kvkeep.tiers": (*_LOW, "kvkeep.observe.histogram"),
    "kvkeep.transfer": (*_LOW, "torch"),
    "kvkeep.wire": (*_LOW, "kvkeep.observe"),
    "kvkeep.wire.connection": (*_LOW, "kvkeep.observe", "kvkeep.keeper"),
    "kvkeep.wire.peers": (*_LOW, "kvkeep.keeper", "kvkeep.tiers"),
    "kvkeep.wire.server": (*_LOW, "kvkeep.observe", "kvkeep.keeper", "kvkeep.tiers"),
    "kvkeep.engines": _ENGINE,
    "kvkeep.engines.vllm": (*_ENGINE, "vllm"),
    "kvkeep.engines.transformers": (*_ENGINE, "transformers"),
    "kvkeep.cli": ("kvkeep",),
    "kvbench": ("kvbench", "kvkeep", "torch"),
    "kvroute": ("kvroute", *_LOW, "kvkeep.observe"),
    "benchmarks.offloading": ("kvkeep", "torch", "vllm"),  # runs within an engine
    "benchmarks": ("kvbench", "kvroute", "kvkeep", "transformers"),  # as a user would: engines are processes
    **dict.fromkeys(
        ("benchmarks.gpu", "benchmarks.transformers_ttft"), ("kvbench", "kvkeep", "torch", "transformers")
    ),
    **dict.fromkeys(
        ("demo", "scripts", "tests"), ("kvbench", "kvroute", "kvkeep", "torch", "vllm", "transformers", "os")
    ),
}
_PICKLE = "no pickle anywhere (reading one runs its writer's code): msgspec, struct, or numpy without it"
_ENVIRON = "make it a field in kvkeep/config.py"
GUARDED = {  # what is not here is free to import
    "kvkeep": "imports flow one way: move it, or turn it round",
    "kvbench": "the cache does not know what measures it",
    "kvroute": "the cache does not know who asks where it is",
    "torch": "move it to kvkeep/transfer",
    "vllm": "move it to kvkeep/engines/vllm",
    "transformers": "move it to kvkeep/engines/transformers",
    **{f"os.{name}": _ENVIRON for name in ("environ", "environb", "getenv", "getenvb", "putenv")},
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"), _PICKLE),
}
HEAVY = ("torch", "vllm", "numba", "transformers", "triton")  # what `import kvkeep` must not pull


class Problem(NamedTuple):
    where: str
    what: str
    remedy: str


class Source(NamedTuple):
    path: str
    module: str  # its dotted name
    text: str
    nodes: list[ast.AST]


def main() -> int:
    """Check the tree around this script, or the one that is named."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    sources, outside = (
        load(root, "kvkeep", "kvbench", "kvroute"),
        load(root, "benchmarks", "demo", "scripts", "tests"),
    )
    figures, problems = budgets(sources)
    problems += boundaries(sources + outside) + broad_excepts(sources) + duplicates(sources)
    problems += light_import(root)
    report = [f"  {figure}" for figure in figures]
    report += [f"{where}: {what}\n    remedy: {remedy}" for where, what, remedy in problems]
    print(*report, sep="\n")
    print(f"check: {len(problems)} problem(s)" if problems else f"check: fine, {len(sources)} files")
    return 1 if problems else 0


def load(root: Path, *folders: str) -> list[Source]:
    """Parse all Python files under these folders of `root`, but not in hidden ones (environments)."""
    found = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8")
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found.append(Source(str(relative), module, text, list(ast.walk(ast.parse(text, str(relative))))))
    return found


def budgets(sources: list[Source]) -> tuple[list[str], list[Problem]]:
    """Return each figure beside its budget, and what is over it."""
    files = [(len(source.text.splitlines()), source.path) for source in sources]
    functions, interfaces, fields = [], [], 0
    packages = {name: sum(n for n, path in files if _part(path) == name) for name in PACKAGE_LINES}
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                functions.append((lines, f"{source.path}:{node.lineno} {node.name}"))
            elif isinstance(node, ast.ClassDef):
                interfaces.append((_abstract_methods(node), f"{source.path}:{node.lineno} {node.name}"))
                if source.module == "kvkeep.config" and "dataclass" in map(_name, node.decorator_list):
                    fields += sum(isinstance(item, ast.AnnAssign) for item in node.body)
    long = [(lines, where) for lines, where in functions if lines >= USUAL_FUNCTION_LINES]
    share = 1 - len(long) / max(1, len(functions))
    figures = [f"functions under {USUAL_FUNCTION_LINES} lines: {share:.1%} (at least {USUAL_SHARE:.0%})"]
    problems = []
    if share < USUAL_SHARE:
        names = ", ".join(where for _, where in long)
        problems.append(Problem("kvkeep", figures[0], f"split some of {names}"))
    for title, counted, budget, unit, remedy in (
        *(
            ("package", [(packages[name], name)], budget, "lines", "a second way removes the first")
            for name, budget in PACKAGE_LINES.items()
        ),
        ("longest file", files, FILE_LINES, "lines", "split it by what changes together"),
        ("longest function", functions, FUNCTION_LINES, "lines", "name its steps"),
        ("widest interface", interfaces, ABSTRACT_METHODS, "abstract methods", "split it, or compose"),
        ("configuration", [(fields, "kvkeep/config.py")], CONFIG_FIELDS, "fields", "derive one, or drop one"),
    ):
        top, where = max(counted, default=(0, "none"))
        figures.append(f"{title}: {top} {unit} (under {budget}), {where}")
        over = [(n, place) for n, place in counted if n >= budget]
        problems += [Problem(place, f"{n} {unit}, budget: under {budget}", remedy) for n, place in over]
    return figures, problems


def boundaries(sources: list[Source]) -> list[Problem]:
    """Return the imports and uses that MAY_USE does not list, wherever in a file they stand."""
    problems = []
    for source in sources:
        part = max((name for name in MAY_USE if _under(source.module, name)), key=len)
        own = [".".join(source.module.split(".")[:2])] if "." in source.module else []
        for line, name in _uses(source):
            remedy = next((text for guarded, text in GUARDED.items() if _under(name, guarded)), None)
            if remedy is not None and not _under(name, *own, *MAY_USE[part], "kvkeep.__version__"):
                problems.append(Problem(f"{source.path}:{line}", f"{source.module} uses {name}", remedy))
    return problems


def broad_excepts(sources: list[Source]) -> list[Problem]:
    """Return what swallows every error: one such handler is allowed at each edge to what is not ours, an
    engine in its adapter, a store's client in the guard of tiers."""
    problems, excused = [], set[str]()
    for source in sources:
        adapter = (re.match(r"kvkeep\.(engines\.\w+|tiers\.guard)", source.module) or [""])[0]
        for line in [getattr(node, "lineno", 0) for node in source.nodes if _is_broad(node)]:
            if adapter in excused or not adapter:
                what = (
                    f"broad except: a second one in {adapter}" if adapter else "broad except: not at an edge"
                )
                problems.append(
                    Problem(f"{source.path}:{line}", what, "name the errors, or let them through")
                )
            excused.add(adapter)
    return problems


def duplicates(sources: list[Source]) -> list[Problem]:
    """Return runs of DUPLICATE_LINES or more lines of code that stand in two places."""
    size, windows = DUPLICATE_LINES, dict[tuple[str, ...], list[tuple[str, int]]]()
    codes = {source.path: list(_code_lines(source)) for source in sources}
    for path, code in codes.items():
        for i in range(len(code) - size + 1):
            windows.setdefault(tuple(text for _, text in code[i : i + size]), []).append((path, i))
    pairs = {pair for places in windows.values() for pair in combinations(places, 2)}
    problems = []
    for (path_a, a), (path_b, b) in sorted(pairs):
        overlap = path_a == path_b and b - a < size
        if not overlap and ((path_a, a - 1), (path_b, b - 1)) not in pairs:  # else it began a line before
            what = f"{size} lines or more that also stand at {path_b}:{codes[path_b][b][0]}"
            problems.append(Problem(f"{path_a}:{codes[path_a][a][0]}", what, "make them one function"))
    return problems


def light_import(root: Path) -> list[Problem]:
    """Import the package in a fresh interpreter: it must be quick and leave the heavy libraries alone."""
    code = (
        "import sys, time; start = time.perf_counter(); import kvkeep; took = time.perf_counter() - start;"
        f"print(took, *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    took, *heavy = done.stdout.split() or ["0"]
    wrong = [f"pulls {name}" for name in heavy]
    if done.returncode != 0 or float(took) > IMPORT_SECONDS:
        wrong.append(done.stderr.strip() or f"takes {float(took):.2f} s, budget {IMPORT_SECONDS} s")
    return [Problem("import kvkeep", what, "import it only where it is used") for what in wrong]


def _uses(source: Source) -> Iterator[tuple[int, str]]:
    """Yield line and full name of all that is imported, and of what is taken from the module os."""
    package = source.module.split(".")[: None if source.path.endswith("__init__.py") else -1]
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = [*base, node.module] if node.module else base
            yield from ((node.lineno, ".".join([*origin, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and _name(node.value) == "os":
            yield node.lineno, f"os.{node.attr}"
        elif isinstance(node, ast.keyword) and ast.unparse(node) == "allow_pickle=True":
            yield node.lineno, "pickle"


def _part(path: str) -> str:
    """The longest name in PACKAGE_LINES that a file lies under."""
    return max((name for name in PACKAGE_LINES if path.startswith(f"{name}/")), key=len)


def _code_lines(source: Source) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is no comment, docstring, import or mere bracket."""
    skipped: set[int] = set()
    for node in source.nodes:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) + 1))
    for number, line in enumerate(source.text.splitlines(), 1):
        text = " ".join(re.sub(r"(^|\s)#\s.*$", "", line).split())
        if number not in skipped and re.search(r"\w", text):
            yield number, text


def _is_broad(node: ast.AST) -> bool:
    kinds: list[ast.expr] = []
    if isinstance(node, ast.ExceptHandler):
        kinds = [node.type] if node.type else [ast.Name("Exception")]
        kinds = kinds[0].elts if isinstance(kinds[0], ast.Tuple) else kinds
        if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
            kinds = []  # it tidies up and passes the error on
    elif isinstance(node, ast.Call) and _name(node.func) == "suppress":
        kinds = node.args
    return any(_name(kind) in ("Exception", "BaseException") for kind in kinds)


def _abstract_methods(node: ast.ClassDef) -> int:
    protocol = any(ast.unparse(base).split("[")[0] in ("Protocol", "typing.Protocol") for base in node.bases)
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sum(protocol or "abstractmethod" in map(_name, item.decorator_list) for item in methods)


def _name(node: ast.expr) -> str:
    """Return `x` for each of x, a.x, x(...) and a.x(...)."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _under(module: str, *names: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


if __name__ == "__main__":
    sys.exit(main())
