"""Every file under deploy/ fits the schema of its kind, and says of kvkeep only what kvkeep knows."""

import argparse
import ast
import copy
import importlib
import itertools
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from kvkeep import config
from kvkeep.cli.main import _COMMANDS
from kvkeep.errors import ConfigError
from kvkeep.tiers.url import TierURL
from kvroute.options import read_options
from tests.deploy.manifests import (
    FILES,
    HELM,
    Manifest,
    Object,
    Pod,
    connectors,
    containers,
    is_keeper,
    manifests,
    option,
    pods,
    size,
    words,
)
from tests.deploy.schemas import CRDS, picker_configs, wrong, wrong_pods
from tests.deploy.shapes import SHAPES

ALL = manifests()
PODS = [pod for manifest in ALL for pod in pods(manifest)]
NAMES_OF_ITS_OWN = ("labels", "annotations", "matchLabels", "nodeSelector", "limits", "requests")


def title(of: Manifest | Pod) -> str:
    return f"{of.file}-{of.kind if isinstance(of, Manifest) else of.name}"


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes that the manifests are for have more memory than this machine."""
    monkeypatch.setattr(config, "_machine_bytes", lambda: 1 << 50)


def test_every_file_is_of_a_known_kind() -> None:
    assert len(FILES) >= 15
    assert {manifest.kind for manifest in ALL} == {HELM, *CRDS, *SHAPES}


@pytest.mark.parametrize("manifest", ALL, ids=title)
def test_it_fits_its_schema(manifest: Manifest) -> None:
    assert wrong(manifest) == []


@pytest.mark.parametrize("manifest", ALL, ids=title)
def test_its_pods_fit_kubernetes(manifest: Manifest) -> None:
    assert wrong_pods(manifest) == []


def fields(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all fields whose name a schema decides."""
    if isinstance(body, dict):
        for key, value in body.items():
            yield (*path, key)
            named = key == "selector" and "matchLabels" not in value  # a service's: labels, by their names
            if key not in NAMES_OF_ITS_OWN and not named:
                yield from fields(value, (*path, key))
    elif isinstance(body, list):
        for number, item in enumerate(body):
            yield from fields(item, (*path, number))


def misspelt(body: Object, path: tuple[Any, ...]) -> Object:
    changed = copy.deepcopy(body)
    parent: Any = changed
    for step in path[:-1]:
        parent = parent[step]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return changed


@pytest.mark.parametrize("manifest", ALL, ids=title)
def test_a_misspelt_field_is_found(manifest: Manifest) -> None:
    """Each field of each manifest in turn, wherever it stands."""
    paths = [path for path in fields(manifest.body) if path[0] != "extraObjects" or len(path) == 1]
    assert len(paths) >= 4
    for path in paths:
        try:
            changed = manifest._replace(body=misspelt(manifest.body, path))
            problems = wrong(changed) or wrong_pods(changed)
        except KeyError:
            continue  # what every manifest of this kind has: it is none any more
        assert problems, f"{manifest.file}: {'.'.join(map(str, path))} may be misspelt"


# What is said of kvkeep


def names_in_class(module: str, name: str) -> set[str]:
    """Annotated names of a class of vLLM's, without importing vLLM."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed: its own options are not checked")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / module).read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return {ast.unparse(item.target) for item in found.body if isinstance(item, ast.AnnAssign)}


ENGINES = [pod for pod in PODS if any(option(c, "--kv-transfer-config") for c in containers(pod))]


@pytest.mark.parametrize("pod", ENGINES, ids=title)
def test_its_connector_is_ours_with_options_that_we_know(pod: Pod) -> None:
    known = names_in_class("config/kv_transfer.py", "KVTransferConfig")
    for container in containers(pod):
        transfer = option(container, "--kv-transfer-config")
        if transfer is None:
            continue
        entries = connectors(transfer)
        assert len(entries) == 1
        assert set(transfer) | set(entries[0]) <= known
        assert transfer["kv_role"] in ("kv_both", "kv_producer", "kv_consumer")
        module = find_spec(entries[0]["kv_connector_module_path"])
        assert module is not None, entries[0]
        assert f'"{entries[0]["kv_connector"]}"' in Path(str(module.origin)).read_text()
        config.load(config.EngineConfig, entries[0].get("kv_connector_extra_config", {}), {})
        if transfer is not entries[0]:
            # Beside another connector ours is a cache: the other one hands over, and answers with parameters.
            assert entries[0]["kv_role"] == "kv_both"
            assert transfer["kv_load_failure_policy"] == "recompute", "ours sets it only where it is alone"


def test_every_stack_has_engines() -> None:
    assert {pod.file.partition("/")[0] for pod in ENGINES} == {
        "dynamo", "kserve", "kubernetes", "llm-d", "production-stack",
    }  # fmt: skip


def test_an_unknown_option_is_found() -> None:
    with pytest.raises(ConfigError, match="did you mean 'socket'"):
        config.load(config.EngineConfig, {"sockets": "/run/kvkeep/keeper.sock"}, {})


@pytest.mark.parametrize("pod", PODS, ids=title)
def test_its_events_are_options_of_vllm(pod: Pod) -> None:
    for container in containers(pod):
        events = option(container, "--kv-events-config")
        if events is not None:
            assert set(events) <= names_in_class("config/kv_events.py", "KVEventsConfig")
            assert events["enable_kv_cache_events"] is True


def settings(line: list[str]) -> config.KeeperConfig:
    """What a `kvkeep serve …` line means, by kvkeep's own parser. Raises SystemExit or ConfigError."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(_COMMANDS[line[1]][0]).add_arguments(parser)
    given = {name: value for name, value in vars(parser.parse_args(line[2:])).items() if value is not None}
    return config.load(config.KeeperConfig, given, {})


def commands(pod: Pod) -> Iterator[list[str]]:
    """Command lines of kvkeep's: of containers and of their probes."""
    for container in containers(pod):
        probes = [container.get(f"{kind}Probe", {}) for kind in ("startup", "liveness", "readiness")]
        for line in [words(container), *(probe.get("exec", {}).get("command", []) for probe in probes)]:
            if line[:1] == ["kvkeep"]:
                yield line


def test_the_lines_of_kvkeep_parse() -> None:
    lines = [line for pod in PODS for line in commands(pod)]
    assert {line[1] for line in lines} == {"serve", "status", "route"}
    for line in lines:
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(_COMMANDS[line[1]][0]).add_arguments(parser)
        parser.parse_args(line[2:])
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        settings(["kvkeep", "serve", "--memroy=64GiB"])


# Whether it can work


def volume_at(pod: Pod, container: Object, path: str) -> tuple[Object, Object]:
    """The mount of a container that a path lies under, and its volume."""
    mounts = [m for m in container.get("volumeMounts", []) if Path(path).is_relative_to(m["mountPath"])]
    assert mounts, f"{title(pod)}: {container['name']} mounts nothing at {path}"
    (volume,) = [v for v in pod.spec.get("volumes", []) if v["name"] == mounts[0]["name"]]
    return mounts[0], volume


def user(pod: Pod, container: Object) -> int | None:
    own = container.get("securityContext", {}).get("runAsUser")
    return pod.spec.get("securityContext", {}).get("runAsUser") if own is None else own


KEEPERS = [(pod, c) for pod in PODS for c in containers(pod) if is_keeper(c)]


@pytest.mark.parametrize(
    ("pod", "keeper"), KEEPERS, ids=lambda value: title(value) if isinstance(value, Pod) else ""
)
def test_a_keeper_can_serve(pod: Pod, keeper: Object) -> None:
    given = settings(words(keeper))
    mount, volume = volume_at(pod, keeper, given.socket)
    assert not mount.get("readOnly")
    assert given.memory + (2 << 30) <= size(keeper["resources"]["limits"]["memory"]), (
        "the arena is its memory"
    )
    assert given.prefault, "otherwise who writes a page pays for it: the engine's container"
    assert user(pod, keeper) not in (None, 0)
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    assert not given.tiers or grace > given.drain
    if given.http is not None:
        url = TierURL(f"http://{given.http}")
        assert url.host == "0.0.0.0", "the kubelet asks at the pod's address"
        assert volume_at(pod, keeper, url.take("token_file", str, "none"))[0]["readOnly"]
        (named,) = [p["name"] for p in keeper["ports"] if p["containerPort"] == url.port]
        probes = {kind: keeper[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness")}
        assert probes == {
            "startup": {"path": "/readyz", "port": named},
            "liveness": {"path": "/healthz", "port": named},
        }
    if "hostPath" in volume:
        (folders,) = [c for c in pod.spec["initContainers"] if words(c)[0] == "install"]
        assert str(Path(given.socket).parent) in words(folders)
        assert words(folders)[words(folders).index("-o") + 1] == str(user(pod, keeper))
    for url in given.tiers:
        if url.startswith("fs://"):
            volume_at(pod, keeper, url.removeprefix("fs://").partition("?")[0])


@pytest.mark.parametrize("pod", ENGINES, ids=title)
def test_an_engine_reaches_its_keeper(pod: Pod) -> None:
    for engine in containers(pod):
        transfer = option(engine, "--kv-transfer-config")
        if transfer is None:
            continue
        given = config.load(config.EngineConfig, connectors(transfer)[0]["kv_connector_extra_config"], {})
        if given.socket is None:
            limit = engine["resources"]["limits"]["memory"]
            assert given.memory + (8 << 30) <= size(limit), "a private keeper lives in the engine's container"
            continue
        mount, volume = volume_at(pod, engine, given.socket)
        same = [
            (where, keeper)
            for where, keeper in KEEPERS
            if settings(words(keeper)).socket == given.socket
            and volume_at(where, keeper, given.socket)[1].keys() == volume.keys()
            and (where.spec is pod.spec or "hostPath" in volume)
        ]
        assert same, f"{title(pod)}: no keeper serves {given.socket}"
        assert mount["readOnly"]
        for where, keeper in same:
            assert user(pod, engine) == user(where, keeper), "SO_PEERCRED: a keeper serves its own user"


@pytest.mark.parametrize("pod", PODS, ids=title)
def test_what_is_put_in_stands_before_it(pod: Pod) -> None:
    """Kubernetes puts $(NAME) in where NAME was defined before, and leaves it as it is otherwise."""
    for container in containers(pod):
        seen = set[str]()
        for variable in container.get("env", []):
            for name in [part.split(")")[0] for part in variable.get("value", "").split("$(")[1:]]:
                assert name in seen, f"{title(pod)}: {variable['name']} needs {name} before it"
            seen.add(variable["name"])
        for word in container.get("args", []):
            assert {part.split(")")[0] for part in word.split("$(")[1:]} <= seen


def test_workloads_select_their_own_pods() -> None:
    for manifest in ALL:
        if manifest.kind in ("Deployment", "DaemonSet", "StatefulSet"):
            spec = manifest.body["spec"]
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_monitors_select_pods_with_their_port_and_token() -> None:
    monitors = [manifest.body["spec"] for manifest in ALL if manifest.kind == "PodMonitor"]
    assert len(monitors) == 2
    for monitor in monitors:
        labels = monitor["selector"]["matchLabels"].items()
        found = [
            manifest.body["spec"]["template"]["spec"]
            for manifest in ALL
            if manifest.file.startswith("kubernetes/")
            and "template" in manifest.body.get("spec", {})
            and labels <= manifest.body["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert found
        for pod, endpoint in itertools.product(found, monitor["podMetricsEndpoints"]):
            ports = {port["name"] for container in pod["containers"] for port in container["ports"]}
            secrets = {one["secret"]["secretName"] for one in pod["volumes"] if "secret" in one}
            assert endpoint["port"] in ports
            if "authorization" in endpoint:
                assert endpoint["authorization"]["credentials"]["name"] in secrets


def test_schedulers_follow_the_events_of_their_engines() -> None:
    found = [(manifest, config) for manifest in ALL for config in picker_configs(manifest)]
    assert len(found) == 3
    for manifest, picker in found:
        parameters = {plugin["type"]: plugin.get("parameters", {}) for plugin in picker["plugins"]}
        referred = {
            one["pluginRef"] for profile in picker["schedulingProfiles"] for one in profile["plugins"]
        }
        referred |= {one["pluginRef"] for one in picker.get("dataLayer", {"sources": []})["sources"]}
        assert referred <= set(parameters)
        if "disagg-profile-handler" in parameters:
            assert parameters["disagg-profile-handler"]["deciders"]["prefill"] in parameters
            continue
        producer = parameters["precise-prefix-cache-producer"]
        weights = {one["name"]: one["weight"] for one in producer["indexerConfig"]["kvCacheBackendConfigs"]}
        assert set(weights) == {"gpu", "cpu", "storage"}, "what is not named counts as the GPU's own"
        (engine,) = [
            c
            for pod in PODS
            if pod.file.startswith(manifest.file.partition("/")[0])
            for c in containers(pod)
            if option(c, "--kv-events-config")
        ]
        events, line = option(engine, "--kv-events-config"), words(engine)
        assert events is not None
        kind, pod, model = events["topic"].split("@")
        assert (f"{kind}@", pod) == (producer["kvEventsConfig"]["topicFilter"], "$(POD_IP):8000")
        assert model in ("Qwen/Qwen3-8B", line[2] if line[:2] == ["vllm", "serve"] else "")
        discovery = producer["kvEventsConfig"]["podDiscoveryConfig"]
        assert events["endpoint"] == f"tcp://*:{discovery['socketPort']}"
        assert events["replay_endpoint"] == f"tcp://*:{discovery['replaySocketPort']}"
        block = json.loads(" ".join(line).replace("=", " ").split("--block-size ")[1].split()[0])
        assert block == producer["tokenProcessorConfig"]["blockSizeTokens"]


def test_ports_of_the_router_are_those_of_the_events() -> None:
    """The chart's values say a port in three places."""
    (values,) = [m.body for m in ALL if m.kind == HELM and m.body["routerSpec"]["routingLogic"] == "kvaware"]
    (pod,) = [pod for pod in PODS if pod.file == "production-stack/kv-aware.yaml"]
    (policy,) = [m.body["spec"] for m in ALL if (m.kind, m.file) == ("NetworkPolicy", pod.file)]
    events = option(pod.spec["containers"][0], "--kv-events-config")
    assert events is not None
    published = [int(events[name].rpartition(":")[2]) for name in ("endpoint", "replay_endpoint")]
    line = values["routerSpec"]["extraArgs"]
    asked = [int(line[line.index(f"--kvkeep-{name}-port") + 1]) for name in ("events", "replay")]
    allowed = [port["port"] for rule in policy["ingress"] if "from" in rule for port in rule["ports"]]
    assert published == asked == allowed
    assert policy["podSelector"]["matchLabels"] == {"model": pod.name}


def labels(kind: str, name: str) -> dict[str, str]:
    """Of the pods of a workload."""
    (spec,) = [m.body["spec"] for m in ALL if m.kind == kind and m.body["metadata"]["name"] == name]
    found: dict[str, str] = spec["template"]["metadata"]["labels"]
    return found


def test_the_router_finds_its_engines_and_may_look() -> None:
    (router,) = [pod for pod in PODS if any(words(c)[:2] == ["kvkeep", "route"] for c in containers(pod))]
    (container,) = containers(router)
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(_COMMANDS["route"][0]).add_arguments(parser)
    options = read_options(parser.parse_args(words(container)[2:]))
    volume_at(router, container, str(options.api_keys))
    assert router.spec["terminationGracePeriodSeconds"] > options.drain
    services = {m.body["metadata"]["name"]: m.body["spec"] for m in ALL if m.kind == "Service"}
    roles = {}
    for place in options.backends:
        service = services[place.host]
        assert (place.kind, service["clusterIP"]) == ("k8s", "None")
        assert place.port in [port["name"] for port in service["ports"]]
        (engine,) = [pod for pod in ENGINES if pod.name == place.host]
        roles[place.role] = option(engine.spec["containers"][0], "--kv-transfer-config")["kv_role"]
        kind = "StatefulSet" if place.role == "prefill" else "Deployment"
        assert service["selector"].items() <= labels(kind, place.host).items()
        named = {port["name"]: port["containerPort"] for port in engine.spec["containers"][0]["ports"]}
        assert all(named[port["targetPort"]] == port["port"] for port in service["ports"])
    assert roles == {"prefill": "kv_producer", "decode": "kv_consumer"}
    assert services["kvkeep-router"]["selector"].items() <= labels("Deployment", "kvkeep-router").items()
    account = router.spec["serviceAccountName"]
    of = {m.kind: m.body for m in ALL if m.file == router.file}
    assert of["ServiceAccount"]["metadata"]["name"] == account
    assert [subject["name"] for subject in of["RoleBinding"]["subjects"]] == [account]
    assert of["RoleBinding"]["roleRef"]["name"] == of["Role"]["metadata"]["name"]
    (rule,) = of["Role"]["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["discovery.k8s.io"], ["endpointslices"])
    assert set(rule["verbs"]) == {"list", "watch"}


def test_keepers_find_their_peers() -> None:
    """The decode engines' keepers name each pod that serves peers, over TLS and with the same token."""
    file = "kubernetes/prefill-decode.yaml"
    (prefill,) = [m.body["spec"] for m in ALL if (m.kind, m.file) == ("StatefulSet", file)]
    served, asked = ((pod, keeper, settings(words(keeper))) for pod, keeper in KEEPERS if pod.file == file)
    pod, keeper, given = served
    lends = urlsplit(f"peers://{given.peers}")
    mine = dict(parse_qsl(lends.query))
    assert mine.keys() == {"cert", "key", "token_file"}
    assert lends.port in [port["containerPort"] for port in keeper["ports"]]
    for path in mine.values():
        volume_at(pod, keeper, path)
    hosts = [f"{pod.name}-{at}.{prefill['serviceName']}.default.svc" for at in range(prefill["replicas"])]
    tiers = [urlsplit(url) for url in asked[2].tiers]
    assert [(tier.hostname, tier.port) for tier in tiers] == [(host, lends.port) for host in hosts]
    for tier in tiers:
        theirs = dict(parse_qsl(tier.query))
        assert theirs == {"ca": "/etc/kvkeep-peers/ca.crt", "token_file": mine["token_file"]}
        volume_at(asked[0], asked[1], theirs["ca"])
    (policy,) = [m.body["spec"] for m in ALL if (m.kind, m.file) == ("NetworkPolicy", file)]
    allowed = {
        rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]: rule["ports"][0]["port"]
        for rule in policy["ingress"]
    }
    assert allowed == {"vllm-decode": lends.port, "kvkeep-router": 8000}


def test_no_store_is_reached_in_the_clear() -> None:
    """Of tiers that are reached by network: none without TLS, no password in a manifest."""
    urls = [url for _, keeper in KEEPERS for url in settings(words(keeper)).tiers]
    schemes = {urlsplit(url).scheme for url in urls if urlsplit(url).password is None}
    assert schemes == {"fs", "peer", "rediss"}
    assert all("ca=" in url for url in urls if url.startswith("peer"))
