"""Node autoscalers and a replica: not moved while it starts, movable once it serves."""

from dataclasses import replace
from typing import Any

import pytest

from tests.operator.builders import DEFAULTS, NOW, amd, children, node, pod, snapshot
from tilefleet_operator.actions import Apply
from tilefleet_operator.desired import pod as render
from tilefleet_operator.desired import revision
from tilefleet_operator.hardware import NodeView
from tilefleet_operator.observed import Snapshot
from tilefleet_operator.plan import plan
from tilefleet_operator.protection import FIELD_MANAGER_PROTECTION
from tilefleet_operator.simulation import World, trace

KARPENTER, AUTOSCALER = (
    "karpenter.sh/do-not-disrupt",
    "cluster-autoscaler.kubernetes.io/safe-to-evict",
)
FIXED = {KARPENTER: "true", AUTOSCALER: "false"}
MOVABLE = {KARPENTER: "false", AUTOSCALER: "true"}


def pool_node(**labels: str) -> NodeView:
    """A node that an autoscaler may remove."""
    view = node("spx8", "n1")
    return replace(view, labels={**view.labels, **(labels or {"karpenter.sh/nodepool": "gpu"})})


def one_replica(
    capacity: dict[str, Any], annotations: dict[str, str], ready: bool = True, **labels: str
) -> Snapshot:
    of = amd(1, capacity=capacity)
    new = revision(of, DEFAULTS)
    view = pod(f"llm-{new}-0", new, annotations=annotations, ready=ready)
    return snapshot(of, (view,), nodes=(pool_node(**labels),), children=children(of, 1))


def marks(found: Snapshot) -> list[Apply]:
    actions = plan(found, DEFAULTS, NOW).actions
    return [a for a in actions if isinstance(a, Apply) and a.kind == "Pod"]


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        ({}, FIXED),
        ({"protectServing": True}, FIXED),
        ({"protectStartup": False, "protectServing": True}, FIXED),
        ({"protectStartup": False}, MOVABLE),
    ],
)
def test_a_new_replica_says_whether_it_may_be_moved(
    capacity: dict[str, Any], expected: dict[str, str]
) -> None:
    annotations = render(amd(1, capacity=capacity), 0, "r", DEFAULTS)["metadata"]["annotations"]
    assert {key: annotations[key] for key in expected} == expected


def test_a_serving_replica_becomes_movable_by_a_manager_of_its_own() -> None:
    (mark,) = marks(one_replica({}, FIXED))
    assert mark.field_manager == FIELD_MANAGER_PROTECTION
    metadata = mark.body["metadata"]
    assert metadata["annotations"] == MOVABLE
    assert metadata["uid"] == f"uid-{mark.name}"
    assert set(mark.body) == {"apiVersion", "kind", "metadata"}


@pytest.mark.parametrize(
    ("capacity", "annotations", "ready"),
    [
        ({}, FIXED, False),
        ({}, MOVABLE, True),
        ({}, MOVABLE, False),
        ({}, {}, True),
        ({"protectServing": True}, FIXED, True),
    ],
)
def test_nothing_is_written_where_nothing_is_wrong(
    capacity: dict[str, Any], annotations: dict[str, str], ready: bool
) -> None:
    assert marks(one_replica(capacity, annotations, ready)) == []


def test_a_changed_mind_protects_serving_replicas_again() -> None:
    (mark,) = marks(one_replica({"protectServing": True}, MOVABLE))
    assert mark.body["metadata"]["annotations"] == FIXED


def test_nothing_is_written_on_nodes_that_nobody_scales() -> None:
    assert marks(one_replica({}, FIXED, zone="a")) == []
    assert len(marks(one_replica({}, FIXED, **{"cloud.google.com/gke-nodepool": "gpu"}))) == 1


def test_a_fleet_on_a_pool_comes_to_rest() -> None:
    found = snapshot(amd(1), nodes=(pool_node(),))
    steps = trace(World(found, NOW), DEFAULTS, limit=60)
    world, last = steps[-1]
    assert last.actions == ()
    (replica,) = world.snapshot.pods
    assert {key: replica.annotations[key] for key in MOVABLE} == MOVABLE
