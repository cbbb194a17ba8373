"""The eight conditions, each always present, computed from what was observed and decided.

A message says what a person needs to act, and holds no figure that moves with load, so that an
unchanged fleet has an unchanged status. Does not know times or earlier conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilefleet_operator.fleet import Fleet
from tilefleet_operator.hardware import Fit, is_sick
from tilefleet_operator.observed import MissingStats, PodView, Snapshot
from tilefleet_operator.status import Condition

TYPES = (
    "Ready",
    "Progressing",
    "AcceleratorMatched",
    "CapacityLimited",
    "MetricsAvailable",
    "AutoscalingActive",
    "Degraded",
    "SpecValid",
)
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# A replica that has just become ready may not have been asked since.
FIRST_ANSWER_SECONDS = 10.0
# One restart may be a bad moment of the node; the third is a pattern.
CRASH_RESTARTS = 3


@dataclass(frozen=True)
class Facts:
    """What the conditions are about.

    now: seconds since the epoch. wanted: replicas that ought to exist. needed: replicas that load
    asks for, before limits. fit: judgement of the AMD nodes, None on vendor cpu. conflict: why the
    Service cannot be written.
    """

    snapshot: Snapshot
    now: float
    fleet: Fleet
    wanted: int
    needed: int
    fit: Fit | None
    conflict: str = ""


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
    broken = [pod for pod in facts.fleet.active if _broken(pod)]
    if broken:
        return Condition("Ready", "False", "Failed", f"{message}; {_about(broken[0])}")
    return Condition("Ready", "False", "Starting", message)


def _progressing(facts: Facts) -> Condition:
    new, wanted = facts.fleet.new, facts.wanted
    if facts.fleet.old:
        updated = sum(1 for pod in new if pod.ready)
        message = f"{updated} of {wanted} replicas are ready with the new revision"
        return Condition("Progressing", "True", "RolloutInProgress", message)
    return Condition("Progressing", "False", "Complete", "all replicas have one revision")


def _accelerator_matched(facts: Facts) -> Condition:
    kind = "AcceleratorMatched"
    if facts.fit is None:
        return Condition(kind, "True", "Matched", "vendor cpu runs on any node")
    if facts.fit.matching:
        count = len(facts.fit.matching)
        return Condition(kind, "True", "Matched", f"{count} nodes match" + facts.fit.refusals())
    accelerator = facts.snapshot.deployment.spec.accelerator
    wanted = ", ".join(accelerator.device_ids or accelerator.products) or "any AMD GPU"
    reasons = facts.fit.refusals() or "; the cluster has no AMD node"
    return Condition(kind, "False", "NoMatchingNodes", f"no node matches {wanted}{reasons}")


def _capacity_limited(facts: Facts) -> Condition:
    kind = "CapacityLimited"
    fit, wanted = facts.fit, facts.wanted
    if fit is not None and len(facts.fleet.ready) < wanted and fit.replicas < wanted:
        return Condition(kind, "True", "InsufficientGPU", fit.arithmetic(wanted))
    for pod in facts.fleet.active:
        if pod.node is None and pod.reason == "Unschedulable":
            message = f"pod {pod.name}: {pod.message}"
            return Condition(kind, "True", "InsufficientResources", message)
    autoscaling = facts.snapshot.deployment.spec.autoscaling
    if autoscaling.mode == "Auto" and facts.needed > autoscaling.max_replicas:
        message = f"load needs more than maxReplicas {autoscaling.max_replicas}"
        return Condition(kind, "True", "MaxReplicas", message)
    return Condition(kind, "False", "None", "every wanted replica finds a place")


def _metrics_available(facts: Facts) -> Condition:
    kind = "MetricsAvailable"
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
    kind = "AutoscalingActive"
    spec = facts.snapshot.deployment.spec
    if spec.paused:
        return Condition(kind, "False", "Paused", "spec.paused is true; no pod is changed")
    if spec.autoscaling.mode == "Manual":
        return Condition(kind, "False", "Manual", "sized by spec.replicas")
    low, high = spec.autoscaling.min_replicas, spec.autoscaling.max_replicas
    return Condition(kind, "True", "Auto", f"sized by load, from {low} to {high} replicas")


def _degraded(facts: Facts) -> Condition:
    kind = "Degraded"
    if facts.conflict:
        return Condition(kind, "True", "NameConflict", facts.conflict)
    nodes = {node.name: node for node in facts.snapshot.nodes}
    for pod in facts.fleet.active:
        node = nodes.get(pod.node or "")
        if node is not None and is_sick(node):
            message = f"pod {pod.name} runs on node {pod.node}, whose GPUs are unhealthy"
            return Condition(kind, "True", "UnhealthyGPU", message)
    for pod in facts.fleet.active:
        if _broken(pod):
            reason = "ImagePull" if pod.reason in _IMAGE_REASONS else "CrashLoop"
            if pod.reason in _CONFIG_REASONS:
                reason = "ContainerConfig"
            return Condition(kind, "True", reason, _about(pod))
    return Condition(kind, "False", "None", "nothing is wrong")


def _broken(pod: PodView) -> bool:
    if pod.ready:
        return False
    known = (*_IMAGE_REASONS, *_CONFIG_REASONS, "CrashLoopBackOff")
    return pod.reason in known or pod.restarts >= CRASH_RESTARTS


def _about(pod: PodView) -> str:
    if pod.reason in _IMAGE_REASONS:
        # The kubelet alternates between two reasons; one word keeps the status still.
        return f"pod {pod.name} cannot pull its image"
    if pod.reason in _CONFIG_REASONS:
        return f"pod {pod.name}: {pod.reason}: {pod.message}"
    return f"pod {pod.name} crashed; see kubectl logs {pod.name} --previous"
