"""Observed objects as small frozen views, and the Snapshot that a plan is made from.

Builders take plain Kubernetes dictionaries; what a worker says of itself is in stats.py. Knows no
client, no clock and no wish: what ought to be is desired.py, what to do is plan.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.hardware import Nodes, NodeView, Taint
from tilefleet_operator.pods import (
    ACTIVE,
    ANNOTATION_ACCELERATOR,
    ANNOTATION_ATTEMPT,
    ANNOTATION_AVOID,
    ANNOTATION_DRAIN_STARTED,
    ANNOTATION_PLACEMENT,
    DRAINING,
    LABEL_DEPLOYMENT,
    LABEL_REVISION,
    LABEL_ROLE,
    LABEL_STATE,
    ROLE_BALLOON,
    ROLE_WORKER,
    Exit,
    PodView,
    owner_uid,
    pod_view,
)
from tilefleet_operator.polls import Frame, History
from tilefleet_operator.reactions import Reaction
from tilefleet_operator.stats import (
    Counters,
    Gauges,
    MissingStats,
    Step,
    WorkerStats,
    worker_stats,
)
from tilefleet_operator.units import quantity, timestamp

DEVICE_PREFIX = "amd.com/"


__all__ = [
    "ACTIVE",
    "ANNOTATION_ACCELERATOR",
    "ANNOTATION_ATTEMPT",
    "ANNOTATION_AVOID",
    "ANNOTATION_DRAIN_STARTED",
    "ANNOTATION_PLACEMENT",
    "DRAINING",
    "LABEL_DEPLOYMENT",
    "LABEL_REVISION",
    "LABEL_ROLE",
    "LABEL_STATE",
    "ROLE_BALLOON",
    "ROLE_WORKER",
    "Counters",
    "Exit",
    "Frame",
    "Gauges",
    "History",
    "MissingStats",
    "NodeView",
    "PodView",
    "Snapshot",
    "Step",
    "Taint",
    "WorkerStats",
    "device_use",
    "held_devices",
    "node_view",
    "owner_uid",
    "pod_view",
    "worker_stats",
]


@dataclass(frozen=True)
class Snapshot:
    """Everything one plan is made from.

    device_use: node name → resource name → devices asked for by non-terminal pods of the whole
    cluster. stats: pod UID → answer or its absence. children: (kind, name) → object last seen.
    monitors_served: whether the cluster has PodMonitors.
    reactions: pod UID → what a node autoscaler said last.
    """

    deployment: InferenceDeployment
    pods: tuple[PodView, ...] = ()
    nodes: tuple[NodeView, ...] = ()
    device_use: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stats: Mapping[str, WorkerStats | MissingStats] = field(default_factory=dict)
    children: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    history: History = field(default_factory=History)
    monitors_served: bool = False
    reactions: Mapping[str, Reaction] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, NodeView]:
        """The nodes by name; made once for all fleets that see the same nodes."""
        if isinstance(self.nodes, Nodes):
            return self.nodes.recall("by name", lambda: {one.name: one for one in self.nodes})
        return {one.name: one for one in self.nodes}


def device_use(pods: tuple[PodView, ...]) -> dict[str, dict[str, float]]:
    """AMD devices asked for, node name → resource name → count, by pods that have not ended."""
    used: dict[str, dict[str, float]] = {}
    for pod in pods:
        for name, amount in held_devices(pod):
            node = used.setdefault(str(pod.node), {})
            node[name] = node.get(name, 0.0) + amount
    return used


def held_devices(pod: PodView) -> tuple[tuple[str, float], ...]:
    """AMD devices that a pod holds on its node.

    Balloons hold nothing: whoever needs their place gets it.
    """
    if pod.node is None or pod.finished or pod.labels.get(LABEL_ROLE) == ROLE_BALLOON:
        return ()
    return tuple((name, n) for name, n in pod.requests.items() if name.startswith(DEVICE_PREFIX))


def node_view(obj: Mapping[str, Any]) -> NodeView:
    """View of a Node object. Raises ObservationInvalid when metadata has no name."""
    metadata, spec, status = (
        obj.get("metadata") or {},
        obj.get("spec") or {},
        obj.get("status") or {},
    )
    if not metadata.get("name"):
        raise ObservationInvalid("a Node without metadata.name")
    conditions = {c["type"]: str(c.get("status")) for c in status.get("conditions") or []}
    changed = {c["type"]: c.get("lastTransitionTime") for c in status.get("conditions") or []}
    allocatable = {k: quantity(v) for k, v in (status.get("allocatable") or {}).items()}
    created = metadata.get("creationTimestamp")
    return NodeView(
        name=metadata["name"],
        labels=dict(metadata.get("labels") or {}),
        ready=conditions.get("Ready") == "True",
        schedulable=not spec.get("unschedulable", False),
        taints=tuple(
            Taint(t["key"], t.get("value") or "", t.get("effect") or "")
            for t in spec.get("taints") or []
        ),
        allocatable=allocatable,
        capacity={k: quantity(v) for k, v in (status.get("capacity") or {}).items()} or allocatable,
        conditions=conditions,
        created=timestamp(created) if created else 0.0,
        ready_changed=timestamp(changed["Ready"]) if changed.get("Ready") else 0.0,
    )
