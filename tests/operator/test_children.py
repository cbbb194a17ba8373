"""The children beside the pods: what they say, how drift is repaired, whose objects are safe."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes_validate import validate

from tests.operator import builders
from tests.operator.builders import (
    DEFAULTS,
    NOW,
    UID,
    amd,
    deployment,
    manual,
    pod,
    snapshot,
)
from tilefleet_operator.actions import Apply, Delete
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.children import children, disruption_budget, names, network_policy
from tilefleet_operator.desired import revision
from tilefleet_operator.observed import Snapshot
from tilefleet_operator.plan import plan
from tilefleet_operator.upkeep import covers, is_claimable

KINDS = ("ServiceAccount", "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor")


def held(of: InferenceDeployment, replicas: int = 1, **changes: Any) -> Snapshot:
    """A converged fleet, with PodMonitors served."""
    new = revision(of, DEFAULTS)
    pods = tuple(pod(f"llm-{new}-{slot}", new) for slot in range(replicas))
    found = builders.children(of, replicas, monitors_served=True)
    return snapshot(of, pods, children=found | changes.pop("also", {}), monitors_served=True)


def actions(found: Snapshot, **defaults: Any) -> list[tuple[str, str, str]]:
    made = plan(found, replace(DEFAULTS, **defaults), NOW).actions
    return [(type(action).__name__, action.kind, action.name) for action in made]


@pytest.mark.parametrize("of", [manual(1), amd(2)], ids=["cpu", "amd"])
def test_children_fit_the_schema_of_kubernetes_and_are_owned(of: InferenceDeployment) -> None:
    bodies = children(of, 2, DEFAULTS, True)
    assert sorted(body["kind"] for body in bodies) == sorted(KINDS)
    for body in bodies:
        if body["kind"] != "PodMonitor":
            validate(body, "1.30", strict=True)
        (owner,) = body["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (UID, True)
        assert body["metadata"]["labels"]["tilefleet.io/deployment"] == "llm"
        assert body["metadata"]["name"] == names(of)[body["kind"]]


def test_a_fleet_called_default_leaves_the_default_account_alone() -> None:
    assert names(replace(manual(1), name="default"))["ServiceAccount"] == "default-worker"


@pytest.mark.parametrize(
    ("wanted", "unavailable", "least"), [(0, 0, 0), (1, 0, 0), (4, 0, 3), (4, 2, 2), (1, 5, 0)]
)
def test_a_node_drain_takes_what_a_rollout_may_but_never_gets_stuck(
    wanted: int, unavailable: int, least: int
) -> None:
    of = manual(wanted, rollout={"maxUnavailable": unavailable})
    assert disruption_budget(of, wanted)["spec"]["minAvailable"] == least


def test_the_budget_follows_the_size_of_an_auto_fleet() -> None:
    """spec.replicas stays 1 while load wants five: the budget must know the five."""
    of = deployment(status={"desiredReplicas": 5}, autoscaling={"minReplicas": 5, "maxReplicas": 6})
    made = plan(snapshot(of), DEFAULTS, NOW).actions
    (budget,) = [action for action in made if action.kind == "PodDisruptionBudget"]
    assert isinstance(budget, Apply)
    assert budget.body["spec"]["minAvailable"] == 4


def test_the_admin_port_is_closed_but_for_the_operator_and_those_named() -> None:
    defaults = replace(DEFAULTS, namespace="ops", admin_from=("monitoring", "10.1.0.0/16"))
    serving, admin = network_policy(manual(1), defaults)["spec"]["ingress"]
    assert serving == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert admin["ports"] == [{"port": 8001, "protocol": "TCP"}]
    name = "kubernetes.io/metadata.name"
    assert admin["from"] == [
        {"ipBlock": {"cidr": "10.1.0.0/16"}},
        {"namespaceSelector": {"matchLabels": {name: "monitoring"}}},
        {"namespaceSelector": {"matchLabels": {name: "ops"}}},
    ]
    assert network_policy(manual(1), defaults)["spec"]["policyTypes"] == ["Ingress"]


def test_a_converged_fleet_has_nothing_to_do() -> None:
    assert actions(held(manual(2), 2)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_that_is_gone_comes_back(kind: str) -> None:
    found = held(manual(1))
    left = {key: body for key, body in found.children.items() if key[0] != kind}
    assert actions(replace(found, children=left)) == [("Apply", kind, names(manual(1))[kind])]


EDITS: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("Service", ("spec", "selector", "tilefleet.io/state"), "draining"),
    ("Service", ("spec", "ports", 0, "targetPort"), "admin"),
    ("ServiceAccount", ("automountServiceAccountToken",), True),
    ("PodDisruptionBudget", ("spec", "minAvailable"), 9),
    ("NetworkPolicy", ("spec", "ingress", 1, "from"), []),
    ("NetworkPolicy", ("spec", "ingress"), []),
    ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "port"), "http"),
    ("Service", ("metadata", "labels", "app.kubernetes.io/managed-by"), "else"),
]


def edited(found: Snapshot, kind: str, path: tuple[str | int, ...], value: Any) -> Snapshot:
    """The same cluster with one field of a child changed."""
    key = (kind, names(found.deployment)[kind])
    body = copy.deepcopy(found.children[key])
    place: Any = body
    for step in path[:-1]:
        place = place[step] if isinstance(step, int) else place.setdefault(step, {})
    place[path[-1]] = value
    return replace(found, children={**found.children, key: body})


@pytest.mark.parametrize(("kind", "path", "value"), EDITS)
def test_drift_of_a_child_is_repaired(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    found = edited(held(manual(1)), kind, path, value)
    assert actions(found) == [("Apply", kind, names(manual(1))[kind])]


FOREIGN: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("Service", ("spec", "clusterIP"), "10.0.0.1"),
    ("Service", ("metadata", "annotations", "mesh"), "on"),
    ("Service", ("spec", "ports", 0, "nodePort"), 30000),
    ("ServiceAccount", ("imagePullSecrets",), [{"name": "pull"}]),
    ("PodDisruptionBudget", ("status",), {"disruptionsAllowed": 0}),
    ("NetworkPolicy", ("metadata", "finalizers"), ["cni"]),
]


@pytest.mark.parametrize(("kind", "path", "value"), FOREIGN)
def test_fields_of_others_are_left_alone(
    kind: str, path: tuple[str | int, ...], value: Any
) -> None:
    assert actions(edited(held(manual(1)), kind, path, value)) == []


def test_ports_and_owners_of_others_beside_ours_are_left_alone() -> None:
    """Kubernetes merges these lists by key: an apply of ours would never remove the others."""
    found = held(manual(1))
    port = {"name": "grpc", "port": 9000, "protocol": "TCP"}
    owner = {"uid": "another", "kind": "X", "name": "x", "apiVersion": "v1"}
    body = copy.deepcopy(found.children["Service", "llm"])
    body["spec"]["ports"].insert(0, port)
    body["metadata"]["ownerReferences"].insert(0, owner)
    assert actions(replace(found, children={**found.children, ("Service", "llm"): body})) == []


@given(st.sampled_from(KINDS), st.data())
def test_a_child_covers_itself_and_no_loss_goes_unseen(kind: str, data: st.DataObject) -> None:
    (wanted,) = [b for b in children(manual(2), 2, DEFAULTS, True) if b["kind"] == kind]
    seen = copy.deepcopy(wanted)
    assert covers(seen, wanted)
    place: Any = seen
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.just(0))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            del place[key]
            break
        place = place[key]
    assert not covers(seen, wanted)


def taken(kind: str, **metadata: Any) -> dict[tuple[str, str], Any]:
    name = names(manual(1))[kind]
    about = {"name": name, "namespace": "team", "uid": "theirs", "resourceVersion": "1"}
    return {(kind, name): {"kind": kind, "metadata": about | metadata, "spec": {}}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_taken_is_said_with_the_remedy_and_not_written(kind: str) -> None:
    found = held(manual(1), also=taken(kind))
    made = plan(found, DEFAULTS, NOW)
    assert made.actions == ()
    assert made.status is not None
    degraded = next(c for c in made.status["conditions"] if c["type"] == "Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "NameConflict")
    for part in (kind, names(manual(1))[kind], "tilefleet.io/adopt=llm", "delete it"):
        assert part in degraded["message"]
    assert made.requeue_after == 5.0, "no watch shows what lacks our label"


def test_an_object_of_another_controller_cannot_be_handed_over() -> None:
    owners = [{"uid": "another", "controller": True}]
    notes = {"tilefleet.io/adopt": "llm"}
    found = held(manual(1), also=taken("Service", ownerReferences=owners, annotations=notes))
    made = plan(found, DEFAULTS, NOW)
    assert made.actions == ()
    assert made.status is not None
    degraded = next(c for c in made.status["conditions"] if c["type"] == "Degraded")
    assert "another controller" in degraded["message"]
    assert "adopt" not in degraded["message"]


def test_an_object_without_controller_is_adopted_when_it_names_the_fleet() -> None:
    wrong = taken("Service", annotations={"tilefleet.io/adopt": "other"})
    assert actions(held(manual(1), also=wrong)) == []
    right = taken("Service", annotations={"tilefleet.io/adopt": "llm"})
    assert actions(held(manual(1), also=right)) == [("Apply", "Service", "llm")]
    assert not is_claimable(wrong["Service", "llm"], UID, "llm")


def test_no_pod_runs_under_the_account_of_somebody_else() -> None:
    made = {kind for _, kind, _ in actions(snapshot(manual(2), children=taken("ServiceAccount")))}
    assert made == {"ControllerRevision", "Service", "PodDisruptionBudget", "NetworkPolicy"}


def test_switched_off_children_are_deleted_only_when_they_are_ours() -> None:
    of = manual(1, monitoring={"podMonitor": "disabled"})
    found = held(manual(1))
    found = replace(held(of), children=found.children)
    made = plan(found, replace(DEFAULTS, network_policy=False), NOW).actions
    assert sorted((type(a), a.kind, a.uid) for a in made if isinstance(a, Delete)) == [
        (Delete, "NetworkPolicy", "uid-NetworkPolicy"),
        (Delete, "PodMonitor", "uid-PodMonitor"),
    ]
    assert len(made) == 2
    theirs = {**found.children, **taken("NetworkPolicy"), **taken("PodMonitor")}
    assert actions(replace(found, children=theirs), network_policy=False) == []


def test_no_monitor_without_its_definition() -> None:
    found = snapshot(manual(1), children=builders.children(manual(1)))
    assert "PodMonitor" not in [kind for _, kind, _ in actions(found)]
    assert "PodMonitor" in [k for _, k, _ in actions(replace(found, monitors_served=True))]


def test_a_paused_fleet_is_not_repaired() -> None:
    assert actions(snapshot(manual(1, paused=True))) == []
