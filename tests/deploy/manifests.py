"""What lies in deploy/, as documents and as the pods that each stack makes of them."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*.yaml"))
"""Kubernetes' and the charts'; what Prometheus itself reads is .yml, and promtool's to check."""
HELM = "Helm values"

Object = dict[str, Any]


class Manifest(NamedTuple):
    """One document; `kind` is HELM for values of production-stack's chart."""

    file: str
    kind: str
    body: Object


class Pod(NamedTuple):
    """A pod as the stack makes it, in the fields that we give or that it puts beside them."""

    file: str
    name: str
    spec: Object


def read(path: Path) -> list[Manifest]:
    """The documents of one file, and for values those of `extraObjects` too."""
    name, found = str(path.relative_to(DEPLOY)), list[Manifest]()
    for body in yaml.safe_load_all(path.read_text()):
        found.append(Manifest(name, body.get("kind", HELM), body))
        found += [Manifest(name, more["kind"], more) for more in body.get("extraObjects", [])]
    return found


def manifests() -> list[Manifest]:
    return [manifest for path in FILES for manifest in read(path)]


def pods(manifest: Manifest) -> Iterator[Pod]:
    """The pods of one manifest."""
    file, kind, body = manifest
    spec = body.get("spec", {})
    name = body.get("metadata", {}).get("name", "")
    if kind == HELM:
        for model in body["servingEngineSpec"]["modelSpec"]:
            yield Pod(file, model["name"], _chart_pod(body["servingEngineSpec"], model))
    elif kind in ("Deployment", "DaemonSet", "StatefulSet"):
        yield Pod(file, name, spec["template"]["spec"])
    elif kind == "InferenceService":
        predictor = {k: v for k, v in spec["predictor"].items() if k not in ("model", "minReplicas")}
        names = ("args", "image", "env", "resources", "volumeMounts", "securityContext")
        model = {k: v for k, v in spec["predictor"]["model"].items() if k in names}
        yield Pod(file, name, {**predictor, "containers": [{"name": "kserve-container", **model}]})
    elif kind == "ClusterServingRuntime":
        yield Pod(file, name, {k: v for k, v in spec.items() if k in ("containers", "volumes")})
    elif kind == "LLMInferenceService":
        yield Pod(file, name, spec["template"])
        if "prefill" in spec:
            yield Pod(file, f"{name}-prefill", spec["prefill"]["template"])
    elif kind == "DynamoGraphDeployment":
        for component in spec["components"]:
            yield Pod(file, component["name"], component["podTemplate"]["spec"])
    elif kind == "VLLMRuntime":
        limits = {"memory": spec["deploymentConfig"]["resources"]["memory"]}
        container = {"name": "vllm", "args": spec["vllmConfig"]["extraArgs"], "resources": {"limits": limits}}
        yield Pod(file, name, {"containers": [container]})


def _chart_pod(engine: Object, model: Object) -> Object:
    """As helm/templates/deployment-vllm-multi.yaml has it, where our values show."""
    container = {
        "name": "vllm",
        "image": f"{model['repository']}:{model['tag']}",
        "command": ["vllm", "serve", model["modelURL"]],
        "args": model["vllmConfig"]["extraArgs"],
        "env": [*engine.get("env", []), *model.get("env", [])],
        "securityContext": engine.get("containerSecurityContext", {}),
        "resources": {"limits": {"memory": model["limitMemory"]}},
        "volumeMounts": model.get("extraVolumeMounts", []),
    }
    return {
        "securityContext": engine.get("securityContext", {}),
        "containers": [container],
        "volumes": model.get("extraVolumes", []),
    }


def containers(pod: Pod) -> list[Object]:
    return [*pod.spec.get("initContainers", []), *pod.spec["containers"]]


def words(container: Object) -> list[str]:
    """Its command line: command, arguments, and what KServe's command takes from the environment."""
    extra = [v["value"] for v in container.get("env", []) if v["name"] == "VLLM_ADDITIONAL_ARGS"]
    more = [word for text in extra for word in shlex.split(text)]
    return [*container.get("command", []), *container.get("args", []), *more]


def option(container: Object, name: str) -> Object | None:
    """The JSON that follows an option of vLLM."""
    line = words(container)
    return json.loads(line[line.index(name) + 1]) if name in line else None


def connectors(transfer: Object) -> list[Object]:
    """kvkeep's own entries in a --kv-transfer-config, alone or among several."""
    children = transfer.get("kv_connector_extra_config", {}).get("connectors", [])
    return [one for one in [transfer, *children] if one["kv_connector"] == "KVKeepConnector"]


def is_keeper(container: Object) -> bool:
    return words(container)[:2] == ["kvkeep", "serve"]


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity."""
    return int(quantity.removesuffix("Gi")) << 30
