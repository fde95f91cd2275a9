"""The alerts and the example of a configuration, by Prometheus' own tool."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
SCENES = Path(__file__).with_name("rules_test.yml")


def alerts() -> dict[str, dict]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.fixture
def promtool(tmp_path: Path):
    """Run it where the files lie side by side."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool on this machine (Debian: apt-get install prometheus)")
    for path in (RULES, RULES.with_name("scrape.yml"), SCENES):
        shutil.copy(path, tmp_path)
    (tmp_path / "kvkeep.token").write_text("x" * 16)

    def run(*words: str) -> None:
        done = subprocess.run(
            [program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_alerts_fire_on_what_they_are_for(promtool) -> None:
    promtool("check", "rules", "rules.yml")
    promtool("test", "rules", "rules_test.yml")
    shown = SCENES.read_text()
    assert [name for name in alerts() if f'alertname="{name}"' not in shown] == []


def test_the_configuration_is_one(promtool) -> None:
    promtool("check", "config", "scrape.yml")


def test_the_page_names_each_alert_and_how_long_it_waits() -> None:
    page = (ROOT / "docs" / "observe.md").read_text()
    told = dict(re.findall(r"^\| `(KVKeep\w+)` \| ([^|]*?) \|", page, re.MULTILINE))
    assert told == {name: rule.get("for", "") for name, rule in alerts().items()}


def test_alerts_are_about_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "observe.md").read_text() + (ROOT / "docs" / "vllm.md").read_text()
    for name, rule in alerts().items():
        used = set(re.findall(r"(?:vllm:)?kvkeep_\w+", rule["expr"]))
        assert used, name
        for metric in used:
            assert f"| `{metric.removesuffix('_bucket')}` |" in page, f"{name}: {metric}"
