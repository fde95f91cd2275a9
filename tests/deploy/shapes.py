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
    "disagg-profile-handler": _object("deciders", deciders=_object("prefill", prefill=_TEXT)),
    "prefix-cache-scorer": _object("prefixMatchInfoProducerName", prefixMatchInfoProducerName=_TEXT),
    **dict.fromkeys(
        (
            "endpoint-notification-source",
            "metrics-data-source",
            "core-metrics-extractor",
            "single-profile-handler",
            "always-disagg-pd-decider",
            "prefill-filter",
            "decode-filter",
            "active-request-scorer",
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
_SERVICE_PORT = _object("name port targetPort", name=_TEXT, port=_WHOLE, targetPort=_TEXT)
_RULE = _object(
    "apiGroups resources verbs", apiGroups=_list(_TEXT), resources=_list(_TEXT), verbs=_list(_TEXT)
)
_ROLE_REFERENCE = _object("apiGroup kind name", apiGroup=_TEXT, kind={"const": "Role"}, name=_TEXT)
_SUBJECT = _object("kind name", kind={"const": "ServiceAccount"}, name=_TEXT)


def _plain(api_version: str, kind: str, **fields: Any) -> dict[str, Any]:
    return _object(
        f"apiVersion kind metadata {' '.join(fields)}",
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=NAMES,
        **fields,
    )


SHAPES = {
    "Service": _plain(
        "v1",
        "Service",
        spec=_object(
            "selector ports", clusterIP={"const": "None"}, selector=_FREE, ports=_list(_SERVICE_PORT)
        ),
    ),
    "ServiceAccount": _plain("v1", "ServiceAccount"),
    "Role": _plain("rbac.authorization.k8s.io/v1", "Role", rules=_list(_RULE)),
    "RoleBinding": _plain(
        "rbac.authorization.k8s.io/v1", "RoleBinding", roleRef=_ROLE_REFERENCE, subjects=_list(_SUBJECT)
    ),
    "StatefulSet": _workload(
        "StatefulSet",
        "replicas serviceName",
        replicas=_WHOLE,
        serviceName=_TEXT,
        podManagementPolicy={"enum": ["OrderedReady", "Parallel"]},
    ),
    "Deployment": _workload("Deployment", "replicas", replicas=_WHOLE),
    "DaemonSet": _workload("DaemonSet", "", updateStrategy=_UPDATE),
    "NetworkPolicy": _plain("networking.k8s.io/v1", "NetworkPolicy", spec=_POLICY),
    "PodMonitor": _plain("monitoring.coreos.com/v1", "PodMonitor", spec=_POD_MONITOR),
    "DynamoGraphDeployment": _plain(
        "nvidia.com/v1beta1",
        "DynamoGraphDeployment",
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
