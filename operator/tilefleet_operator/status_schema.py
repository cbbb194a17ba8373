"""Structural schema of the status: typed and described, without defaults or rules.

Does not know when any field is written (status.py).
"""

from __future__ import annotations

from typing import Any

from tilefleet_operator.reasons import TYPES

Json = dict[str, Any]


def _field(kind: str, description: str, **more: Any) -> Json:
    return {"type": kind, "description": description, **more}


def _integer(description: str) -> Json:
    return _field("integer", description)


def _string(description: str) -> Json:
    return _field("string", description)


def _time(description: str) -> Json:
    return _field("string", description, format="date-time")


def _object(description: str, **properties: Json) -> Json:
    return _field("object", description, properties=properties)


def status_schema() -> Json:
    """The schema. A fresh dictionary each time."""
    return _object(
        "What the operator observed and decided.",
        observedGeneration=_integer("Generation of the spec that the rest of the status is about."),
        replicas=_integer("Pods that count as replicas: not draining, not ended."),
        readyReplicas=_integer("Replicas that serve."),
        updatedReplicas=_integer("Replicas of the revision that the spec asks for."),
        pendingReplicas=_integer("Replicas that do not serve yet."),
        drainingReplicas=_integer("Pods that finish their requests and then go."),
        desiredReplicas=_integer("Replicas that ought to exist: spec.replicas or what load needs."),
        selector=_string("Label selector of the replicas, for /scale."),
        currentRevision=_string("Last revision that was everywhere; empty before the first."),
        updateRevision=_string("Revision that the spec asks for."),
        rollout=_object(
            "The rollout under way: its revision, and when it last came forward.",
            revision=_string("Revision that is rolled out."),
            readyReplicas=_integer("Most replicas of it that were ready at a time."),
            progressedAt=_time("When that number last grew."),
        ),
        utilization=_string("Demand by capacity of the ready replicas; 1 is all they can do."),
        accelerator=_accelerator(),
        capacity=_object(
            "What one replica can do, as learned.",
            tokensPerSecondPerReplica=_integer("Prompt and output tokens a second."),
            source=_string("Observed (while full), Predicted (from step times) or Stored."),
            sampledAt=_time("When it was last written."),
        ),
        demand=_object(
            "What clients ask for.",
            tokensPerSecond=_integer("Prompt and output tokens a second."),
            queueTokens=_integer("Tokens of requests that wait."),
        ),
        decisions=_decisions(),
        conditions=_conditions(),
    )


def _accelerator() -> Json:
    return _object(
        "Devices that match.",
        resourceName=_string("Resource that pods ask for."),
        devicesPerReplica=_integer("Devices of one replica."),
        matchingNodes=_integer("Nodes that fit spec.accelerator."),
        partition=_string("Partition of those devices."),
        memoryPerDevice=_string("Memory of one device."),
        placed={
            "type": "object",
            "description": "Devices that replicas were made for, with their number.",
            "additionalProperties": {"type": "integer"},
        },
    )


def _decisions() -> Json:
    decision = _object(
        "A change of the wanted number of replicas, with everything it was computed from.",
        time=_time("When it was decided."),
        **{"from": _integer("Replicas before."), "to": _integer("Replicas after.")},
        reason=_string("Why, in one sentence."),
        inputs={
            "type": "object",
            "description": "Figures that the decision was computed from, by name.",
            "additionalProperties": {"type": "string"},
        },
    )
    return _field("array", "The last ten changes of size.", maxItems=10, items=decision)


def _conditions() -> Json:
    condition = _object(
        "One observed fact.",
        type=_string(f"One of {', '.join(TYPES)}."),
        status=_field("string", "Whether it holds.", enum=["True", "False", "Unknown"]),
        observedGeneration=_integer("Generation of the spec that it is about."),
        lastTransitionTime=_time("When status last changed."),
        reason=_string("Why, in one word; docs/reference/conditions.md lists them."),
        message=_string("Why, in a sentence with the remedy."),
    )
    condition["required"] = ["type", "status", "lastTransitionTime", "reason", "message"]
    return {
        "type": "array",
        "description": "Every type is always there.",
        "items": condition,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    }
