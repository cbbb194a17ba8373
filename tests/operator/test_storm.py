"""Whatever happens: the bounds hold at every step, a pause is a pause, and all ends well."""

from dataclasses import replace
from math import inf
from typing import Any

from hypothesis import example, given, settings

from tests.operator.builders import DEFAULTS
from tests.operator.storm import BROKEN, SPEC_A, SPEC_B, Event, Storm, Weather, storms
from tilefleet_operator.desired import revision
from tilefleet_operator.fleet import LOST_SECONDS
from tilefleet_operator.observed import PodView
from tilefleet_operator.plan import Apply, Delete, Plan, plan
from tilefleet_operator.simulation import World
from tilefleet_operator.status import plans_alike


def counted(world: World) -> list[PodView]:
    """Pods that count as replicas: active, and not lost with their node."""
    nodes = {node.name: node for node in world.snapshot.nodes}

    def lost(pod: PodView) -> bool:
        node = nodes.get(pod.node or "")
        if pod.ready or node is None or node.ready:
            return False
        assert pod.unready_since is not None
        return world.now >= max(pod.unready_since, node.ready_changed) + LOST_SECONDS

    return [
        pod
        for pod in world.snapshot.pods
        if pod.state == "active" and not pod.finished and not lost(pod)
    ]


def check_echo(world: World, step: Plan) -> None:
    """A plan that is not made, because the watch only echoes its own status, would be empty."""
    before = world.snapshot.deployment
    if step.actions or step.status is None or not plans_alike(before.status, step.status):
        return
    seen = replace(world.snapshot, deployment=replace(before, status=step.status))
    again = plan(seen, DEFAULTS, world.now)
    assert (again.actions, again.status) == ((), None)
    waits = [inf if one.requeue_after is None else one.requeue_after for one in (again, step)]
    assert waits[0] >= waits[1]


def check(world: World, step: Plan) -> None:
    """What may never be exceeded by one plan, whatever came before it."""
    deployment = world.snapshot.deployment
    check_echo(world, step)
    spec, rollout = deployment.spec, deployment.spec.rollout
    if spec.paused:
        assert step.actions == ()
        return
    pods = counted(world)
    gone = {a.uid for a in step.actions if not isinstance(a, Apply) and a.kind == "Pod"}
    added = [a.name for a in step.actions if isinstance(a, Apply) and a.kind == "Pod"]
    assert not {pod.name for pod in world.snapshot.pods} & set(added), "a name is used twice"
    ready = [pod for pod in pods if pod.ready]
    kept = [pod for pod in ready if pod.uid not in gone]
    status: Any = step.status if step.status is not None else deployment.status
    if len(kept) < len(ready):
        assert len(kept) >= spec.replicas - rollout.max_unavailable
        proven = any(pod.revision == status["updateRevision"] for pod in ready)
        assert proven or len(kept) >= spec.replicas - min(1, rollout.max_unavailable)
        reasons = {c["type"]: c["reason"] for c in status["conditions"]}
        if reasons["Progressing"] == "ProgressDeadlineExceeded":
            assert len(kept) >= spec.replicas, "a stopped rollout took what serves"
    if added:
        total = sum(pod.uid not in gone for pod in pods) + len(added)
        assert total <= spec.replicas + rollout.max_surge


@settings(max_examples=25, deadline=None)
@given(storms)
@example((False, [(5, "tokens", BROKEN), (60, "tokens", SPEC_A)], 3, 2))
@example((True, [(5, "down", 0), (5, "tokens", SPEC_B), (70, "well", 0)], 3, 2))
@example((True, [(9, "sick", 0), (12, "sick", 1), (15, "bounds", (0, 1))], 3, 2))
def test_bounds_hold_in_every_weather_and_it_clears_up(
    storm: tuple[bool, list[Event], int, int],
) -> None:
    weather = Storm(*storm)
    for world, step in weather.run():
        check(world, step)
    # Where no place is free, a rollout needs leave to take one.
    weather.weather.unavailable = max(1, weather.weather.unavailable)
    steps = weather.calm(SPEC_A, 3)
    for world, step in steps:
        check(world, step)
    last, final = steps[-1]
    assert (final.actions, final.status) == ((), None), "it never came to rest"
    here = [pod for pod in last.snapshot.pods if not pod.finished]
    fresh = revision(Weather(storm[0], replicas=3).deployment({}), DEFAULTS)
    assert [(pod.ready, pod.revision, pod.state) for pod in here] == [(True, fresh, "active")] * 3
    status = last.snapshot.deployment.status
    assert (status["currentRevision"], status["readyReplicas"]) == (fresh, 3)
    conditions = {c["type"]: c["status"] for c in status["conditions"]}
    assert (conditions["Ready"], conditions["Progressing"]) == ("True", "False")
    assert conditions["Degraded"] == "False"


def test_the_storm_can_break_a_bound() -> None:
    """The check fails for a plan that takes too much: it is not vacuous."""
    weather = Storm(False, [], 2, 2)
    world, _ = list(weather.run(10))[-1]
    assert len([pod for pod in counted(world) if pod.ready]) == 2
    greedy = tuple(Delete(p.name, p.namespace, p.uid, "why") for p in world.snapshot.pods)
    try:
        check(world, replace(Plan(), actions=greedy))
    except AssertionError:
        return
    raise AssertionError("all replicas were taken and nobody complained")
