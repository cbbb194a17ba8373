"""A replica without a node: one is coming, or there is a shortage; and what follows from each."""

from dataclasses import replace
from typing import Any

import pytest

from tests.operator.builders import (
    DEFAULTS,
    NOW,
    amd,
    children,
    manual,
    node,
    pod,
    snapshot,
)
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.capacity import ARRIVAL_SECONDS, PATIENCE_SECONDS
from tilefleet_operator.desired import revision
from tilefleet_operator.devices import FALLBACK_SECONDS
from tilefleet_operator.observed import (
    ANNOTATION_ACCELERATOR,
    ANNOTATION_PLACEMENT,
    NodeView,
    PodView,
    Snapshot,
)
from tilefleet_operator.placement import fit
from tilefleet_operator.plan import plan
from tilefleet_operator.reactions import Reaction

YES = Reaction(True, "karpenter", "Pod should schedule on: nodeclaim/a", NOW + 2)
NO = Reaction(False, "karpenter", "no instance type", NOW + 2)


def waiting(of: InferenceDeployment, slot: int = 0, **changes: Any) -> PodView:
    """A pod that was created at NOW and finds no node."""
    option = fit(of.spec.accelerator, (), {}).options[0]
    new = revision(of, DEFAULTS)
    return pod(
        f"llm-{new}-{slot}", new, node=None, ip=None, ready=False, phase="Pending", created=NOW,
        reason="Unschedulable", message="0/1 nodes are available",
        annotations={ANNOTATION_PLACEMENT: option.key, ANNOTATION_ACCELERATOR: option.title},
        requests={option.resource: option.count}, **changes,
    )  # fmt: skip


def fleet_of(of: InferenceDeployment, *pods: PodView, **changes: Any) -> Snapshot:
    return snapshot(of, pods, children=children(of, of.spec.replicas), **changes)


def limited(found: Snapshot, now: float) -> tuple[str, str]:
    """Reason and message of CapacityLimited; empty when it is False."""
    status = plan(found, DEFAULTS, now).status
    assert status is not None
    condition = next(c for c in status["conditions"] if c["type"] == "CapacityLimited")
    return (
        (condition["reason"], condition["message"]) if condition["status"] == "True" else ("", "")
    )


def test_without_any_reaction_patience_ends_in_a_shortage() -> None:
    of = amd(1)
    found = fleet_of(of, waiting(of))
    reason, message = limited(found, NOW + 1)
    assert reason == "WaitingForNode"
    assert message.endswith("; a node autoscaler has 30 s to react")
    assert plan(found, DEFAULTS, NOW + 1).requeue_after == PATIENCE_SECONDS - 1
    reason, message = limited(found, NOW + PATIENCE_SECONDS)
    assert reason == "InsufficientGPU"
    assert message == (
        "1 replicas × 8 amd.com/gpu = 8 wanted; no node matches; short of 8;"
        " no node autoscaler reacts"
    )


def test_a_promise_holds_as_long_as_a_node_may_take() -> None:
    of = amd(1)
    one = waiting(of)
    found = fleet_of(of, one, reactions={one.uid: YES})
    for later in (3.0, PATIENCE_SECONDS + 1, ARRIVAL_SECONDS):
        reason, message = limited(found, NOW + later)
        assert reason == "WaitingForNode"
        assert message.endswith("; karpenter: Pod should schedule on: nodeclaim/a")
    assert limited(found, YES.time + ARRIVAL_SECONDS)[0] == "InsufficientGPU"


def test_a_refusal_is_said_at_once_with_the_autoscaler_s_words() -> None:
    of = amd(1)
    one = waiting(of)
    reason, message = limited(fleet_of(of, one, reactions={one.uid: NO}), NOW + 3)
    assert reason == "InsufficientGPU"
    assert message.endswith("; karpenter: no instance type")


def test_one_promise_is_enough_for_all_that_wait() -> None:
    of = amd(2)
    first, second = waiting(of), waiting(of, 1)
    found = fleet_of(of, first, second, reactions={first.uid: NO, second.uid: YES})
    assert limited(found, NOW + 60)[0] == "WaitingForNode"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"allocatable": {}, "created": NOW}, "WaitingForNode"),
        ({"ready": False, "created": NOW}, "WaitingForNode"),
        ({"allocatable": {}, "created": NOW - ARRIVAL_SECONDS}, "InsufficientGPU"),
        ({"created": NOW, "schedulable": False}, "InsufficientGPU"),
    ],
)
def test_a_new_node_is_given_time_for_its_device_plugin(
    change: dict[str, Any], reason: str
) -> None:
    of = amd(1)
    new = replace(node("spx8"), **change)
    assert limited(fleet_of(of, waiting(of), nodes=(new,)), NOW + 60)[0] == reason


def test_a_new_node_of_another_model_is_no_hope() -> None:
    of = amd(1)
    other = NodeView("n", labels={"amd.com/gpu.device-id": "740f"}, created=NOW)
    found = replace(other, allocatable={"amd.com/gpu": 0.0})
    assert limited(fleet_of(of, waiting(of), nodes=(found,)), NOW + 60)[0] == "InsufficientGPU"


def test_other_resources_wait_for_a_node_as_well() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    stuck = pod(
        f"llm-{new}-0", new, node=None, ready=False, reason="Unschedulable", created=NOW,
        message="0/1 nodes are available: 1 Insufficient cpu.",
    )  # fmt: skip
    found = fleet_of(of, stuck)
    assert limited(found, NOW + 1)[0] == "WaitingForNode"
    assert limited(replace(found, reactions={stuck.uid: YES}), NOW + 60)[0] == "WaitingForNode"
    reason, message = limited(found, NOW + 60)
    assert reason == "InsufficientResources"
    assert "Insufficient cpu" in message


def test_the_first_plan_speaks_of_waiting_and_not_of_a_shortage() -> None:
    assert limited(fleet_of(amd(2)), NOW)[0] == "WaitingForNode"
    paused = replace(amd(2), spec=amd(2).spec.model_copy(update={"paused": True}))
    assert limited(fleet_of(paused), NOW)[0] == "InsufficientGPU"


def test_events_tell_waiting_from_shortage() -> None:
    of = amd(1)
    one = waiting(of)
    first = plan(fleet_of(of, one), DEFAULTS, NOW + 1)
    assert [(kind, reason) for kind, reason, _ in first.events if reason != "NoMatchingNodes"] == [
        ("Normal", "WaitingForNode")
    ]
    assert first.status is not None
    seen = replace(of, status=first.status)
    later = plan(fleet_of(seen, one), DEFAULTS, NOW + 60)
    assert [(kind, reason) for kind, reason, _ in later.events] == [("Warning", "CapacityLimited")]
    assert later.status is not None
    again = plan(fleet_of(replace(of, status=later.status), one), DEFAULTS, NOW + 61)
    assert (again.events, again.status) == ((), None)


def test_fallback_without_any_node_is_tried_after_a_minute_and_not_while_one_is_promised() -> None:
    accelerator = {"vendor": "amd", "products": ["MI300X"], "fallbacks": [{"products": ["MI325X"]}]}
    of = manual(1, accelerator=accelerator)
    one = waiting(of)
    found = fleet_of(of, one)
    early = plan(found, DEFAULTS, NOW + FALLBACK_SECONDS - 1)
    assert not any(action.kind == "Pod" for action in early.actions)
    assert early.requeue_after == 1.0
    promised = replace(found, reactions={one.uid: YES})
    assert not any(
        a.kind == "Pod" for a in plan(promised, DEFAULTS, NOW + FALLBACK_SECONDS).actions
    )
    delete, apply = (
        a for a in plan(found, DEFAULTS, NOW + FALLBACK_SECONDS).actions if a.kind == "Pod"
    )
    assert (type(delete).__name__, delete.name) == ("Delete", one.name)
    assert "MI325X × 1 amd.com/gpu is tried next" in delete.why
    body: Any = getattr(apply, "body", None)
    assert body["metadata"]["annotations"]["tilefleet.io/accelerator"] == "MI325X × 1 amd.com/gpu"
    assert body["metadata"]["name"] != one.name
