"""The plan's YAML: what is wrong is named by line and key; the page's example and tables agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from kvbench.compare.figures import Figure, Range, Reading, rows
from kvbench.compare.plan import BUILT_IN, Plan, SetUp, read
from kvbench.compare.records import Run, Spread, Summary
from kvkeep.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "bench-compare.md"
GOOD = """\
workload: w
rates: [1, 2]
kv_cache_gib: 1
setups:
  - name: a
    command: serve {port}
    ready: http://127.0.0.1:{port}/health
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("rates: [1, 2]", "rates: [1, 0]", 2, r"rates\[1\]: Expected `float` > 0"),
        ("rates: [1, 2]", "rates: [1, 1.0]", 2, "rates: a rate stands there twice"),
        ("rates: [1, 2]", "rates: []", 2, "rates: Expected `array` of length >= 1"),
        ("rates: [1, 2]\n", "", 1, "missing required field `rates`"),
        ("workload: w", "workload: w\nrunds: 2", 2, "runds: unknown key 'runds': did you mean 'rounds'?"),
        ("kv_cache_gib: 1", "kv_cache_gib: one", 3, "kv_cache_gib: Expected `int`, got `str`"),
        ("kv_cache_gib: 1", "kv_cache_gib: 1\nmemory: lots", 4, "memory: not a size: 'lots'"),
        ("kv_cache_gib: 1", "kv_cache_gib: 1\ncores: first", 4, "cores: not cores: 'first'"),
        ("kv_cache_gib: 1", "kv_cache_gib: 1\nload: it's", 4, "load: not a command line: No closing quot"),
        ("    ready", "    redy", 7, r"setups\[0\].redy: unknown key 'redy': did you mean 'ready'?"),
        ("http://127.0.0.1:{port}/health", "'http://['", 7, r"setups\[0\].ready: not a URL"),
        ("http://127", "127", 7, r"setups\[0\].ready: not a URL"),
        ("serve {port}", "'serve \"'", 6, r"setups\[0\].command: not a command line"),
        (
            "    ready",
            "    env: {A: true}\n    ready",
            7,
            r"setups\[0\].env.*Expected `int \| str`, got `bool`",
        ),
        ("  - name: a", "  - keeper-dsk\n  - name: a", 5, r"setups\[0\]: no built-in set-up.*keeper-disk"),
        ("  - name: a", "  - engine\n  - name: a", 1, "model: engine needs `model`: a directory"),
        ("setups:", "setups:\n  - {name: a, command: b, ready: 'http://c'}", 6, "a second set-up named 'a'"),
        ("rates: [1, 2]", "rates: [1, 2", 3, "not YAML: expected"),
        ("workload: w", "workload: \x07", None, "not YAML"),
        (GOOD, "", 1, "Expected `object`, got `null`"),
        (GOOD, "- 1", 1, "Expected `object`, got `array`"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, line: int | None, message: str) -> None:
    assert GOOD.count(old) == 1
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "bytes.yaml")


def test_the_example_of_the_page_is_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "demo" / "models" / "smollm2"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    plan = read(written(tmp_path, example))
    assert plan.names() == ["engine", "embedded", "keeper-disk", "embedded, ARC"]
    setup = plan.setups[-1]
    assert isinstance(setup, SetUp)
    assert '"kv_connector_extra_config":{"policy":"arc"}}' in setup.command


def told(heading: str) -> dict[str, str]:
    """First and second cells of the table in one section of the page."""
    part = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", part, re.MULTILINE))


@pytest.mark.parametrize(("heading", "kind"), [("The plan", Plan), ("Set-ups of your own", SetUp)])
def test_the_tables_of_the_page_name_all_keys(heading: str, kind: type[msgspec.Struct]) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    page = told(heading)
    assert sorted(page) == sorted(fields)
    for name, field in fields.items():
        assert (page[name] == "required") == field.required, name
        if isinstance(field.default, int | float):
            assert page[name] == f"{field.default:g}", name
        elif name in ("model_name", "memory", "store", "lmcache") and field.default:
            assert page[name] == field.default, name


def test_the_page_names_all_built_in_set_ups() -> None:
    assert told("Built-in set-ups") == BUILT_IN


def summary(ttft: float | None) -> Summary:
    spread = Spread(ttft, ttft, ttft, ttft, ttft)
    return Summary("w", 1, 0, spread, Spread(), spread, None)


def test_ratios_are_of_rounds_that_both_have(tmp_path: Path) -> None:
    second = GOOD.partition("setups:\n")[2].replace("name: a", "name: b")
    plan = read(written(tmp_path, GOOD + second))
    runs = [
        Run(1, 1.0, "a", "", 1.0, "", "", summary(1.0)),
        Run(1, 1.0, "b", "", 1.0, "", "", summary(2.0)),
        Run(2, 1.0, "a", "", 1.0, "", "", summary(10.0)),
        Run(2, 1.0, "b", "", 1.0, "", "it died", summary(1.0)),  # not whole: counts nowhere
        Run(3, 1.0, "a", "", 1.0, "", "", summary(4.0)),
        Run(3, 1.0, "b", "", 1.0, "", "", summary(6.0)),
        Run(4, 1.0, "b", "", 1.0, "", "", summary(None)),  # answered nothing
        Run(3, 2.0, "b", "", 1.0, "", "", summary(6.0)),  # another rate, and nothing to compare it with
    ]
    table = {(row.rate, row.figure.title, row.setup): row for row in rows(plan, runs)}
    row = table[1.0, "TTFT, p50", "b"]
    assert (row.values, row.ratio, row.rounds) == (Range(4.0, 2.0, 6.0), Range(1.75, 1.5, 2.0), 2)
    assert row.reading is Reading.EACH_WORSE
    assert table[1.0, "TTFT, p50", "a"].values == Range(4.0, 1.0, 10.0)
    assert table[1.0, "ITL, mean", "b"].values is None
    assert table[2.0, "TTFT, p50", "b"].reading is Reading.NONE


@pytest.mark.parametrize(
    ("unit", "values", "text"),
    [
        ("s", Range(0.01234, 0.001, 2.0), "12.3 (1…2,000) ms"),
        ("s", Range(1.0, 0.5, 1234.5), "1 (0.5…1,234) s"),
        ("", Range(0.5, 0.25, 99.96), "0.5 (0.25…100)"),
    ],
)
def test_figures_as_text(unit: str, values: Range, text: str) -> None:
    assert Figure("", unit, lambda _summary: None).text(values) == text
