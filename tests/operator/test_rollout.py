"""Rollouts as exact sequences: surge or recreate by room, proof first, stop, pause, go back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.operator.builders import DEFAULTS, NOW, amd, children, manual, pod, snapshot
from tests.operator.test_hardware import node
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.desired import revision
from tilefleet_operator.moves import SURGE_PATIENCE_SECONDS
from tilefleet_operator.observed import PodView, Snapshot
from tilefleet_operator.plan import Apply, Delete, Drain, Plan, plan
from tilefleet_operator.simulation import World, trace

MARKS = {Apply: "+", Drain: "~", Delete: "-"}


def fleet_of(of: InferenceDeployment, pods: Sequence[PodView] = (), **changes: Any) -> Snapshot:
    """A fleet whose Service exists and whose revision `old` was everywhere."""
    known = replace(of, status={"currentRevision": "old", **of.status})
    return snapshot(known, tuple(pods), children=children(of), **changes)


def old_pods(count: int, **changes: Any) -> tuple[PodView, ...]:
    return tuple(pod(f"llm-old-{slot}", "old", **changes) for slot in range(count))


def written(steps: Sequence[Plan], new: str) -> list[str]:
    """Each acting plan as one line: + create, ~ drain, - delete."""
    lines = []
    for step in steps:
        names = [f"{MARKS[type(a)]}{a.name.removeprefix('llm-')}" for a in step.actions]
        if names:
            lines.append(" ".join(names).replace(new, "new"))
    return lines


def rolled(found: Snapshot, **options: Any) -> tuple[list[str], list[tuple[World, Plan]]]:
    steps = trace(World(found, NOW), DEFAULTS, **{"limit": 300, **options})
    new = revision(found.deployment, DEFAULTS)
    return written([step for _, step in steps], new), steps


def bounds(surge: int, unavailable: int, **more: Any) -> dict[str, Any]:
    return {"rollout": {"maxSurge": surge, "maxUnavailable": unavailable, **more}}


def condition(status: Any, kind: str) -> dict[str, Any]:
    return next(c for c in status["conditions"] if c["type"] == kind)


@pytest.mark.parametrize(
    ("wanted", "surge", "unavailable", "expected"),
    [
        # maxUnavailable is not used while the surge finds room and the revision is unproven
        (2, 1, 1, ["+new-0", "~old-0 ~old-1 +new-1", "-old-0 -old-1"]),
        (3, 2, 0, ["+new-0 +new-1", "~old-0 ~old-1 +new-2", "-old-0 -old-1", "~old-2", "-old-2"]),
        # without surge one replica tries the new revision, then as many as may be missing
        (3, 0, 2, ["~old-0 +new-0", "-old-0", "~old-1 ~old-2 +new-1 +new-2", "-old-1 -old-2"]),
        (2, 0, 1, ["~old-0 +new-0", "-old-0", "~old-1 +new-1", "-old-1"]),
        (1, 0, 1, ["~old-0 +new-0", "-old-0"]),
        (0, 1, 0, ["~old-0 ~old-1", "-old-0 -old-1"]),
    ],
)
def test_rollout_where_every_pod_finds_room(
    wanted: int, surge: int, unavailable: int, expected: list[str]
) -> None:
    found = fleet_of(manual(wanted, **bounds(surge, unavailable)), old_pods(wanted or 2))
    lines, steps = rolled(found, start_seconds=5, drain_seconds=2)
    assert lines == expected
    status = steps[-1][0].snapshot.deployment.status
    assert status["currentRevision"] == status["updateRevision"]
    assert condition(status, "Progressing")["reason"] == "Complete"
    assert "rollout" not in status


def full_nodes(of: InferenceDeployment, count: int) -> Snapshot:
    """`count` nodes of 8 GPUs, each with one old replica that holds them all."""
    nodes = tuple(replace(node("spx8"), name=f"n{i}") for i in range(count))
    devices = {"amd.com/gpu": 8.0}
    pods = [pod(f"llm-old-{i}", "old", node=f"n{i}", requests=devices) for i in range(count)]
    return fleet_of(of, pods, nodes=nodes, device_use={f"n{i}": devices for i in range(count)})


def test_full_cluster_recreates_within_max_unavailable() -> None:
    """The surge pod finds no place: after a moment one old replica leaves for it, then the next."""
    found = full_nodes(amd(2, **bounds(1, 1)), 2)
    lines, steps = rolled(found, start_seconds=5, drain_seconds=2)
    assert lines == [
        "+new-0", "~old-0 +new-1", "-old-0", "~old-1", "-old-1",
    ]  # fmt: skip
    first_drain = next(w.now for w, s in steps if any(isinstance(a, Drain) for a in s.actions))
    assert first_drain - NOW >= SURGE_PATIENCE_SECONDS
    assert [p.ready for p in steps[-1][0].snapshot.pods] == [True, True]
    for world, _ in steps:
        for used in world.snapshot.device_use.values():
            assert used["amd.com/gpu"] <= 8


def test_full_cluster_with_max_unavailable_zero_waits_and_says_what_helps() -> None:
    found = full_nodes(amd(2, **bounds(1, 0)), 2)
    lines, steps = rolled(found)
    assert lines == ["+new-0"]
    status = steps[-1][0].snapshot.deployment.status
    progressing = condition(status, "Progressing")
    assert progressing["reason"] == "RolloutInProgress"
    assert progressing["message"].endswith("or set rollout.maxUnavailable to 1")
    assert condition(status, "Ready")["reason"] == "AllReplicasReady"
    # and it goes on as soon as the user does that
    helped = replace(amd(2, **bounds(1, 1)), status=steps[-1][0].snapshot.deployment.status)
    last = replace(steps[-1][0].snapshot, deployment=helped)
    after = trace(World(last, steps[-1][0].now), DEFAULTS, drain_seconds=2)
    assert all(p.ready and p.revision != "old" for p in after[-1][0].snapshot.pods)


def broken(world: World, names: str) -> World:
    """Pods whose name holds `names` never become ready: their model is missing."""
    pods = tuple(
        replace(p, ready=False, reason="CrashLoopBackOff", restarts=4) if names in p.name else p
        for p in world.snapshot.pods
    )
    return World(replace(world.snapshot, pods=pods), world.now)


def run_broken(found: Snapshot, seconds: int) -> list[tuple[World, Plan]]:
    """Like trace(), in a world where the new revision does not start."""
    from tilefleet_operator.simulation import advance

    world, steps = World(found, NOW), []
    new = revision(found.deployment, DEFAULTS)
    for _ in range(seconds):
        step = plan(world.snapshot, DEFAULTS, world.now)
        steps.append((world, step))
        world = broken(advance(world, step, start_seconds=2, drain_seconds=2), new)
    return steps


@pytest.mark.parametrize(
    ("surge", "unavailable", "kept"), [(1, 0, 3), (1, 2, 3), (3, 0, 3), (0, 2, 2)]
)
def test_revision_that_never_starts_stops_and_leaves_old_replicas(
    surge: int, unavailable: int, kept: int
) -> None:
    """With room to surge no old replica is lost; without surge one, whatever may be missing."""
    of = manual(3, **bounds(surge, unavailable, progressDeadline="30s"))
    steps = run_broken(fleet_of(of, old_pods(3)), 60)
    serving = [p for p in steps[-1][0].snapshot.pods if p.ready and p.state == "active"]
    assert [p.revision for p in serving] == ["old"] * kept
    status = steps[-1][0].snapshot.deployment.status
    progressing = condition(status, "Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "ProgressDeadlineExceeded")
    assert "progressDeadline 30s" in progressing["message"]
    assert "rollout undo llm" in progressing["message"]
    assert "crashed" in progressing["message"]
    events = [event for _, step in steps for event in step.events]
    stopped = [e for e in events if e[1] == "ProgressDeadlineExceeded"]
    assert [e[0] for e in stopped] == ["Warning"], "said once"
    assert not [e for e in events if e[1] == "RolloutComplete"]
    writes = [world.now for world, step in steps[-25:] if step.status is not None]
    assert writes == [], "a stopped rollout rests"


def test_stopped_rollout_goes_on_when_a_replica_becomes_ready_after_all() -> None:
    of = manual(2, **bounds(1, 0, progressDeadline="10s"))
    lines, steps = rolled(fleet_of(of, old_pods(2)), start_seconds=25, drain_seconds=2)
    assert lines == ["+new-0", "~old-0 +new-1", "-old-0", "~old-1", "-old-1"]
    reasons = [condition(s.status, "Progressing")["reason"] for _, s in steps if s.status]
    assert [r for i, r in enumerate(reasons) if i == 0 or reasons[i - 1] != r] == [
        "RolloutInProgress", "ProgressDeadlineExceeded", "RolloutInProgress",
        "ProgressDeadlineExceeded", "RolloutInProgress", "Complete",
    ]  # fmt: skip


def test_pause_stops_the_clock_and_every_change_and_resume_goes_on() -> None:
    of = manual(2, **bounds(1, 0, progressDeadline="20s"))
    _, steps = rolled(fleet_of(of, old_pods(2)), start_seconds=1000, limit=10)
    world = steps[-1][0]
    paused = replace(
        manual(2, paused=True, **bounds(1, 0, progressDeadline="20s")),
        status=world.snapshot.deployment.status,
    )
    held = trace(
        World(replace(world.snapshot, deployment=paused), world.now + 500), DEFAULTS, limit=60
    )
    assert [s.actions for _, s in held if s.actions] == []
    status = held[-1][0].snapshot.deployment.status
    assert condition(status, "Progressing")["reason"] == "Paused"
    resumed = replace(of, status=status, generation=2)
    world = World(replace(held[-1][0].snapshot, deployment=resumed), held[-1][0].now)
    first = plan(world.snapshot, DEFAULTS, world.now)
    assert first.status is not None
    assert condition(first.status, "Progressing")["reason"] == "RolloutInProgress"
    lines, _ = rolled(world.snapshot, start_seconds=3, drain_seconds=2)
    assert lines[-1] == "-old-1"


def test_going_back_in_the_middle_drops_the_new_pods_and_keeps_the_old() -> None:
    """The old revision is the wanted one again: its pods are not restarted."""
    before = manual(3)
    old = revision(before, DEFAULTS)
    pods = tuple(pod(f"llm-{old}-{slot}", old) for slot in range(3))
    tried = (pod("llm-bad-0", "bad", ready=False),)
    found = fleet_of(before, (*pods, *tried))
    lines, steps = rolled(found)
    assert lines == ["-bad-0"]
    assert {p.uid for p in steps[-1][0].snapshot.pods} == {p.uid for p in pods}


def test_smaller_fleet_in_the_middle_of_a_rollout() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    pods = (*old_pods(2), pod(f"llm-{new}-0", new), pod(f"llm-{new}-1", new, ready=False))
    lines, _ = rolled(fleet_of(of, pods), drain_seconds=2)
    assert lines == ["~old-0 ~old-1 -new-1", "-old-0 -old-1"]


def test_pods_that_became_unready_by_themselves_count() -> None:
    """One of three does not serve and one may be missing: the rollout takes no other."""
    of = manual(3, **bounds(0, 1))
    new = revision(of, DEFAULTS)
    pods = (*old_pods(2), pod(f"llm-{new}-0", new, ready=False, reason="CrashLoopBackOff"))
    assert plan(fleet_of(of, pods), DEFAULTS, NOW).actions == ()


def test_surplus_on_a_sick_node_is_not_taken_below_the_floor() -> None:
    """A replica on an unhealthy GPU leaves first, but not while it is the one that serves."""
    of = amd(2, count=1)
    new = revision(of, DEFAULTS)
    pods = [pod(f"llm-{new}-{i}", new, node="n0", ready=False) for i in range(2)]
    pods.append(pod(f"llm-{new}-2", new, node="sick"))
    found = fleet_of(of, pods, nodes=(node("sick"), replace(node("spx8"), name="n0")))
    assert written([plan(found, DEFAULTS, NOW)], new) == []


def test_old_replicas_that_do_not_serve_leave_at_once() -> None:
    of = manual(2)
    new = revision(of, DEFAULTS)
    pods = (pod("llm-old-0", "old"), pod("llm-old-1", "old", ready=False))
    assert written([plan(fleet_of(of, pods), DEFAULTS, NOW)], new) == ["-old-1 +new-0 +new-1"]


def test_quota_that_refuses_the_surge_does_not_hold_the_rollout_for_ever() -> None:
    """No new pod comes to be: after a moment an old one makes room within maxUnavailable."""
    of = manual(2, **bounds(1, 1))
    found = fleet_of(of, old_pods(2))
    first = plan(found, DEFAULTS, NOW)
    assert first.status is not None
    refused = replace(found, deployment=replace(of, status=first.status))
    new = revision(of, DEFAULTS)
    assert written([plan(refused, DEFAULTS, NOW + 5)], new) == ["+new-0"]
    later = NOW + SURGE_PATIENCE_SECONDS
    assert written([plan(refused, DEFAULTS, later)], new) == ["~old-0 +new-0 +new-1"]
