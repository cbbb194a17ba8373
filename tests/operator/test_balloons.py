"""Balloons: warm places of a replica's shape, which nobody counts and replicas take."""

from dataclasses import replace
from typing import Any

import pytest
from kubernetes_validate import validate

from tests.operator.builders import DEFAULTS, NOW, amd, children, manual, node, pod, snapshot
from tilefleet_operator.actions import Apply, Delete
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.balloons import BACKOFF_SECONDS, balloon, balloon_name
from tilefleet_operator.desired import pod as render
from tilefleet_operator.desired import revision
from tilefleet_operator.observed import PodView, Snapshot, device_use
from tilefleet_operator.plan import plan

WARM = {"balloon": {"replicas": 2}}


def held(of: InferenceDeployment, slot: int, **changes: Any) -> PodView:
    """A running balloon of the fleet."""
    new = changes.pop("revision", revision(of, DEFAULTS))
    labels = {
        "tilefleet.io/deployment": "llm",
        "tilefleet.io/role": "balloon",
        "tilefleet.io/revision": new,
    }
    view = pod(balloon_name(of, slot, new), new, labels=labels, requests={"amd.com/gpu": 8.0})
    return replace(view, **changes)


def found(of: InferenceDeployment, *pods: PodView, **changes: Any) -> Snapshot:
    return snapshot(of, pods, children=children(of, of.spec.replicas), **changes)


def acts(seen: Snapshot, now: float = NOW) -> list[tuple[str, str]]:
    """Kind and name of every action on balloons."""
    return [
        (type(action).__name__, action.name)
        for action in plan(seen, DEFAULTS, now).actions
        if action.kind == "Pod" and action.name.split("-")[-1].startswith("b")
    ]


@pytest.mark.parametrize("of", [amd(1), manual(1)], ids=["amd", "cpu"])
def test_a_balloon_has_a_replica_s_shape_and_does_nothing(of: InferenceDeployment) -> None:
    body = balloon(of, 0, "r", DEFAULTS, None)
    validate(body, "1.36", strict=True)
    worker = render(of, 0, "r", DEFAULTS)
    for key in ("affinity", "tolerations", "nodeSelector", "securityContext"):
        assert body["spec"].get(key) == worker["spec"].get(key)
    (sleeper,), (engine,) = body["spec"]["containers"], worker["spec"]["containers"]
    assert sleeper["image"] == engine["image"], "the image comes to the node with it"
    assert sleeper["resources"] == engine["resources"]
    assert not {"ports", "args", "env", "readinessProbe", "volumeMounts"} & sleeper.keys()
    assert body["spec"]["priorityClassName"] == "tilefleet-balloon"
    assert body["spec"]["terminationGracePeriodSeconds"] == 0
    serving = {"tilefleet.io/role": "worker"}
    assert not serving.items() <= body["metadata"]["labels"].items(), "no Service finds it"


def test_missing_balloons_are_made_and_spare_ones_go() -> None:
    of = amd(0, capacity=WARM)
    new = revision(of, DEFAULTS)
    assert acts(found(of)) == [("Apply", f"llm-{new}-b0"), ("Apply", f"llm-{new}-b1")]
    both = (held(of, 0), held(of, 1))
    assert acts(found(of, *both)) == []
    assert acts(found(of, both[1])) == [("Apply", f"llm-{new}-b0")]
    assert acts(found(amd(0), *both)) == [("Delete", f"llm-{new}-b{n}") for n in (0, 1)]


def test_balloons_of_another_shape_are_replaced() -> None:
    of = amd(0, capacity={"balloon": {"replicas": 1}})
    old = held(of, 0, revision="0ld")
    new = revision(of, DEFAULTS)
    assert acts(found(of, old)) == [("Delete", "llm-0ld-b0"), ("Apply", f"llm-{new}-b0")]


def test_an_ended_balloon_is_made_anew_after_a_pause() -> None:
    of = amd(0, capacity={"balloon": {"replicas": 1}})
    ended = held(of, 0, phase="Failed", ready=False, created=NOW)
    assert acts(found(of, ended), NOW + BACKOFF_SECONDS - 1) == []
    new = revision(of, DEFAULTS)
    assert acts(found(of, ended), NOW + BACKOFF_SECONDS) == [
        ("Delete", f"llm-{new}-b0"),
        ("Apply", f"llm-{new}-b1"),
    ]


def test_foreign_pods_are_no_balloons_of_ours() -> None:
    of = amd(0)
    assert acts(found(of, held(of, 0, owner_uid="other"), held(of, 1, terminating=True))) == []


def test_balloons_count_as_nothing_and_their_devices_as_free() -> None:
    of = amd(1, capacity={"balloon": {"replicas": 1}})
    on = held(of, 0, node="n1")
    seen = found(of, on, nodes=(node("spx8", "n1"),), device_use=device_use((on,)))
    step = plan(seen, DEFAULTS, NOW)
    (added,) = [a for a in step.actions if isinstance(a, Apply) and a.kind == "Pod"]
    spec: Any = added.body["spec"]
    preferred = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred[0]["preference"]["matchExpressions"][0]["values"] == ["n1"]
    assert step.status is not None
    assert (step.status["replicas"], step.status["readyReplicas"]) == (0, 0)
    limited = next(c for c in step.status["conditions"] if c["type"] == "CapacityLimited")
    assert limited["status"] == "False"


def test_paused_fleets_keep_their_balloons() -> None:
    of = amd(0, capacity=WARM, paused=True)
    assert acts(found(of)) == []
    assert not any(isinstance(a, Delete) for a in plan(found(of), DEFAULTS, NOW).actions)
