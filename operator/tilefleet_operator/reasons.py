"""The one list of condition types, condition reasons and Event reasons, each with its remedy.

The types are checked where conditions and Events are made; docs/reference/ is generated from the
texts. Does not know when any of them holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

ConditionType = Literal[
    "Ready", "Progressing", "AcceleratorMatched", "CapacityLimited", "MetricsAvailable",
    "AutoscalingActive", "Degraded", "SpecValid",
]  # fmt: skip
TYPES: tuple[ConditionType, ...] = get_args(ConditionType)

DegradedReason = Literal[
    "NameConflict", "UnhealthyGPU", "NodeLost", "PodFailed", "ImagePull", "ContainerConfig",
    "CrashLoop", "OutOfMemory", "ModelUnavailable", "InvalidConfiguration",
]  # fmt: skip
ShortageReason = Literal["InsufficientGPU", "InsufficientResources", "WaitingForNode"]
MatchReason = Literal["NoMatchingNodes", "PartitionMismatch"]
Reason = Literal[
    DegradedReason, MatchReason, ShortageReason,
    "AllReplicasReady", "MinimumAvailable", "ScaledToZero", "Starting", "Failed", "SpecInvalid",
    "Complete", "Paused", "ProgressDeadlineExceeded", "RolloutInProgress",
    "Matched", "LabelsStale",
    "MaxReplicas", "None",
    "NoReplicaReady", "Fresh", "NotNeeded", "Unreachable",
    "Manual", "Auto",
    "Valid", "Invalid",
]  # fmt: skip
EventType = Literal["Normal", "Warning"]
EventReason = Literal[
    DegradedReason, MatchReason,
    "ScaledUp", "ScaledDown", "RolloutStarted", "RolloutComplete", "ProgressDeadlineExceeded",
    "CapacityLimited", "WaitingForNode", "SpecInvalid", "WriteFailed",
]  # fmt: skip
Event = tuple[EventType, EventReason, str]
"""(type, reason, message)."""


@dataclass(frozen=True)
class Explained:
    """What a reason means, and what a person can do; an empty remedy: nothing needs to be done."""

    meaning: str
    remedy: str = ""


_INVALID = Explained(
    "the spec cannot be acted on, so nothing is known", "correct what SpecValid names"
)
_DEGRADED: Mapping[Reason, Explained] = {
    "NameConflict": Explained(
        "an object of somebody else holds the name of a child; it is left alone",
        "delete that object, hand it over with the annotation tilefleet.io/adopt=FLEET, or give the"
        " InferenceDeployment another name",
    ),
    "UnhealthyGPU": Explained(
        "a replica runs on a node whose GPUs are reported as unhealthy",
        "none while another place is free, the replica is then replaced; repair or drain the node",
    ),
    "NodeLost": Explained(
        "the node of a replica is gone or not Ready; a replica replaces it elsewhere",
        "look at the node",
    ),
    "PodFailed": Explained(
        "a pod ended or was evicted; another one replaces it after a back-off of 10 s to 5 min",
        "the message holds the kubelet's reason, often memory or disk of the node",
    ),
    "ImagePull": Explained(
        "the image of the worker cannot be pulled",
        "check spec.engine.image, and that the nodes reach its registry and may pull",
    ),
    "ContainerConfig": Explained(
        "the kubelet cannot make the container, for example because a Secret is missing",
        "create what the message names, or correct the spec",
    ),
    "CrashLoop": Explained(
        "the worker ended three times",
        "kubectl logs POD --previous; after a minute, then later, another node is tried",
    ),
    "OutOfMemory": Explained(
        "the worker needed more memory than its limit",
        "raise spec.engine.resources.memory, or lower spec.engine.kvCache.memory",
    ),
    "ModelUnavailable": Explained(
        "the worker cannot get or read the checkpoint; its own words are in the message",
        "correct spec.model, its Secret or the source",
    ),
    "InvalidConfiguration": Explained(
        "the worker refuses its flags; its own words are in the message",
        "correct spec.engine",
    ),
}
_MATCH: Mapping[Reason, Explained] = {
    "NoMatchingNodes": Explained(
        "no node has the wanted devices; the message says why each was refused",
        "change spec.accelerator or add a fallback, label or uncordon the nodes, or add such nodes",
    ),
    "PartitionMismatch": Explained(
        "nodes have the wanted product, but in another partition",
        "change spec.accelerator.partition, add a fallback, or repartition the nodes",
    ),
}
CONDITIONS: Mapping[ConditionType, Mapping[Reason, Explained]] = {
    "Ready": {
        "AllReplicasReady": Explained("every wanted replica is ready"),
        "MinimumAvailable": Explained(
            "enough replicas are ready to serve: minReplicas in mode Auto, else spec.replicas, less"
            " rollout.maxUnavailable; others start"
        ),
        "ScaledToZero": Explained("no replica is wanted", "raise spec.replicas to serve"),
        "Starting": Explained(
            "too few replicas are ready, and none is known to fail",
            "wait; kubectl describe pod shows the start's phase",
        ),
        "Failed": Explained(
            "too few replicas are ready, and at least one fails", "see Degraded, which names it"
        ),
        "SpecInvalid": _INVALID,
    },
    "Progressing": {
        "RolloutInProgress": Explained("a new revision replaces the old one"),
        "Complete": Explained("all replicas have one revision"),
        "Paused": Explained(
            "a rollout waits, because spec.paused is true", "set spec.paused to false"
        ),
        "ProgressDeadlineExceeded": Explained(
            "no further replica of the new revision became ready within rollout.progressDeadline;"
            " ready replicas of other revisions stay",
            "correct the spec, or kubectl tilefleet rollout undo FLEET",
        ),
        "SpecInvalid": _INVALID,
    },
    "AcceleratorMatched": {
        "Matched": Explained("nodes fit spec.accelerator, or vendor cpu needs none"),
        "LabelsStale": Explained(
            "nodes fit, but their labels contradict Allocatable, which is believed",
            "restart the node labeller on the nodes of the message",
        ),
        **_MATCH,
        "SpecInvalid": _INVALID,
    },
    "CapacityLimited": {
        "InsufficientGPU": Explained(
            "fewer replicas fit on free devices than are wanted, and no node autoscaler helps; the"
            " message counts them",
            "free or add nodes, ask for fewer devices a replica, or want fewer replicas",
        ),
        "InsufficientResources": Explained(
            "the scheduler finds no place for a pod; its own words are in the message",
            "free or add nodes, or lower spec.engine.resources",
        ),
        "WaitingForNode": Explained(
            "replicas have no node, but one is coming: a node autoscaler said so, or has 30 s to,"
            " or a new node is not complete yet; believed for 15 min",
            "wait; the message says who brings the node",
        ),
        "MaxReplicas": Explained(
            "load needs more replicas than autoscaling.maxReplicas", "raise maxReplicas"
        ),
        "None": Explained("every wanted replica finds a place"),
        "SpecInvalid": _INVALID,
    },
    "MetricsAvailable": {
        "Fresh": Explained("every ready replica answers /stats"),
        "Unreachable": Explained(
            "ready replicas do not answer /stats; mode Auto then holds its size",
            "let the operator reach port 8001 of the pods: NetworkPolicies, service mesh",
        ),
        "NotNeeded": Explained("ready replicas do not answer, and mode Manual needs no answer"),
        "NoReplicaReady": Explained("no replica is ready to be asked"),
        "SpecInvalid": _INVALID,
    },
    "AutoscalingActive": {
        "Auto": Explained("measured load sizes the fleet between minReplicas and maxReplicas"),
        "Manual": Explained("spec.replicas sizes the fleet"),
        "Paused": Explained(
            "spec.paused is true: nothing is changed, only reported", "set spec.paused to false"
        ),
        "SpecInvalid": _INVALID,
    },
    "Degraded": {
        **_DEGRADED,
        "None": Explained("nothing is wrong"),
        "SpecInvalid": _INVALID,
    },
    "SpecValid": {
        "Valid": Explained("the spec can be acted on"),
        "Invalid": Explained(
            "the spec was let in by an older schema; nothing is done until it is corrected",
            "correct the fields that the message names",
        ),
    },
}
"""Condition type → its reasons."""

QUESTIONS: Mapping[ConditionType, str] = {
    "Ready": "Does the fleet serve? kstatus, `kubectl wait` and Helm's `--wait` read it.",
    "Progressing": "Does a new revision replace an old one?",
    "AcceleratorMatched": "Is there a node for what spec.accelerator asks?",
    "CapacityLimited": "Does something keep the fleet smaller than wanted? True is bad.",
    "MetricsAvailable": "Do the replicas say what they carry?",
    "AutoscalingActive": "Does load decide the size?",
    "Degraded": "Is something broken that a person should see? True is bad.",
    "SpecValid": "Can the spec be acted on?",
}

EVENTS: Mapping[EventReason, tuple[EventType, Explained]] = {
    "ScaledUp": ("Normal", Explained("more replicas are wanted; the message says from where")),
    "ScaledDown": ("Normal", Explained("fewer replicas are wanted; the message says why")),
    "RolloutStarted": ("Normal", Explained("a new revision begins to replace the old one")),
    "RolloutComplete": ("Normal", Explained("all replicas have the new revision")),
    "ProgressDeadlineExceeded": (
        "Warning", CONDITIONS["Progressing"]["ProgressDeadlineExceeded"],
    ),
    "CapacityLimited": (
        "Warning",
        Explained(
            "fewer replicas can run than are wanted", "see the reasons of CapacityLimited"
        ),
    ),
    **{reason: ("Warning", _MATCH[reason]) for reason in get_args(MatchReason)},
    **{reason: ("Warning", _DEGRADED[reason]) for reason in get_args(DegradedReason)},
    "WaitingForNode": ("Normal", CONDITIONS["CapacityLimited"]["WaitingForNode"]),
    "SpecInvalid": ("Warning", CONDITIONS["SpecValid"]["Invalid"]),
    "WriteFailed": (
        "Warning",
        Explained(
            "the API server refused a write; its own words are in the message",
            "quotas, admission webhooks and RBAC are the usual causes; it is tried again",
        ),
    ),
}  # fmt: skip
"""Event reason → type and text."""
