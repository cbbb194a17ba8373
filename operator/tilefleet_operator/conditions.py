"""The eight conditions, each always present, computed from what was observed and decided.

A message says what a person needs to act, and holds no figure that moves with load, so that an
unchanged fleet has an unchanged status. Does not know times or earlier conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilefleet_operator.capacity import Shortage
from tilefleet_operator.condition import Condition
from tilefleet_operator.failures import Failure, failure
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.hardware import is_sick
from tilefleet_operator.observed import MissingStats, Snapshot
from tilefleet_operator.placement import Fit
from tilefleet_operator.reasons import TYPES, ConditionType, MatchReason, Reason
from tilefleet_operator.rollout import Progress

# A replica that has just become ready may not have been asked since.
FIRST_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Facts:
    """What the conditions are about.

    now: seconds since the epoch. wanted: replicas that ought to exist. needed: replicas that load
    asks for, before limits. fit: judgement of the AMD nodes, None on vendor cpu. progress: of the
    rollout. conflict: why the Service cannot be written. newer_image: the operator's default where
    the replicas run an earlier one; else empty. shortage: replicas without a node.
    """

    snapshot: Snapshot
    now: float
    fleet: Fleet
    wanted: int
    needed: int
    fit: Fit | None
    progress: Progress
    conflict: str = ""
    newer_image: str = ""
    shortage: Shortage | None = None


def conditions(facts: Facts) -> list[Condition]:
    """All conditions in the order of TYPES."""
    return [
        _ready(facts),
        _progressing(facts),
        _accelerator_matched(facts),
        _capacity_limited(facts),
        _metrics_available(facts),
        _autoscaling_active(facts),
        _degraded(facts),
        Condition("SpecValid", "True", "Valid", "the spec can be acted on"),
    ]


def unknown(problems: Sequence[str]) -> list[Condition]:
    """Conditions of an object whose spec cannot be acted on."""
    conditions = [
        Condition(kind, "Unknown", "SpecInvalid", "the spec cannot be acted on")
        for kind in TYPES
        if kind not in ("Ready", "SpecValid")
    ]
    ready = Condition("Ready", "False", "SpecInvalid", "the spec cannot be acted on")
    return [ready, *conditions, Condition("SpecValid", "False", "Invalid", "; ".join(problems))]


def _ready(facts: Facts) -> Condition:
    ready, wanted = len(facts.fleet.ready), facts.wanted
    message = f"{ready} of {wanted} replicas are ready"
    if wanted == 0:
        return Condition("Ready", "True", "ScaledToZero", "no replica is wanted")
    if ready >= wanted:
        return Condition("Ready", "True", "AllReplicasReady", message)
    spec = facts.snapshot.deployment.spec
    auto = spec.autoscaling.mode == "Auto"
    floor = (spec.autoscaling.min_replicas if auto else wanted) - spec.rollout.max_unavailable
    if ready >= max(1, floor):
        return Condition("Ready", "True", "MinimumAvailable", message)
    broken = _failures(facts.fleet)
    if broken:
        return Condition("Ready", "False", "Failed", f"{message}; {broken[0].message}")
    return Condition("Ready", "False", "Starting", message)


def _progressing(facts: Facts) -> Condition:
    kind: ConditionType = "Progressing"
    progress = facts.progress
    if not progress.rolling:
        message = "all replicas have one revision"
        if facts.newer_image:
            message += f"; the operator's default image is now {facts.newer_image}, which comes"
            message += " with the next change of the spec"
        return Condition(kind, "False", "Complete", message)
    message = f"{progress.updated} of {facts.wanted} replicas are ready with the new revision"
    spec = facts.snapshot.deployment.spec
    if spec.paused:
        message += "; spec.paused is true, the rollout goes on when it is false"
        return Condition(kind, "Unknown", "Paused", message)
    if progress.stopped:
        deadline, name = spec.rollout.progress_deadline, facts.snapshot.deployment.name
        message += f" and none became so within rollout.progressDeadline {deadline}"
        message += f"; {_hindrance(facts) or 'its pods are slower than that'}"
        message += "; the former revision goes on serving; correct the spec, or undo the change:"
        message += f" kubectl tilefleet rollout undo {name}"
        return Condition(kind, "False", "ProgressDeadlineExceeded", message)
    waits = _waits_for_room(facts)
    return Condition(kind, "True", "RolloutInProgress", f"{message}; {waits}" if waits else message)


def _hindrance(facts: Facts) -> str:
    """What keeps the new revision's pods from being ready, as far as it is known."""
    broken = [found for pod in facts.fleet.updated if (found := failure(pod))]
    return broken[0].message if broken else _waits_for_room(facts)


def _waits_for_room(facts: Facts) -> str:
    """Why a rollout cannot surge, when old replicas must not leave first; else empty."""
    stuck = [p for p in facts.fleet.updated if p.node is None and p.reason == "Unschedulable"]
    if not stuck or not facts.fleet.old or facts.snapshot.deployment.spec.rollout.max_unavailable:
        return ""
    return (
        f"pod {stuck[0].name} finds no place, and rollout.maxUnavailable 0 lets no old replica"
        " leave for it: free or add devices, or set rollout.maxUnavailable to 1"
    )


def _accelerator_matched(facts: Facts) -> Condition:
    kind: ConditionType = "AcceleratorMatched"
    if facts.fit is None:
        return Condition(kind, "True", "Matched", "vendor cpu runs on any node")
    if facts.fit.matching:
        return _matched(facts.fit)
    accelerator = facts.snapshot.deployment.spec.accelerator
    wanted = ", ".join(accelerator.device_ids or accelerator.products) or "any AMD GPU"
    reasons = facts.fit.refusals() or "; the cluster has no AMD node"
    why: MatchReason = "PartitionMismatch" if facts.fit.mismatched else "NoMatchingNodes"
    return Condition(kind, "False", why, f"no node matches {wanted}{reasons}")


def _matched(fit: Fit) -> Condition:
    message = f"{len(fit.matching)} nodes match"
    if not fit.options[0].matching:
        first = next(option for option in fit.options if option.matching)
        message += f", by fallback {first.number} ({first.title}) at best"
    if fit.stale:
        stale = ", ".join(f"{name} ({why})" for name, why in fit.stale[:5])
        message += f"; Allocatable is believed: {stale}"
    reason: Reason = "LabelsStale" if fit.stale else "Matched"
    return Condition("AcceleratorMatched", "True", reason, message + fit.refusals())


def _capacity_limited(facts: Facts) -> Condition:
    kind: ConditionType = "CapacityLimited"
    if facts.shortage is not None:
        return Condition(kind, "True", facts.shortage.reason, facts.shortage.message)
    autoscaling = facts.snapshot.deployment.spec.autoscaling
    if autoscaling.mode == "Auto" and facts.needed > autoscaling.max_replicas:
        message = f"load needs more than maxReplicas {autoscaling.max_replicas}"
        return Condition(kind, "True", "MaxReplicas", message)
    return Condition(kind, "False", "None", "every wanted replica finds a place")


def _metrics_available(facts: Facts) -> Condition:
    kind: ConditionType = "MetricsAvailable"
    ready = facts.fleet.ready
    if not ready:
        return Condition(kind, "Unknown", "NoReplicaReady", "no replica is ready to be asked")
    stats = facts.snapshot.stats
    silent = [
        (pod.name, answer.reason)
        for pod in ready
        if isinstance(answer := stats.get(pod.uid), MissingStats)
        and facts.now - (pod.ready_since or 0.0) >= FIRST_ANSWER_SECONDS
    ]
    if not silent:
        return Condition(kind, "True", "Fresh", "every ready replica answers")
    if facts.snapshot.deployment.spec.autoscaling.mode == "Manual":
        return Condition(kind, "Unknown", "NotNeeded", "mode Manual needs no figures of replicas")
    name, reason = silent[0]
    message = f"{len(silent)} of {len(ready)} ready replicas do not answer; {name}: {reason}"
    return Condition(kind, "False", "Unreachable", message)


def _autoscaling_active(facts: Facts) -> Condition:
    kind: ConditionType = "AutoscalingActive"
    spec = facts.snapshot.deployment.spec
    if spec.paused:
        return Condition(kind, "False", "Paused", "spec.paused is true; no pod is changed")
    if spec.autoscaling.mode == "Manual":
        return Condition(kind, "False", "Manual", "sized by spec.replicas")
    low, high = spec.autoscaling.min_replicas, spec.autoscaling.max_replicas
    return Condition(kind, "True", "Auto", f"sized by load, from {low} to {high} replicas")


def _degraded(facts: Facts) -> Condition:
    kind: ConditionType = "Degraded"
    if facts.conflict:
        return Condition(kind, "True", "NameConflict", facts.conflict)
    nodes = facts.snapshot.by_name
    for pod in facts.fleet.active:
        node = nodes.get(pod.node or "")
        if node is not None and is_sick(node):
            message = f"pod {pod.name} runs on node {pod.node}, whose GPUs are unhealthy"
            return Condition(kind, "True", "UnhealthyGPU", message)
    for pod in facts.fleet.lost:
        message = f"node {pod.node} of pod {pod.name} is gone or not Ready; a replica replaces it"
        return Condition(kind, "True", "NodeLost", message)
    for found in _failures(facts.fleet):
        return Condition(kind, "True", found.reason, found.message)
    return Condition(kind, "False", "None", "nothing is wrong")


def _failures(fleet: Fleet) -> list[Failure]:
    """Failures of pods that serve or will, then of finished ones not replaced yet."""
    return [found for pod in (*fleet.active, *fleet.failed) if (found := failure(pod))]
