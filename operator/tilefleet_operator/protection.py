"""Whether a node autoscaler may move a replica: never before it serves, then if the spec says so.

Starting a replica takes minutes, so one that starts is not to be moved. One that serves may be: an
eviction drains it as every end does, inside its PodDisruptionBudget. Does not evict anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilefleet_operator.accelerator import Capacity
from tilefleet_operator.actions import Apply
from tilefleet_operator.api import FIELD_MANAGER
from tilefleet_operator.desired import DO_NOT_DISRUPT, protection
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.hardware import NodeView
from tilefleet_operator.observed import PodView, Snapshot

# An apply of the first manager that names only annotations would remove the rest of the pod.
FIELD_MANAGER_PROTECTION = f"{FIELD_MANAGER}-protection"
# Nodes of Karpenter, and of the node groups that Cluster Autoscaler scales. On others nobody reads
# the annotations, and the write is saved.
_POOL_LABELS = (
    "karpenter.sh/nodepool",
    "eks.amazonaws.com/nodegroup",
    "cloud.google.com/gke-nodepool",
    "kubernetes.azure.com/agentpool",
)


def protections(snapshot: Snapshot, pods: Fleet) -> Iterator[Apply]:
    """Annotations that are not what they ought to be, of replicas on nodes that may be scaled.

    A replica that served once and starts again stays movable: it has lost its start already.
    """
    nodes = snapshot.by_name
    capacity = snapshot.deployment.spec.capacity
    for pod in pods.active:
        if not _is_scaled(nodes.get(pod.node or "")):
            continue
        found = pod.annotations.get(DO_NOT_DISRUPT)
        if capacity.protect_serving and found == "false":
            yield _apply(pod, capacity, "spec.capacity.protectServing is true")
        elif pod.ready and not capacity.protect_serving and found == "true":
            yield _apply(pod, capacity, "it serves, so a node autoscaler may move it")


def _is_scaled(node: NodeView | None) -> bool:
    return node is not None and any(key in node.labels for key in _POOL_LABELS)


def _apply(pod: PodView, capacity: Capacity, why: str) -> Apply:
    metadata = {
        "name": pod.name,
        "namespace": pod.namespace,
        "uid": pod.uid,
        "annotations": protection(capacity.protect_serving),
    }
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
    return Apply(body, why, FIELD_MANAGER_PROTECTION)
