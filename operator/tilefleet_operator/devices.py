"""The devices of one fleet: judged, given to new replicas, and reported.

Joins the fleet's pods with placement.py, which knows no pods. Does not know why a replica is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilefleet_operator import placement
from tilefleet_operator.actions import Delete
from tilefleet_operator.capacity import ARRIVAL_SECONDS
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.moves import Moves
from tilefleet_operator.observed import (
    ANNOTATION_ACCELERATOR,
    ANNOTATION_PLACEMENT,
    DEVICE_PREFIX,
    PodView,
    Snapshot,
)
from tilefleet_operator.options import Placement
from tilefleet_operator.placement import Fit, Waiting
from tilefleet_operator.reactions import Reaction

# How long a replica waits for a node of one choice, where no autoscaler promises any.
FALLBACK_SECONDS = 60.0


def judged(snapshot: Snapshot, pods: Fleet) -> Fit | None:
    """Judgement of the nodes, with the devices of this fleet's own active pods counted as free."""
    accelerator = snapshot.deployment.spec.accelerator
    if accelerator.vendor != "amd":
        return None
    use, mine = snapshot.device_use, dict[str, dict[str, float]]()
    for pod in pods.active:
        if pod.node is None or pod.node not in use:
            continue
        used = mine.setdefault(pod.node, dict(use[pod.node]))
        for name, own in pod.requests.items():
            if name.startswith(DEVICE_PREFIX):
                used[name] = max(0.0, used.get(name, 0.0) - own)
    return placement.fit(accelerator, snapshot.nodes, {**use, **mine})


def places(snapshot: Snapshot, pods: Fleet) -> int:
    """Replicas that find devices beside all that exist; looked at for unhealthy GPUs only."""
    accelerator = snapshot.deployment.spec.accelerator
    if accelerator.vendor != "amd" or all(pod.revision != pods.revision for pod in pods.old):
        return 0
    free = placement.fit(accelerator, snapshot.nodes, snapshot.device_use).replicas
    return max(0, free - sum(pod.node is None for pod in pods.active))


@dataclass(frozen=True)
class Assignment:
    """Deletes of waiting pods that are made anew, and a place for each new replica: first those
    of the moves, then one for each delete. None: any node.
    """  # fmt: skip

    deletes: tuple[Delete, ...]
    places: tuple[Placement | None, ...]


def assigned(
    snapshot: Snapshot, pods: Fleet, fit: Fit | None, step: Moves, now: float
) -> Assignment:
    """Devices for the new replicas of a step, and for those that wait in vain.

    step: the moves of this plan; what it removes is left alone here.
    """
    if fit is None:
        return Assignment((), (None,) * len(step.additions))
    leaving = {removal.pod.uid for removal in step.removals}
    waiting = {pod.uid: pod for pod in pods.new if pod.uid not in leaving and _waits(pod)}
    demands = [
        Waiting(
            pod.uid,
            pod.annotations.get(ANNOTATION_PLACEMENT, ""),
            pod.annotations.get(ANNOTATION_ACCELERATOR, "what it asks for"),
            given_up(pod, snapshot.reactions.get(pod.uid), now) <= 0,
        )
        for pod in waiting.values()
    ]
    if not waiting and not step.additions:
        return Assignment((), ())
    packing = snapshot.deployment.spec.accelerator.packing
    free = fit.within(snapshot.device_use)
    moves, places = placement.assign(free, demands, len(step.additions), packing)
    deletes = (Delete(waiting[m.uid].name, waiting[m.uid].namespace, m.uid, m.why) for m in moves)
    return Assignment(tuple(deletes), (*places, *(move.placement for move in moves)))


def next_choice_wait(snapshot: Snapshot, pods: Fleet, now: float) -> float | None:
    """Seconds until a waiting pod may be made anew for a fallback; None without any."""
    if not snapshot.deployment.spec.accelerator.fallbacks:
        return None
    waits = (given_up(pod, snapshot.reactions.get(pod.uid), now) for pod in pods.new if _waits(pod))
    return min((wait for wait in waits if wait > 0), default=None)


def given_up(pod: PodView, reaction: Reaction | None, now: float) -> float:
    """Seconds until a waiting pod may try its next choice; 0 or less when it may now."""
    since = pod.created + FALLBACK_SECONDS
    if reaction is not None and reaction.coming:
        since = max(since, reaction.time + ARRIVAL_SECONDS)
    return since - now


def _waits(pod: PodView) -> bool:
    return pod.node is None and pod.reason == "Unschedulable"


def report(fit: Fit | None, pods: Fleet) -> dict[str, Any]:
    """What matches, and which devices the active replicas were made for."""
    if fit is None:
        return {}
    titles = [pod.annotations.get(ANNOTATION_ACCELERATOR, "") for pod in pods.active]
    taken = next((option for option in fit.options if option.title in titles), fit.options[0])
    found: dict[str, Any] = {
        "resourceName": taken.resource,
        "devicesPerReplica": taken.count,
        "matchingNodes": len(fit.matching),
    }
    partitions = sorted({node.partition for node in taken.matching if node.partition})
    memory = [node.bytes_per_device for node in taken.matching if node.bytes_per_device]
    if partitions:
        found["partition"] = ", ".join(partitions)
    if memory:
        found["memoryPerDevice"] = f"{min(memory) / 1e9:g}G"
    placed = {title: titles.count(title) for title in sorted(set(titles)) if title}
    return found | ({"placed": placed} if placed else {})
