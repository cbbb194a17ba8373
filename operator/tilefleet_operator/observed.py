"""Observed objects as small frozen views, and the Snapshot that a plan is made from.

Builders take plain Kubernetes dictionaries; what a worker says of itself is in stats.py. Knows no
client, no clock and no wish: what ought to be is desired.py, what to do is plan.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import GROUP, InferenceDeployment
from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.hardware import NodeView, Taint
from tilefleet_operator.stats import (
    Counters,
    Frame,
    Gauges,
    History,
    MissingStats,
    Step,
    WorkerStats,
    worker_stats,
)
from tilefleet_operator.units import quantity, timestamp

LABEL_DEPLOYMENT = f"{GROUP}/deployment"
LABEL_REVISION = f"{GROUP}/revision"
LABEL_ROLE = f"{GROUP}/role"
LABEL_STATE = f"{GROUP}/state"
LABEL_SLOT = f"{GROUP}/slot"
ANNOTATION_DRAIN_STARTED = f"{GROUP}/drain-started"
ACTIVE, DRAINING = "active", "draining"
ROLE_WORKER = "worker"
DEVICE_PREFIX = "amd.com/"


__all__ = [
    "Counters",
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
    "node_view",
    "owner_uid",
    "pod_view",
    "worker_stats",
]


@dataclass(frozen=True)
class PodView:
    """What a decision needs to know of one Pod.

    created, deletion_requested, drain_started, ready_since: seconds since the epoch, None when
    not so.
    requests: resource name → quantity, summed over containers. owner_uid: UID of the controller.
    """

    name: str
    uid: str
    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    phase: str = "Pending"
    ready: bool = False
    terminating: bool = False
    ip: str | None = None
    node: str | None = None
    reason: str = ""
    message: str = ""
    created: float = 0.0
    restarts: int = 0
    revision: str = ""
    state: str = ACTIVE
    deletion_requested: float | None = None
    drain_started: float | None = None
    ready_since: float | None = None
    requests: Mapping[str, float] = field(default_factory=dict)
    owner_uid: str = ""

    @property
    def finished(self) -> bool:
        """Failed, evicted or run to its end: it will never serve again."""
        return self.phase in ("Failed", "Succeeded")

    @property
    def slot(self) -> int:
        """Number at the end of the name; -1 when there is none."""
        tail = self.name.rpartition("-")[2]
        return int(tail) if tail.isdigit() else -1


@dataclass(frozen=True)
class Snapshot:
    """Everything one plan is made from.

    device_use: node name → resource name → devices asked for by non-terminal pods of the whole
    cluster. stats: pod UID → answer or its absence. children: (kind, name) → object last seen.
    """

    deployment: InferenceDeployment
    pods: tuple[PodView, ...] = ()
    nodes: tuple[NodeView, ...] = ()
    device_use: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stats: Mapping[str, WorkerStats | MissingStats] = field(default_factory=dict)
    children: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    history: History = field(default_factory=History)


def pod_view(obj: Mapping[str, Any]) -> PodView:
    """View of a Pod object. Raises ObservationInvalid when metadata has no name or uid."""
    metadata, spec, status = (
        obj.get("metadata") or {},
        obj.get("spec") or {},
        obj.get("status") or {},
    )
    if not metadata.get("name") or not metadata.get("uid"):
        raise ObservationInvalid("a Pod without metadata.name or metadata.uid")
    labels, annotations = (
        dict(metadata.get("labels") or {}),
        dict(metadata.get("annotations") or {}),
    )
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    deleted, drained = metadata.get("deletionTimestamp"), annotations.get(ANNOTATION_DRAIN_STARTED)
    reason, message = _why(status, conditions)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        namespace=metadata.get("namespace") or "default",
        labels=labels,
        annotations=annotations,
        phase=status.get("phase") or "Pending",
        ready=conditions.get("Ready", {}).get("status") == "True" and deleted is None,
        terminating=deleted is not None,
        ip=status.get("podIP") or None,
        node=spec.get("nodeName") or None,
        reason=reason,
        message=message,
        created=timestamp(metadata["creationTimestamp"])
        if metadata.get("creationTimestamp")
        else 0.0,
        restarts=sum(int(c.get("restartCount", 0)) for c in status.get("containerStatuses") or []),
        revision=labels.get(LABEL_REVISION, ""),
        state=labels.get(LABEL_STATE, ACTIVE),
        deletion_requested=timestamp(deleted) if deleted else None,
        drain_started=timestamp(drained) if drained else None,
        ready_since=_ready_since(conditions),
        requests=_requests(spec),
        owner_uid=owner_uid(metadata),
    )


def _ready_since(conditions: Mapping[str, Mapping[str, Any]]) -> float | None:
    ready = conditions.get("Ready", {})
    since = ready.get("lastTransitionTime")
    return timestamp(since) if ready.get("status") == "True" and since else None


def owner_uid(metadata: Mapping[str, Any]) -> str:
    """UID of the controller that owns an object; empty without one."""
    owners = [o for o in metadata.get("ownerReferences") or [] if o.get("controller")]
    return str(owners[0].get("uid") or "") if owners else ""


def _why(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Reason and message of what keeps a pod from running, most specific first."""
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting:
            return str(waiting.get("reason") or ""), str(waiting.get("message") or "")
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return str(scheduled.get("reason") or ""), str(scheduled.get("message") or "")
    return str(status.get("reason") or ""), str(status.get("message") or "")


def _requests(spec: Mapping[str, Any]) -> dict[str, float]:
    total: dict[str, float] = {}
    for container in spec.get("containers") or []:
        resources = container.get("resources") or {}
        wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, amount in wanted.items():
            total[name] = total.get(name, 0.0) + quantity(amount)
    return total


def device_use(pods: tuple[PodView, ...]) -> dict[str, dict[str, float]]:
    """AMD devices asked for, node name → resource name → count, by pods that have not ended."""
    used: dict[str, dict[str, float]] = {}
    for pod in pods:
        if pod.node is None or pod.finished:
            continue
        for name, amount in pod.requests.items():
            if name.startswith(DEVICE_PREFIX):
                node = used.setdefault(pod.node, {})
                node[name] = node.get(name, 0.0) + amount
    return used


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
    )
