"""The Events of an object: what changed from one status to the next, once per transition.

Does not know why it changed, nor what was posted before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tilefleet_operator.reasons import Event, EventReason


def transitions(previous: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Event]:
    """(type, reason, message) of each transition from one status to the next."""
    before, after = previous.get("desiredReplicas"), new["desiredReplicas"]
    if before is not None and before != after:
        why = new["decisions"][-1]["reason"]
        reason: EventReason = "ScaledUp" if after > before else "ScaledDown"
        yield "Normal", reason, f"from {before} to {after} replicas: {why}"
    known = {c["type"]: c for c in previous.get("conditions") or []}
    for condition in new["conditions"]:
        kind, value = condition["type"], condition["status"]
        seen = known.get(kind) or {}
        if kind == "CapacityLimited":
            yield from _capacity_event(seen, condition)
        if seen.get("status") == value:
            continue
        if kind == "Progressing":
            yield from _rollout_event(previous, condition)
        if kind == "Degraded" and value == "True":
            yield "Warning", condition["reason"], condition["message"]
        if kind == "AcceleratorMatched" and value == "False":
            yield "Warning", condition["reason"], condition["message"]


def _capacity_event(seen: Mapping[str, Any], condition: Mapping[str, Any]) -> Iterator[Event]:
    """The event of a shortage that began or changed its nature; waiting for a node is normal."""
    reason, message = condition["reason"], condition["message"]
    if condition["status"] != "True" or seen.get("reason") == reason:
        return
    if reason == "WaitingForNode":
        yield "Normal", reason, message
    else:
        yield "Warning", "CapacityLimited", message


def _rollout_event(previous: Mapping[str, Any], condition: Mapping[str, Any]) -> Iterator[Event]:
    """The event of a Progressing condition that changed; first replicas are no rollout."""
    reason, message = condition["reason"], condition["message"]
    if reason == "ProgressDeadlineExceeded":
        yield "Warning", reason, message
    elif not previous.get("currentRevision"):
        return
    elif reason == "RolloutInProgress":
        yield "Normal", "RolloutStarted", message
    elif reason == "Complete":
        yield "Normal", "RolloutComplete", message
