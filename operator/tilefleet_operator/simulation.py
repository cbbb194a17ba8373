"""simulate(): replay plan after plan with no cluster, for proofs and for `tilefleet plan`.

The model of the world is small and honest about it: a pod is placed when a node has room (always,
on vendor cpu or without known nodes), is ready start_seconds later, and drains in drain_seconds.
The same plan() decides as in production.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilefleet_operator import placement
from tilefleet_operator.capacity import PATIENCE_SECONDS
from tilefleet_operator.condition import HOLD_SECONDS
from tilefleet_operator.desired import Defaults
from tilefleet_operator.observed import (
    ANNOTATION_PLACEMENT,
    DRAINING,
    Counters,
    Gauges,
    PodView,
    Snapshot,
    WorkerStats,
    device_use,
    pod_view,
)
from tilefleet_operator.plan import Apply, Delete, Drain, Plan, plan
from tilefleet_operator.units import rfc3339

TICK_SECONDS = 1.0
# Enough for every wait that ends in an action, at the pace of an Auto fleet's measuring.
LOOKS_AHEAD = 16


@dataclass(frozen=True)
class World:
    """A simulated moment: what plan() would be given, and the time, seconds since the epoch."""

    snapshot: Snapshot
    now: float


def simulate(
    snapshot: Snapshot,
    defaults: Defaults,
    now: float = 0.0,
    *,
    start_seconds: float = 5.0,
    drain_seconds: float = 5.0,
    limit: int = 1000,
) -> list[Plan]:
    """The plans that act, in order, until nothing more would change.

    limit: ticks of one second after which it ends in any case.
    """
    steps = trace(
        World(snapshot, now),
        defaults,
        start_seconds=start_seconds,
        drain_seconds=drain_seconds,
        limit=limit,
    )
    return [step for _, step in steps if step.actions]


def trace(
    world: World,
    defaults: Defaults,
    *,
    start_seconds: float = 5.0,
    drain_seconds: float = 5.0,
    limit: int = 1000,
) -> list[tuple[World, Plan]]:
    """Every simulated moment with its plan; the last plan is empty unless the limit was reached."""
    steps: list[tuple[World, Plan]] = []
    for _ in range(limit):
        step = plan(world.snapshot, defaults, world.now)
        steps.append((world, step))
        after = advance(world, step, start_seconds=start_seconds, drain_seconds=drain_seconds)
        pods = world.snapshot.pods
        still = step.actions == () and step.status is None and after.snapshot.pods == pods
        if still and not _moving(pods, world.now):
            later = _when_it_acts(world, step, defaults)
            if later is None:
                break
            after = World(world.snapshot, later)
        world = after
    return steps


def _when_it_acts(world: World, step: Plan, defaults: Defaults) -> float | None:
    """The time at which a resting world's plan acts, or says what it held back; else None."""
    now = world.now
    for _ in range(LOOKS_AHEAD):
        if step.requeue_after is None:
            return None
        now += step.requeue_after
        step = plan(world.snapshot, defaults, now)
        settles = step.status is not None and now - world.now <= HOLD_SECONDS
        if step.actions or settles:
            return now
    return None


def _moving(pods: tuple[PodView, ...], now: float) -> bool:
    """True while time alone will change a pod, or what is said of it."""
    return any(
        pod.state == DRAINING
        or pod.finished
        or (pod.node is not None and not pod.ready)
        or (pod.node is None and now <= pod.created + PATIENCE_SECONDS)
        for pod in pods
    )


def advance(
    world: World, step: Plan, *, start_seconds: float = 5.0, drain_seconds: float = 5.0
) -> World:
    """The world one tick after the plan was carried out."""
    snapshot, now = world.snapshot, world.now + TICK_SECONDS
    pods = {pod.uid: pod for pod in snapshot.pods}
    children = dict(snapshot.children)
    for action in step.actions:
        _act(action, pods, children, world.now)
    placed = _schedule(snapshot, tuple(pods.values()))
    settled = tuple(
        replace(pod, ready=True, phase="Running")
        if pod.node and not pod.finished and now >= pod.created + start_seconds
        else pod
        for pod in placed
    )
    deployment = snapshot.deployment
    if step.status is not None:
        deployment = replace(deployment, status=step.status)
    after = replace(
        snapshot,
        deployment=deployment,
        pods=settled,
        children=children,
        device_use=_use(snapshot, settled),
        stats={pod.uid: _stats(pod, now, drain_seconds) for pod in settled if pod.ready},
    )
    return World(after, now)


def _act(
    action: Apply | Delete | Drain,
    pods: dict[str, PodView],
    children: dict[tuple[str, str], Mapping[str, Any]],
    now: float,
) -> None:
    if isinstance(action, Delete):
        pods.pop(action.uid, None)
        children.pop((action.kind, action.name), None)
    elif isinstance(action, Drain):
        pod = pods[action.uid]
        labels = {**pod.labels, **action.body["metadata"]["labels"]}
        pods[action.uid] = replace(pod, labels=labels, state=DRAINING, drain_started=now)
    elif "uid" in action.body["metadata"]:
        pod = pods[action.body["metadata"]["uid"]]
        notes = {**pod.annotations, **action.body["metadata"]["annotations"]}
        pods[pod.uid] = replace(pod, annotations=notes)
    elif action.kind == "Pod":
        uid = f"uid-{action.name}"
        metadata = {**action.body["metadata"], "uid": uid, "creationTimestamp": rfc3339(now)}
        pods[uid] = pod_view({**action.body, "metadata": metadata})
    else:
        metadata = {**action.body["metadata"], "uid": f"uid-{action.kind}-{action.name}"}
        children[action.kind, action.name] = {**action.body, "metadata": metadata}


def _schedule(snapshot: Snapshot, pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
    """Pods with nodes: on amd the first matching node with room, else any."""
    accelerator = snapshot.deployment.spec.accelerator
    placed: list[PodView] = []
    waiting = list(pods)
    while waiting:
        pod = waiting.pop(0)
        if pod.node is None and not pod.finished:
            use = _use(snapshot, (*placed, *waiting))
            node = _node(snapshot, pod, use, accelerator.vendor == "amd")
            pod = replace(pod, node=node, ip="192.0.2.1" if node else None)
            pod = replace(pod, reason="" if node else "Unschedulable")
        placed.append(pod)
    return tuple(placed)


def _node(
    snapshot: Snapshot, pod: PodView, use: Mapping[str, Mapping[str, float]], amd: bool
) -> str | None:
    if not amd or not snapshot.nodes:
        return "any"
    fit = placement.fit(snapshot.deployment.spec.accelerator, snapshot.nodes, use)
    key = pod.annotations.get(ANNOTATION_PLACEMENT)
    found = next((option for option in fit.options if option.key == key), None)
    nodes = found.matching if found is not None else ()
    return next((n.name for n in nodes if found is not None and n.free >= found.count), None)


def _use(snapshot: Snapshot, pods: tuple[PodView, ...]) -> dict[str, dict[str, float]]:
    """Devices in use: what others held in the snapshot, plus what these pods hold."""
    before, after = device_use(snapshot.pods), device_use(pods)
    nodes = {*snapshot.device_use, *after}
    result: dict[str, dict[str, float]] = {}
    for node in sorted(nodes):
        seen, own, now = (found.get(node, {}) for found in (snapshot.device_use, before, after))
        result[node] = {
            name: max(0.0, seen.get(name, 0.0) - own.get(name, 0.0)) + now.get(name, 0.0)
            for name in sorted({*seen, *now})
        }
    return result


def _stats(pod: PodView, now: float, drain_seconds: float) -> WorkerStats:
    """An idle worker's answer; one that drains has its last request for drain_seconds."""
    draining = pod.state == DRAINING
    started = pod.drain_started if pod.drain_started is not None else math.inf
    running = 1 if draining and now < started + drain_seconds else 0
    return WorkerStats(
        ready=not draining, draining=draining, counters=Counters(), gauges=Gauges(running=running)
    )
