"""What kube-scheduler does with a pod and a node, read from the plain objects alone.

Required node affinity, nodeSelector, taints, cordons and device resources; nothing is imported from
the operator, so that the two can disagree. A node that is not Ready takes nothing, because the node
controller taints it.
"""

import re
from typing import Any

Json = dict[str, Any]
DEVICE = re.compile(r"^amd\.com/")


def feasible(pod: Json, nodes: list[Json], used: dict[str, dict[str, int]]) -> list[str]:
    """Names of the nodes that the pod could be bound to. used: node → resource → devices."""
    spec = pod["spec"]
    return [
        node["metadata"]["name"]
        for node in nodes
        if not node.get("spec", {}).get("unschedulable")
        and _ready(node)
        and all(_tolerated(t, spec) for t in node.get("spec", {}).get("taints", []))
        and _selected(spec, node)
        and _room(spec, node, used.get(node["metadata"]["name"], {}))
    ]


def devices(pod: Json) -> dict[str, int]:
    """AMD devices that a pod asks for."""
    requests = pod["spec"]["containers"][0]["resources"]["requests"]
    return {name: int(count) for name, count in requests.items() if DEVICE.match(name)}


def _ready(node: Json) -> bool:
    return any(
        c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", [])
    )


def _tolerated(taint: Json, spec: Json) -> bool:
    if taint["effect"] not in ("NoSchedule", "NoExecute"):
        return True
    return any(
        t.get("key") in (None, taint["key"])
        and t.get("effect") in (None, taint["effect"])
        and (t.get("operator") == "Exists" or t.get("value", "") == taint.get("value", ""))
        for t in spec.get("tolerations", [])
    )


def _selected(spec: Json, node: Json) -> bool:
    labels = node["metadata"].get("labels", {})
    if any(labels.get(k) != v for k, v in spec.get("nodeSelector", {}).items()):
        return False
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    fields = {"metadata.name": node["metadata"]["name"]}
    return any(
        all(_holds(e, labels) for e in term.get("matchExpressions", []))
        and all(_holds(e, fields) for e in term.get("matchFields", []))
        for term in required["nodeSelectorTerms"]
        # A term without any requirement matches nothing.
        if term.get("matchExpressions") or term.get("matchFields")
    )


def _holds(expression: Json, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values")
    match expression["operator"]:
        case "In":
            return key in labels and labels[key] in values
        case "NotIn":
            return key not in labels or labels[key] not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise ValueError(f"the API server knows no operator {expression['operator']}")


def _room(spec: Json, node: Json, used: dict[str, int]) -> bool:
    allocatable = node["status"]["allocatable"]
    return all(
        int(allocatable.get(name, 0)) - used.get(name, 0) >= count
        for name, count in devices({"spec": spec}).items()
    )
