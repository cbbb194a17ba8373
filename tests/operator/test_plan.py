"""plan(): sizes, rollouts, drains and what stays untouched; the bounds hold at every step."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator import builders
from tests.operator.builders import (
    DEFAULTS,
    NOW,
    children,
    deployment,
    manual,
    pod,
    snapshot,
    stats,
)
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.children import service
from tilefleet_operator.desired import revision
from tilefleet_operator.failures import FAILED_BACKOFF_SECONDS
from tilefleet_operator.observed import MissingStats, PodView, Snapshot
from tilefleet_operator.plan import Apply, Delete, Drain, invalid, plan
from tilefleet_operator.simulation import World, simulate, trace


def converged(of: InferenceDeployment, count: int) -> Snapshot:
    """A snapshot that wants nothing: ready pods, Service, and the status that says so."""
    new = revision(of, DEFAULTS)
    pods = tuple(pod(f"llm-{new}-{slot}", new) for slot in range(count))
    found = snapshot(
        of,
        pods,
        {p.uid: stats() for p in pods},
        children=children(of, count),
    )
    first = plan(found, DEFAULTS, NOW)
    assert first.actions == ()
    assert first.status is not None
    return replace(found, deployment=replace(of, status=first.status))


def kinds(found: Snapshot, now: float = NOW) -> list[tuple[str, str]]:
    return [(type(a).__name__, a.name) for a in plan(found, DEFAULTS, now).actions]


def test_first_plan_creates_the_children_and_then_every_pod() -> None:
    of = manual(2)
    new = revision(of, DEFAULTS)
    made = [(action.kind, action.name) for action in plan(snapshot(of), DEFAULTS, NOW).actions]
    assert made == [
        ("ControllerRevision", f"llm-{new}"),
        ("ServiceAccount", "llm-worker"),
        ("Service", "llm"),
        ("PodDisruptionBudget", "llm"),
        ("NetworkPolicy", "llm"),
        ("Pod", f"llm-{new}-0"),
        ("Pod", f"llm-{new}-1"),
    ]


def test_converged_fleet_has_an_empty_plan_and_no_status_write() -> None:
    found = converged(manual(3), 3)
    for later in (1.0, 60.0, 3600.0):
        again = plan(found, DEFAULTS, NOW + later)
        assert (again.actions, again.status, again.events) == ((), None, ())


def test_deleted_pod_is_replaced_under_another_name_while_it_dies() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    dying = pod(f"llm-{new}-0", new, terminating=True, ready=False)
    found = snapshot(of, (dying,), children=children(of))
    assert kinds(found) == [("Apply", f"llm-{new}-1")]


def test_surplus_drains_first_and_is_deleted_when_no_request_is_left() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    busy, idle = pod(f"llm-{new}-0", new), pod(f"llm-{new}-1", new)
    answers = {busy.uid: stats(running=5), idle.uid: stats(running=1)}
    found = snapshot(of, (busy, idle), answers, children=children(of))
    (drain,) = plan(found, DEFAULTS, NOW).actions
    assert isinstance(drain, Drain)
    assert (drain.name, drain.uid, drain.ip) == (idle.name, idle.uid, idle.ip)
    assert drain.body["metadata"]["uid"] == idle.uid
    assert drain.body["metadata"]["labels"] == {"tilefleet.io/state": "draining"}
    assert "2 replicas, 1 wanted" in drain.why

    leaving = replace(
        idle,
        state="draining",
        drain_started=NOW,
        labels={**idle.labels, "tilefleet.io/state": "draining"},
    )
    found = replace(found, pods=(busy, leaving))
    assert kinds(found, NOW + 5) == [("Drain", idle.name)], "the worker has not heard of it"
    working = replace(found, stats={**answers, idle.uid: stats(running=1, draining=True)})
    assert kinds(working, NOW + 5) == []
    empty = replace(found, stats={**answers, idle.uid: stats(draining=True)})
    assert kinds(empty, NOW + 1) == [], "endpoints may still send requests"
    assert kinds(empty, NOW + 5) == [("Delete", idle.name)]
    silent = replace(found, stats={**answers, idle.uid: MissingStats("timeout")})
    assert kinds(silent, NOW + 299) == []
    assert kinds(silent, NOW + 300) == [("Delete", idle.name)]
    # A clock that was set back by an hour must not make the drain an hour longer.
    assert kinds(working, NOW - 3600) == [("Drain", idle.name)]


def test_surplus_that_is_not_ready_goes_at_once_and_first() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    ready, pending = pod(f"llm-{new}-0", new), pod(f"llm-{new}-1", new, ready=False)
    found = snapshot(of, (ready, pending), children=children(of))
    assert kinds(found) == [("Delete", pending.name)]


def test_finished_pod_is_replaced_but_not_faster_than_the_backoff() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    evicted = pod(f"llm-{new}-0", new, phase="Failed", ready=False, reason="Evicted", created=NOW)
    found = snapshot(of, (evicted,), children=children(of))
    waiting = plan(found, DEFAULTS, NOW + 1)
    assert waiting.actions == ()
    assert waiting.requeue_after == pytest.approx(FAILED_BACKOFF_SECONDS - 1)
    later = plan(found, DEFAULTS, NOW + FAILED_BACKOFF_SECONDS)
    assert [(type(a).__name__, a.name) for a in later.actions] == [
        ("Delete", evicted.name),
        ("Apply", f"llm-{new}-1"),
    ]
    assert "Evicted" in later.actions[0].why


def test_paused_object_changes_nothing_but_its_status() -> None:
    paused = plan(snapshot(manual(3, paused=True)), DEFAULTS, NOW)
    assert paused.actions == ()
    assert paused.status is not None
    by_type = {c["type"]: c for c in paused.status["conditions"]}
    assert by_type["AutoscalingActive"]["reason"] == "Paused"


def test_object_being_deleted_is_left_to_its_owner_references() -> None:
    gone = replace(manual(3), deleting=True)
    empty = plan(snapshot(gone), DEFAULTS, NOW)
    assert (empty.actions, empty.status, empty.requeue_after) == ((), None, None)


def test_foreign_pods_and_services_are_never_touched() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    foreign = pod(f"llm-{new}-0", new, owner_uid="other")
    other = {("Service", "llm"): service(replace(of, uid="other"))}
    found = snapshot(of, (foreign,), children=children(of) | other)
    result = plan(found, DEFAULTS, NOW)
    assert [(type(a).__name__, a.name) for a in result.actions] == [("Apply", f"llm-{new}-1")]
    assert result.status is not None
    degraded = next(c for c in result.status["conditions"] if c["type"] == "Degraded")
    assert degraded["reason"] == "NameConflict"
    assert result.requeue_after == 5.0, "no watch shows the end of a Service without our label"
    assert "give the InferenceDeployment another name" in degraded["message"]


def test_actions_are_ordered_drain_delete_apply() -> None:
    old = manual(2, rollout={"maxSurge": 0, "maxUnavailable": 1})
    pods = (pod("llm-old-0", "old"), pod("llm-old-1", "old", ready=False))
    found = snapshot(old, pods)
    names = [type(a).__name__ for a in plan(found, DEFAULTS, NOW).actions]
    assert names == sorted(names, key=["Drain", "Delete", "Apply"].index)
    assert {"Delete", "Apply"} <= set(names)


def test_rollout_sequence_with_surge_one() -> None:
    """Three replicas: new, then one old drains for each new that is ready; never fewer than 3."""
    of = manual(3)
    pods = tuple(pod(f"llm-old-{slot}", "old") for slot in range(3))
    new = revision(of, DEFAULTS)
    found = snapshot(of, pods, children=children(of))
    steps = simulate(found, DEFAULTS, NOW, start_seconds=5, drain_seconds=3)
    flat = [[(type(a).__name__, a.name) for a in step.actions] for step in steps]
    assert flat == [
        [("Apply", f"llm-{new}-0")],
        [("Drain", "llm-old-0"), ("Apply", f"llm-{new}-1")],
        [("Delete", "llm-old-0")],
        [("Drain", "llm-old-1"), ("Apply", f"llm-{new}-2")],
        [("Delete", "llm-old-1")],
        [("Drain", "llm-old-2")],
        [("Delete", "llm-old-2")],
    ]


def test_rollout_that_never_becomes_ready_keeps_the_old_pods() -> None:
    of = manual(2)
    pods = tuple(pod(f"llm-old-{slot}", "old") for slot in range(2))
    found = snapshot(of, pods, children=children(of))
    last, _ = trace(World(found, NOW), DEFAULTS, start_seconds=10_000, limit=100)[-1]
    assert sorted(p.name for p in last.snapshot.pods if p.ready) == ["llm-old-0", "llm-old-1"]
    assert len(last.snapshot.pods) == 3


def test_invalid_object_gets_all_conditions_once() -> None:
    obj = builders.document() | {"status": {}}
    first = invalid(obj, ["spec.replicas: -1: must be at least 0"], NOW)
    assert first.status is not None
    by_type = {c["type"]: c for c in first.status["conditions"]}
    assert by_type["SpecValid"]["message"] == "spec.replicas: -1: must be at least 0"
    assert by_type["Ready"]["status"] == "False"
    assert len(by_type) == 8
    again = invalid(obj | {"status": first.status}, ["spec.replicas: -1: must be at least 0"], NOW)
    assert again.status is None


rollouts = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda pair: sum(pair) > 0)


@st.composite
def scenes(draw: st.DrawFn) -> Snapshot:
    surge, unavailable = draw(rollouts)
    of = manual(draw(st.integers(0, 5)), rollout={"maxSurge": surge, "maxUnavailable": unavailable})
    pods = draw(builders.pods((revision(of, DEFAULTS), "oldone", "older")))
    answers = {p.uid: stats(running=draw(st.integers(0, 3))) for p in pods if p.ready}
    return snapshot(of, pods, answers)


def active(pods: tuple[PodView, ...]) -> list[PodView]:
    return [
        p
        for p in pods
        if p.state == "active" and not p.terminating and not p.finished and p.owner_uid == "cr-uid"
    ]


@settings(deadline=None)
@given(scenes(), st.randoms(use_true_random=False))
def test_same_plan_for_any_order_of_the_input(found: Snapshot, random: object) -> None:
    shuffled = list(found.pods)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = replace(found, pods=tuple(shuffled), stats=dict(reversed(found.stats.items())))
    assert plan(found, DEFAULTS, NOW) == plan(other, DEFAULTS, NOW)


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_every_fleet_converges_inside_the_bounds_and_then_rests(found: Snapshot) -> None:
    spec = found.deployment.spec
    steps = trace(World(found, NOW), DEFAULTS, start_seconds=2, drain_seconds=2, limit=400)
    last, final = steps[-1]
    assert (final.actions, final.status) == ((), None), "a plan after apply is empty"
    here = active(last.snapshot.pods)
    assert len(here) == spec.replicas
    assert {p.revision for p in here} <= {revision(found.deployment, DEFAULTS)}

    total_limit = max(spec.replicas + spec.rollout.max_surge, len(active(found.pods)))
    floor = spec.replicas - spec.rollout.max_unavailable
    available = sum(p.ready for p in active(found.pods))
    for world, _ in steps:
        now_active = active(world.snapshot.pods)
        assert len(now_active) <= total_limit
        now_available = sum(p.ready for p in now_active)
        assert now_available >= min(floor, available), "removed below the floor"
        available = now_available
        names = [p.name for p in world.snapshot.pods]
        assert len(names) == len(set(names))


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_nothing_foreign_is_ever_named(found: Snapshot) -> None:
    foreign = {p.uid for p in found.pods if p.owner_uid != "cr-uid"}
    names = {p.name for p in found.pods}
    for action in plan(found, DEFAULTS, NOW).actions:
        if isinstance(action, Delete | Drain):
            assert action.uid not in foreign
        elif isinstance(action, Apply) and action.kind == "Pod":
            assert action.name not in names


def test_auto_fleet_starts_at_the_minimum_and_never_touches_spec_replicas() -> None:
    of = deployment(replicas=4, autoscaling={"mode": "Auto", "minReplicas": 2, "maxReplicas": 5})
    result = plan(snapshot(of), DEFAULTS, NOW)
    assert sum(a.kind == "Pod" for a in result.actions) == 2
    assert result.status is not None
    assert result.status["desiredReplicas"] == 2


def test_fixed_fleet_shows_its_load_though_it_is_asked_slowly() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    one = pod(f"llm-{new}-0", new)
    polls = [(10.0 * i, {one.uid: stats(arrivals=20 * i, completions=20 * i,
                                        generated_tokens=200 * i)}) for i in range(8)]  # fmt: skip
    found = snapshot(of, (one,), history=builders.history(*polls))
    last = NOW + 70
    shown = plan(found, DEFAULTS, last + 15).status
    assert shown is not None
    assert shown["demand"]["tokensPerSecond"] > 0
    stale = plan(found, DEFAULTS, last + 25).status
    assert stale is not None
    assert "demand" not in stale
