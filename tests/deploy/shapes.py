"""Shapes of what has no schema beside the checkout: written by hand, from the sources that docs/ names.

Each is closed. What a pod may say is left to schemas.wrong_pod.
"""

from typing import Any

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer", "minimum": 0}
_FREE = {"type": "object"}
_WEIGHT = {"type": "number", "exclusiveMinimum": 0}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


NAMES = _object("name", name=_TEXT, labels=_FREE, annotations=_FREE)
_TEMPLATE = _object("metadata spec", metadata=_object("labels", labels=_FREE, annotations=_FREE), spec=_FREE)
_SELECTOR = _object("matchLabels", matchLabels=_FREE)
_ROLLING = _object("", maxUnavailable=_WHOLE, maxSurge=_WHOLE)
_UPDATE = _object("type", type={"enum": ["RollingUpdate", "OnDelete"]}, rollingUpdate=_ROLLING)


def _workload(kind: str, required: str, **fields: Any) -> dict[str, Any]:
    spec = _object(f"selector template {required}", selector=_SELECTOR, template=_TEMPLATE, **fields)
    return _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "apps/v1"},
        kind={"const": kind},
        metadata=NAMES,
        spec=spec,
    )


_PORT = _object("protocol port", protocol={"enum": ["TCP", "UDP"]}, port=_WHOLE)
_PEER = _object("podSelector", podSelector=_SELECTOR, namespaceSelector=_SELECTOR)
_INGRESS = {
    "type": "object",
    "properties": {"from": _list(_PEER), "ports": _list(_PORT)},
    "required": ["ports"],
    "additionalProperties": False,
}
_POLICY = _object(
    "podSelector policyTypes ingress",
    podSelector=_SELECTOR,
    policyTypes=_list({"enum": ["Ingress", "Egress"]}),
    ingress=_list(_INGRESS),
)

# ai-dynamo/dynamo, deploy/operator/api/v1beta1/dynamocomponentdeployment_types.go: the fields that we use.
_COMPONENT = _object(
    "name type replicas runtimeVersionOverride podTemplate",
    name={"type": "string", "pattern": "^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$"},
    type={"enum": ["frontend", "worker", "prefill", "decode", "planner", "epp"]},
    replicas=_WHOLE,
    runtimeVersionOverride={"type": "string", "pattern": r"^\d{1,4}\.\d{1,4}\.\d{1,4}$"},
    sharedMemorySize=_TEXT,
    podTemplate=_object("spec", spec=_FREE),
)

# llm-d/llm-d-router, pkg/kvevents/pool.go, pkg/kvcache/indexer.go and backend.go, pkg/kvcache/kvblock/.
_EVENTS = _object(
    "topicFilter discoverPods",
    zmqEndpoint=_TEXT,
    topicFilter=_TEXT,
    concurrency=_WHOLE,
    engineType={"enum": ["vllm", "sglang"]},
    discoverPods={"type": "boolean"},
    podDiscoveryConfig=_object(
        "socketPort", podLabelSelector=_TEXT, podNamespace=_TEXT, socketPort=_WHOLE, replaySocketPort=_WHOLE
    ),
)
_INDEXER = _object(
    "kvCacheBackendConfigs",
    kvBlockIndexConfig=_object("", enableMetrics={"type": "boolean"}, metricsLoggingInterval=_WHOLE),
    kvCacheBackendConfigs=_list(_object("name weight", name=_TEXT, weight=_WEIGHT)),
)
PARAMETERS = {
    "token-producer": _object("", modelName=_TEXT, vllm=_object("url", url=_TEXT, timeout=_TEXT)),
    "precise-prefix-cache-producer": _object(
        "tokenProcessorConfig indexerConfig kvEventsConfig",
        tokenProcessorConfig=_object(
            "blockSizeTokens", blockSizeTokens=_WHOLE, hashSeed=_TEXT, hashAlgorithm=_TEXT
        ),
        indexerConfig=_INDEXER,
        kvEventsConfig=_EVENTS,
        speculativeIndexing={"type": "boolean"},
        speculativeTTL=_TEXT,
    ),
    "prefix-cache-scorer": _object("prefixMatchInfoProducerName", prefixMatchInfoProducerName=_TEXT),
    **dict.fromkeys(
        (
            "endpoint-notification-source",
            "metrics-data-source",
            "core-metrics-extractor",
            "single-profile-handler",
            "kv-cache-utilization-scorer",
            "queue-scorer",
            "max-score-picker",
        ),
        _object(""),
    ),
}
_PLUGIN = _object("type", type={"enum": list(PARAMETERS)}, name=_TEXT, parameters=_FREE)
_REFERENCE = _object("pluginRef", pluginRef=_TEXT)
_SCORED = _object("pluginRef", pluginRef=_TEXT, weight=_WEIGHT)
_SOURCE = _object("pluginRef extractors", pluginRef=_TEXT, extractors=_list(_REFERENCE))

# prometheus-operator, pkg/apis/monitoring/v1/podmonitor_types.go: the fields that we use.
_SECRET_KEY = _object("name key", name=_TEXT, key=_TEXT)
_METRICS_ENDPOINT = _object(
    "port",
    port=_TEXT,
    path=_TEXT,
    interval=_TEXT,
    authorization=_object("credentials", credentials=_SECRET_KEY),
)
_POD_MONITOR = _object(
    "selector podMetricsEndpoints",
    jobLabel=_TEXT,
    selector=_SELECTOR,
    podMetricsEndpoints=_list(_METRICS_ENDPOINT),
)

SHAPES = {
    "Deployment": _workload("Deployment", "replicas", replicas=_WHOLE),
    "DaemonSet": _workload("DaemonSet", "", updateStrategy=_UPDATE),
    "NetworkPolicy": _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "networking.k8s.io/v1"},
        kind={"const": "NetworkPolicy"},
        metadata=NAMES,
        spec=_POLICY,
    ),
    "PodMonitor": _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": "PodMonitor"},
        metadata=NAMES,
        spec=_POD_MONITOR,
    ),
    "DynamoGraphDeployment": _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "nvidia.com/v1beta1"},
        kind={"const": "DynamoGraphDeployment"},
        metadata=NAMES,
        spec=_object("components", components=_list(_COMPONENT)),
    ),
    "EndpointPickerConfig": _object(
        "apiVersion kind plugins schedulingProfiles",
        apiVersion={"const": "llm-d.ai/v1alpha1"},
        kind={"const": "EndpointPickerConfig"},
        plugins=_list(_PLUGIN),
        dataLayer=_object("sources", sources=_list(_SOURCE)),
        schedulingProfiles=_list(_object("name plugins", name=_TEXT, plugins=_list(_SCORED))),
    ),
}
