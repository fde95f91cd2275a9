"""What a manifest has against the schema of its kind.

Public schemas are read where they lie beside the checkout, and closed: what they leave open (Kubernetes drops
unknown fields without a word, Helm ignores them) is a misspelling here.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.deploy.manifests import HELM, ROOT, Manifest, Object, pods
from tests.deploy.shapes import NAMES, PARAMETERS, SHAPES

FOLDER = ROOT.parent / "shared" / "schemas"
VALUES = "production-stack-values.schema.json"
CRDS = {
    "InferenceService": "kserve-inferenceservices.yaml",
    "ClusterServingRuntime": "kserve-clusterservingruntimes.yaml",
    "LLMInferenceService": "kserve-llminferenceservices.yaml",
    "VLLMRuntime": "production-stack-vllmruntimes.yaml",
}
_ANY_KEYS = ("labels", "limits", "requests")  # of the chart's values: named by example only


def wrong(manifest: Manifest) -> list[str]:
    """What a document has against the schema of its kind, and a scheduler's configuration inside it."""
    kind, body = manifest.kind, manifest.body
    if kind in SHAPES:
        problems = _errors(Draft202012Validator(SHAPES[kind]), body)
    else:
        problems = _errors(_values() if kind == HELM else _crd(kind, body["apiVersion"]), body)
    for config in picker_configs(manifest):
        if config is not body:
            problems += _errors(Draft202012Validator(SHAPES["EndpointPickerConfig"]), config)
        for plugin in config["plugins"]:
            if plugin.get("type") in PARAMETERS:
                shape = Draft202012Validator(PARAMETERS[plugin["type"]])
                problems += _errors(shape, plugin.get("parameters", {}))
    return problems


def wrong_pods(manifest: Manifest) -> list[str]:
    """What its pods have against Kubernetes' schema of a pod, as KServe's resource carries it."""
    shape = _crd("LLMInferenceService", "serving.kserve.io/v1alpha2")
    pod = shape.evolve(schema=shape.schema["properties"]["spec"]["properties"]["template"])
    return [problem for one in pods(manifest) for problem in _errors(pod, one.spec)]


def picker_configs(manifest: Manifest) -> Iterator[Object]:
    """Configurations of an endpoint picker: the document itself, or inside an LLMInferenceService."""
    if manifest.kind == "EndpointPickerConfig":
        yield manifest.body
    scheduler = manifest.body.get("spec", {}).get("router", {}).get("scheduler", {})
    if inline := scheduler.get("config", {}).get("inline"):
        yield inline


def _errors(schema: Any, body: Object) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in schema.iter_errors(body)]


def _file(name: str) -> Path:
    if not FOLDER.is_dir():
        pytest.skip("no public schemas: where there are any, they lie in ../shared/schemas by the checkout")
    return FOLDER / name


@cache
def _values() -> Draft202012Validator:
    return Draft202012Validator(closed(json.loads(_file(VALUES).read_text())))


@cache
def _crd(kind: str, api_version: str) -> Draft202012Validator:
    group, _, version = api_version.partition("/")
    crd = yaml.load(_file(CRDS[kind]).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert (crd["spec"]["group"], crd["spec"]["names"]["kind"]) == (group, kind)
    versions = {one["name"]: one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"]}
    assert version in versions, f"{kind} has no version {version}"
    schema = closed(versions[version])
    schema["properties"]["metadata"] = NAMES  # which a CRD leaves to Kubernetes
    return Draft202012Validator(schema)


def closed(schema: Any, name: str = "") -> Any:
    """The same schema, in which every object that names its fields has no others."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value, key) for key, value in schema.items() if key != "properties"}
    if isinstance(properties := schema.get("properties"), dict):
        result["properties"] = {key: closed(value, key) for key, value in properties.items()}
        is_open = schema.get("x-kubernetes-preserve-unknown-fields") or name in _ANY_KEYS
        if "additionalProperties" not in schema and not is_open:
            result["additionalProperties"] = False
    return result
