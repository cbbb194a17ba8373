"""Walks over specs: whatever a fleet was before, the same spec settles into the same state."""

from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.builders import DEFAULTS, NOW, document
from tilefleet_operator.api import parse
from tilefleet_operator.observed import Snapshot
from tilefleet_operator.plan import plan
from tilefleet_operator.simulation import World, trace

Json = dict[str, Any]
TICKS = 400


@st.composite
def specs(draw: st.DrawFn) -> Json:
    """Fields that change pods, fields that change children only, and fields that change sizes."""
    surge, unavailable = draw(st.sampled_from([(1, 0), (0, 1), (2, 1), (3, 0)]))
    return {
        "replicas": draw(st.integers(0, 4)),
        "autoscaling": {"mode": "Manual"},
        "engine": {"maxConcurrent": draw(st.sampled_from([7, 256]))},
        "model": {"uri": "file:///models/tiny", "name": draw(st.sampled_from(["", "other"]))},
        "rollout": {"maxSurge": surge, "maxUnavailable": unavailable},
        "paused": False,
    }


def edited(world: World, spec: Json) -> World:
    """The world after the user has applied the spec: a new generation of the same object."""
    before = world.snapshot.deployment
    fresh = parse(document(**spec))
    fresh = replace(fresh, generation=before.generation + 1, status=before.status)
    return World(replace(world.snapshot, deployment=fresh), world.now + 1)


def settled(world: World, limit: int = TICKS) -> World:
    return trace(world, DEFAULTS, start_seconds=3, drain_seconds=2, limit=limit)[-1][0]


def begun(spec: Json) -> World:
    return World(Snapshot(deployment=parse(document(**spec))), NOW)


def essence(world: World) -> Json:
    """What may not depend on the past: no slot, no time, no generation, no record of a revision."""
    snapshot, status = world.snapshot, world.snapshot.deployment.status
    return {
        "pods": Counter((p.revision, p.ready, p.state, p.finished) for p in snapshot.pods),
        "children": {
            key: body for key, body in snapshot.children.items() if key[0] != "ControllerRevision"
        },
        "conditions": [(c["type"], c["status"], c["reason"]) for c in status["conditions"]],
        "counts": {key: value for key, value in status.items() if key.endswith("Replicas")},
        "revisions": (status["currentRevision"], status["updateRevision"]),
    }


@settings(max_examples=40, deadline=None)
@given(specs(), st.lists(st.tuples(specs(), st.sampled_from([0, 1, 2, 5, 9, TICKS])), max_size=4))
def test_a_walk_back_equals_a_fresh_fleet(first: Json, walk: list[tuple[Json, int]]) -> None:
    """A→B→…→A, each step left to run for some seconds or to its end, equals A from nothing."""
    fresh = settled(begun(first))
    world = fresh
    for spec, ticks in walk:
        world = edited(world, spec)
        world = settled(world, ticks) if ticks else world
    back = settled(edited(world, first))
    assert essence(back) == essence(fresh)


@settings(max_examples=30, deadline=None)
@given(specs(), specs(), st.integers(1, 12))
def test_a_plan_after_apply_is_empty_and_stays_so(first: Json, second: Json, ticks: int) -> None:
    world = settled(edited(settled(begun(first), ticks), second))
    for later in (0.0, 60.0, 3600.0, 86_400.0):
        made = plan(world.snapshot, DEFAULTS, world.now + later)
        assert (made.actions, made.status, made.events) == ((), None, ())


@settings(max_examples=40, deadline=None)
@given(specs(), specs(), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_plan_in_the_middle_of_a_change_does_not_depend_on_any_order(
    first: Json, second: Json, ticks: int, random: Any
) -> None:
    world = settled(edited(settled(begun(first)), second), ticks)
    snapshot = world.snapshot
    pods, children = list(snapshot.pods), list(snapshot.children.items())
    random.shuffle(pods)
    random.shuffle(children)
    other = replace(
        snapshot,
        pods=tuple(pods),
        children=dict(children),
        stats=dict(reversed(snapshot.stats.items())),
    )
    assert plan(other, DEFAULTS, world.now) == plan(snapshot, DEFAULTS, world.now)
