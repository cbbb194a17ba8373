"""A Pod object as a small frozen view, and the labels and annotations that our pods carry.

Knows no other object, no client and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import GROUP
from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.units import quantity, timestamp

LABEL_DEPLOYMENT = f"{GROUP}/deployment"
LABEL_REVISION = f"{GROUP}/revision"
LABEL_ROLE = f"{GROUP}/role"
LABEL_STATE = f"{GROUP}/state"
ANNOTATION_DRAIN_STARTED = f"{GROUP}/drain-started"
ANNOTATION_ATTEMPT = f"{GROUP}/attempt"
# Which devices a pod was made for: in words, and the key of its placement.
ANNOTATION_ACCELERATOR = f"{GROUP}/accelerator"
ANNOTATION_PLACEMENT = f"{GROUP}/placement"
ANNOTATION_AVOID = f"{GROUP}/avoid-nodes"
ACTIVE, DRAINING = "active", "draining"
ROLE_WORKER, ROLE_BALLOON = "worker", "balloon"


@dataclass(frozen=True)
class Exit:
    """How a container ended last. message: its termination message, or the end of its log."""

    code: int
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class PodView:
    """What a decision needs to know of one Pod.

    created, deletion_requested, drain_started, ready_since, unready_since: seconds since the
    epoch, None when not so.
    requests: resource name → quantity, summed over containers. owner_uid: UID of the controller.
    attempt: failed predecessors; avoid: nodes where they failed.
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
    unready_since: float | None = None
    last_exit: Exit | None = None
    image: str = ""
    attempt: int = 0
    avoid: tuple[str, ...] = ()
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
        ready_since=_since(conditions.get("Ready", {}), "True"),
        unready_since=_since(conditions.get("Ready", {}), "False"),
        last_exit=_last_exit(status),
        image=next((c.get("image") or "" for c in spec.get("containers") or []), ""),
        attempt=_count(annotations.get(ANNOTATION_ATTEMPT, "")),
        avoid=tuple(filter(None, annotations.get(ANNOTATION_AVOID, "").split(","))),
        requests=_requests(spec),
        owner_uid=owner_uid(metadata),
    )


def _since(condition: Mapping[str, Any], status: str) -> float | None:
    """When a condition took this status, None while it has another."""
    since = condition.get("lastTransitionTime")
    return timestamp(since) if condition.get("status") == status and since else None


def _last_exit(status: Mapping[str, Any]) -> Exit | None:
    for container in status.get("containerStatuses") or []:
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            ended = state.get("terminated")
            if ended:
                reason, message = str(ended.get("reason") or ""), str(ended.get("message") or "")
                return Exit(int(ended.get("exitCode") or 0), reason, message)
    return None


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0


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
