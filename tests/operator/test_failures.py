"""Failures: what is said about them, how long a place stays empty, where the replacement goes."""

from dataclasses import replace
from typing import Any

import pytest

from tests.operator.builders import DEFAULTS, NOW, amd, manual, pod, snapshot
from tests.operator.test_hardware import node
from tests.operator.test_rollout import bounds, condition, fleet_of, rolled, written
from tilefleet_operator import desired
from tilefleet_operator.desired import revision
from tilefleet_operator.failures import (
    AVOIDED_NODES,
    FAILED_BACKOFF_MOST_SECONDS,
    FORGIVEN_SECONDS,
    MOVE_SECONDS,
    Successor,
    failed_backoff,
    failure,
    move_backoff,
    successor,
)
from tilefleet_operator.fleet import LOST_SECONDS
from tilefleet_operator.hardware import NodeView
from tilefleet_operator.observed import Exit, PodView, pod_view
from tilefleet_operator.plan import Apply, plan


def crashed(name: str = "p", **changes: Any) -> PodView:
    base = {"ready": False, "restarts": 4, "reason": "CrashLoopBackOff", "created": NOW}
    return pod(name, "r", **{**base, **changes})


@pytest.mark.parametrize(
    ("view", "reason", "words"),
    [
        (
            crashed(restarts=1, last_exit=Exit(3, "Error", "ModelError: model 'file:///x': gone")),
            "ModelUnavailable",
            "pod p: model 'file:///x': gone; correct spec.model or the source",
        ),
        (
            crashed(restarts=1, reason="", last_exit=Exit(2, "Error", "ConfigError: --port 0")),
            "InvalidConfiguration",
            "pod p: --port 0; correct spec.engine",
        ),
        (
            crashed(restarts=1, last_exit=Exit(137, "OOMKilled")),
            "OutOfMemory",
            "pod p needed more memory than its limit; raise spec.engine.resources.memory",
        ),
        (
            crashed(last_exit=Exit(134, "Error", "2026-11-24 10:00:01 HW Exception")),
            "CrashLoop",
            "pod p crashed with exit code 134; see kubectl logs p --previous",
        ),
        (
            crashed(last_exit=Exit(1, "Error", "EngineError: a\n  step failed")),
            "CrashLoop",
            "exit code 1 (EngineError: a step failed); see",
        ),
        (crashed(), "CrashLoop", "pod p crashed; see kubectl logs p --previous"),
        (
            crashed(reason="ErrImagePull", image="r/x:1"),
            "ImagePull",
            "pod p cannot pull its image r/x:1; check spec.engine.image",
        ),
        (
            crashed(reason="CreateContainerConfigError", message='secret "hf" not found'),
            "ContainerConfig",
            'pod p: CreateContainerConfigError: secret "hf" not found; create what it names',
        ),
        (
            crashed(phase="Failed", reason="Evicted", message="low on memory"),
            "PodFailed",
            "pod p failed: Evicted: low on memory",
        ),
    ],
)
def test_failure_names_the_pod_the_fact_and_the_remedy(
    view: PodView, reason: str, words: str
) -> None:
    found = failure(view)
    assert found is not None
    assert found.reason == reason
    assert words in found.message


@pytest.mark.parametrize(
    "view",
    [
        crashed(ready=True, last_exit=Exit(137, "OOMKilled")),
        crashed(restarts=1, reason="", last_exit=Exit(134, "Error")),
        crashed(restarts=0, reason="ContainerCreating"),
        crashed(restarts=0, reason="Unschedulable", node=None),
    ],
)
def test_what_may_merely_need_time_is_no_failure(view: PodView) -> None:
    assert failure(view) is None


def test_image_text_is_the_same_for_both_of_the_kubelet_s_reasons() -> None:
    first = failure(crashed(reason="ErrImagePull", message="a"))
    assert first == failure(crashed(reason="ImagePullBackOff", message="b"))


def test_failure_stands_in_the_conditions_ready_and_degraded() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    ended = Exit(3, "Error", "ModelError: model 'file:///none': the folder /none does not exist")
    here = pod(f"llm-{new}-0", new, ready=False, restarts=1, last_exit=ended)
    status = plan(snapshot(of, (here,)), DEFAULTS, NOW).status
    assert status is not None
    assert condition(status, "Degraded")["reason"] == "ModelUnavailable"
    assert condition(status, "Ready")["reason"] == "Failed"
    for kind in ("Ready", "Degraded"):
        assert "the folder /none does not exist" in condition(status, kind)["message"]


def test_pod_view_reads_exit_image_and_what_the_pod_inherited() -> None:
    ended = {"exitCode": 3, "reason": "Error", "message": "ModelError: x", "finishedAt": None}
    view = pod_view(
        {
            "metadata": {
                "name": "a",
                "uid": "u",
                "annotations": {
                    "tilefleet.io/attempt": "2",
                    "tilefleet.io/avoid-nodes": "n1,n2",
                },
            },
            "spec": {"containers": [{"image": "r/x:1"}]},
            "status": {
                "conditions": [
                    {
                        "type": "Ready",
                        "status": "False",
                        "lastTransitionTime": "2027-01-15T08:00:00Z",
                    }
                ],
                "containerStatuses": [
                    {
                        "restartCount": 2,
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": {"terminated": ended},
                    }
                ],
            },
        }
    )
    assert view.last_exit == Exit(3, "Error", "ModelError: x")
    assert (view.image, view.attempt, view.avoid) == ("r/x:1", 2, ("n1", "n2"))
    assert view.unready_since is not None
    assert view.ready_since is None


@pytest.mark.parametrize("text", ["", "-1", "x", "1.5", "99999"])
def test_attempt_that_nobody_of_us_wrote_counts_as_none(text: str) -> None:
    metadata = {"name": "a", "uid": "u", "annotations": {"tilefleet.io/attempt": text}}
    assert pod_view({"metadata": metadata}).attempt == 0


def test_failed_pods_are_replaced_at_growing_intervals() -> None:
    """10, 20, 40 … 300 s; the count passes from pod to pod."""
    waits = [failed_backoff(crashed(attempt=n), NOW) for n in range(7)]
    assert waits == [10, 20, 40, 80, 160, 300, FAILED_BACKOFF_MOST_SECONDS]
    of = manual(1)
    new = revision(of, DEFAULTS)
    refused = pod(
        f"llm-{new}-0", new, ready=False, phase="Failed", reason="UnexpectedAdmissionError",
        attempt=2, avoid=("n0",), node="n1", created=NOW,
    )  # fmt: skip
    found = fleet_of(of, [refused])
    assert plan(found, DEFAULTS, NOW + 39).actions == ()
    later = plan(found, DEFAULTS, NOW + 40)
    assert written([later], new) == ["-new-0 +new-1"]
    made = later.actions[-1]
    assert isinstance(made, Apply)
    annotations = made.body["metadata"]["annotations"]
    assert annotations["tilefleet.io/attempt"] == "3"
    assert annotations["tilefleet.io/avoid-nodes"] == "n0,n1"


def test_long_life_is_forgiven_and_the_list_of_nodes_is_bounded() -> None:
    old = crashed(phase="Failed", attempt=5, avoid=("n7",), node="n1")
    assert successor(old, NOW + FORGIVEN_SECONDS + 1) == Successor()
    many = tuple(f"m{i}" for i in range(20))
    heir = successor(replace(old, avoid=many), NOW + 300)
    assert heir == Successor(6, (*many[-(AVOIDED_NODES - 1) :], "n1"))
    again = successor(replace(old, avoid=("n1", "n2")), NOW + 300)
    assert again.avoid == ("n2", "n1")


def test_avoided_nodes_are_a_preference_and_no_part_of_the_revision() -> None:
    """Where no other node fits, an avoided one must do."""
    of = amd(1)
    made = desired.pod(of, 0, "r", DEFAULTS, Successor(1, ("n1", "n2")))
    affinity = made["spec"]["affinity"]["nodeAffinity"]
    assert affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    (preferred,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    fields = preferred["preference"]["matchFields"]
    assert [(f["operator"], f["values"]) for f in fields] == [("NotIn", ["n1"]), ("NotIn", ["n2"])]
    assert (
        "tilefleet.io/attempt" not in desired.pod(of, 0, "r", DEFAULTS)["metadata"]["annotations"]
    )


def looping(of: Any, elsewhere: str, **changes: Any) -> tuple[PodView, ...]:
    new = revision(of, DEFAULTS)
    base = {"node": "n1", "ready": False, "restarts": 3, "created": NOW}
    view = pod(f"llm-{new}-0", new, **{**base, "reason": "CrashLoopBackOff", **changes})
    return view, pod(f"llm-{new}-1", new, node=elsewhere)


def test_pod_that_crashes_on_one_node_only_moves_after_a_while() -> None:
    of = manual(2)
    new = revision(of, DEFAULTS)
    found = fleet_of(of, looping(of, "n2"))
    early = plan(found, DEFAULTS, NOW + MOVE_SECONDS - 1)
    assert early.actions == ()
    assert early.requeue_after == 1.0
    moved = plan(found, DEFAULTS, NOW + MOVE_SECONDS)
    assert written([moved], new) == ["-new-0 +new-2"]
    assert "serves on node n2" in moved.actions[0].why
    made = moved.actions[-1]
    assert isinstance(made, Apply)
    assert made.body["metadata"]["annotations"]["tilefleet.io/avoid-nodes"] == "n1"
    again = fleet_of(of, looping(of, "n2", attempt=2))
    assert plan(again, DEFAULTS, NOW + 4 * MOVE_SECONDS - 1).actions == ()
    assert plan(again, DEFAULTS, NOW + 4 * MOVE_SECONDS).actions != ()


@pytest.mark.parametrize(
    "pods",
    [
        looping(manual(2), "n1"),  # the same node serves: it is not to blame
        looping(manual(2), "n2", restarts=2),
        looping(manual(2), "n2", reason=""),  # it runs again; the restarts lie back
    ],
)
def test_other_crashing_pods_are_left_to_the_kubelet(pods: tuple[PodView, ...]) -> None:
    assert plan(fleet_of(manual(2), pods), DEFAULTS, NOW + 9999).actions == ()


def test_without_a_node_or_a_crash_there_is_no_move() -> None:
    assert move_backoff(crashed(node=None), NOW) is None
    assert move_backoff(crashed(ready=True), NOW) is None


def on_nodes(*, ready: bool, changed: float = NOW) -> tuple[NodeView, ...]:
    return (NodeView("n1", ready=ready, ready_changed=changed), NodeView("n2"))


def test_replica_on_a_node_that_is_not_ready_is_replaced_and_comes_back() -> None:
    of = manual(2)
    new = revision(of, DEFAULTS)
    gone = pod(f"llm-{new}-0", new, node="n1", ready=False, unready_since=NOW - 5)
    here = pod(f"llm-{new}-1", new, node="n2")
    found = fleet_of(of, (gone, here), nodes=on_nodes(ready=False))
    waiting = plan(found, DEFAULTS, NOW + LOST_SECONDS - 1)
    assert waiting.actions == ()
    assert waiting.requeue_after == 1.0
    lost = plan(found, DEFAULTS, NOW + LOST_SECONDS)
    assert written([lost], new) == ["+new-2"]
    assert lost.status is not None
    degraded = condition(lost.status, "Degraded")
    assert (degraded["reason"], degraded["message"]) == (
        "NodeLost",
        f"node n1 of pod {gone.name} is gone or not Ready; a replica replaces it",
    )
    starting = pod(f"llm-{new}-2", new, node="n2", ready=False, created=NOW + 31)
    # the node comes back first: the one that still loads goes
    back = fleet_of(of, (replace(gone, ready=True), here, starting), nodes=on_nodes(ready=True))
    assert written([plan(back, DEFAULTS, NOW + 60)], new) == ["-new-2"]
    # the replacement serves first: nobody waits for the lost one
    ready = replace(starting, ready=True)
    served = fleet_of(of, (gone, here, ready), nodes=on_nodes(ready=False))
    assert written([plan(served, DEFAULTS, NOW + 60)], new) == ["-new-0"]


def test_deleted_node_counts_as_lost_and_an_unknown_cluster_does_not() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    gone = pod(f"llm-{new}-0", new, node="n9", ready=False, unready_since=NOW)
    known = fleet_of(of, (gone,), nodes=(NodeView("n2"),))
    assert written([plan(known, DEFAULTS, NOW + LOST_SECONDS)], new) == ["+new-1"]
    assert plan(fleet_of(of, (gone,)), DEFAULTS, NOW + 9999).actions == ()
    serving = fleet_of(of, (replace(gone, ready=True),), nodes=(NodeView("n2"),))
    assert plan(serving, DEFAULTS, NOW + 9999).actions == ()


def sick_fleet(spare_node: bool, surge: int, unavailable: int) -> Any:
    """One replica on all GPUs of a node that turned unhealthy, and maybe a node for another."""
    of = amd(1, count=8, **bounds(surge, unavailable))
    new = revision(of, DEFAULTS)
    devices = {"amd.com/gpu": 8.0}
    nodes = [node("sick")] + [replace(node("spx8"), name="n2")] * spare_node
    pods = [pod(f"llm-{new}-0", new, node="sick", requests=devices)]
    known = {"currentRevision": new}
    use = {"sick": devices}
    found = fleet_of(replace(of, status=known), pods, nodes=tuple(nodes), device_use=use)
    return found, new


@pytest.mark.parametrize(
    ("surge", "unavailable", "expected"),
    [
        (1, 0, ["+new-1", "~new-0", "-new-0"]),
        (0, 1, ["~new-0 +new-1", "-new-0"]),
    ],
)
def test_replica_on_unhealthy_gpus_is_replaced_where_another_node_has_room(
    surge: int, unavailable: int, expected: list[str]
) -> None:
    found, new = sick_fleet(True, surge, unavailable)
    lines, steps = rolled(found, start_seconds=3, drain_seconds=2)
    assert lines == expected
    (last,) = steps[-1][0].snapshot.pods
    assert (last.node, last.ready, last.revision) == ("n2", True, new)
    added = next(a for _, s in steps for a in s.actions if isinstance(a, Apply))
    assert added.why == "0 of 1 replicas have healthy GPUs"
    assert added.body["metadata"]["annotations"]["tilefleet.io/avoid-nodes"] == "sick"


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), (1, 1)])
def test_degraded_gpus_go_on_serving_where_no_other_has_room(surge: int, unavailable: int) -> None:
    found, _ = sick_fleet(False, surge, unavailable)
    lines, _ = rolled(found)
    assert lines == []
