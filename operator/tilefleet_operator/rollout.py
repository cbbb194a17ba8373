"""How far a rollout is: begun, coming forward, stopped or done.

A rollout begins with a new revision and is done when every wanted replica serves with it and no
other is left. The moment of its last step stands in the status, so that a new leader counts on.
Does not know which pods come and go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.units import rfc3339, seconds, timestamp


@dataclass(frozen=True)
class Progress:
    """State of the rollout.

    rolling: the wanted revision is not everywhere yet. stopped: rolling, but no replica became
    ready within rollout.progressDeadline. updated: ready replicas of the wanted revision.
    current: last revision that was everywhere; empty before the first. since: last step, seconds
    since the epoch. mark: status.rollout. wait_seconds: until it counts as stopped.
    """

    rolling: bool = False
    stopped: bool = False
    updated: int = 0
    current: str = ""
    since: float | None = None
    mark: Mapping[str, Any] = field(default_factory=dict)
    wait_seconds: float | None = None


def progress(deployment: InferenceDeployment, pods: Fleet, wanted: int, now: float) -> Progress:
    """The rollout's state now. A pause stops its clock; going on, it starts anew."""
    status = deployment.status
    current = str(status.get("currentRevision") or "")
    updated = sum(pod.ready for pod in pods.updated)
    alone = all(pod.revision == pods.revision for pod in pods.active)
    if alone and (updated >= wanted or current == pods.revision):
        return Progress(updated=updated, current=pods.revision)
    if deployment.spec.paused:
        return Progress(rolling=True, updated=updated, current=current)
    mark = _mark(status.get("rollout") or {}, pods.revision, updated, now)
    since = timestamp(mark["progressedAt"])
    left = since + seconds(deployment.spec.rollout.progress_deadline) - now
    return Progress(
        rolling=True,
        stopped=left <= 0,
        updated=updated,
        current=current,
        since=since,
        mark=mark,
        wait_seconds=left if left > 0 else None,
    )


def _mark(before: Mapping[str, Any], revision: str, updated: int, now: float) -> Mapping[str, Any]:
    """The former mark, or a new one when a replica more is ready than ever before."""
    if before.get("revision") == revision and updated <= int(before.get("readyReplicas") or 0):
        return dict(before)
    return {"revision": revision, "readyReplicas": updated, "progressedAt": rfc3339(now)}
