"""One step of a fleet: which pods to add, which to remove, in which order.

    total      = active pods               <= wanted + maxSurge while pods are to be replaced
    available  = ready active pods         never lowered by us below wanted - maxUnavailable

Draining, terminating, finished and lost pods count as neither. A rollout surges first; an old
replica that serves leaves before the new revision has proved itself only where the surge finds no
place, and then one. Every choice is made over sorted pods, so that the order of the input changes
nothing. Does not know how a pod is rendered or drained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from tilefleet_operator.failures import (
    Successor,
    failed_backoff,
    failure,
    move_backoff,
    successor,
)
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.observed import PodView, Snapshot
from tilefleet_operator.victims import on_sick_node, order_victims

# The scheduler needs a moment to see devices that have just become free.
SURGE_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Room:
    """What bounds the moves beside the spec.

    stopped: the new revision failed; what serves must stay. since: when the rollout last came
    forward, seconds since the epoch, None when it begins now. places: replicas that find devices
    on healthy nodes beside all that exist; read only where a GPU is unhealthy.
    """

    stopped: bool = False
    since: float | None = None
    places: int = 0


@dataclass(frozen=True)
class Removal:
    """A pod that leaves. drain: it serves and must finish its requests first."""

    pod: PodView
    drain: bool
    why: str


@dataclass(frozen=True)
class Moves:
    """What to do to the pods.

    additions: of the wanted revision. restorations: of the former one, where a rollout stopped.
    wait_seconds: until time alone allows more, None without.
    """

    removals: tuple[Removal, ...] = ()
    additions: tuple[Successor, ...] = ()
    why_add: str = ""
    wait_seconds: float | None = None
    restorations: tuple[Successor, ...] = ()
    why_restore: str = ""


def moves(
    fleet: Fleet, wanted: int, snapshot: Snapshot, now: float, room: Room | None = None
) -> Moves:
    """One step towards `wanted` pods of the new revision, inside the rollout's bounds."""
    room = room or Room()
    rollout = snapshot.deployment.spec.rollout
    failed, waiting, failed_wait = failed_pods(fleet, now, (fleet.revision,))
    held = waiting.total()
    moved, move_wait = moved_pods(fleet, now)
    staying = tuple(pod for pod in fleet.new if all(pod is not r.pod for r in moved))
    ready = len(fleet.ready)
    surplus = _surplus(staying, wanted, ready - (wanted - rollout.max_unavailable), snapshot)
    missing, surge_wait = _may_miss(fleet, snapshot, now, room)
    spare = ready - sum(removal.drain for removal in surplus) - (wanted - missing)
    outdated = _outdated(fleet, wanted, spare, snapshot, room.places)
    new, old = len(staying) - len(surplus), len(fleet.old) - len(outdated)
    count = _additions(fleet, wanted, new, old, held, rollout.max_surge, room.places)
    heirs = [successor(r.pod, now) for r in (*failed, *moved) if r.pod.revision == fleet.revision]
    heirs += [Successor()] * count
    waits = (failed_wait, move_wait, surge_wait, fleet.wait_seconds)
    return Moves(
        (*surplus, *outdated, *moved, *failed, *given_up(fleet, wanted)),
        tuple(_healthy(heir, snapshot) for heir in heirs[:count]),
        _why_add(fleet, new + held, wanted),
        min((wait for wait in waits if wait is not None), default=None),
    )


def _additions(
    fleet: Fleet, wanted: int, new: int, old: int, held: int, max_surge: int, places: int
) -> int:
    """Pods to add. new, old, held: what is left of each after the removals of this step."""
    surge = max_surge if fleet.old else 0
    count = min(wanted - new, wanted + surge - new - old) - held
    if all(pod.revision == fleet.revision for pod in fleet.old):
        # Only unhealthy GPUs are left behind: a surplus pod that finds no place would help nobody.
        count = min(count, max(0, wanted - new - old - held) + places)
    return max(0, count)


def _why_add(fleet: Fleet, new: int, wanted: int) -> str:
    if not fleet.old:
        return f"{new} of {wanted} replicas exist"
    if all(pod.revision == fleet.revision for pod in fleet.old):
        return f"{new} of {wanted} replicas have healthy GPUs"
    return f"rollout: {new} of {wanted} replicas have the new revision"


def failed_pods(
    fleet: Fleet, now: float, replaced: Collection[str]
) -> tuple[list[Removal], Counter[str], float | None]:
    """Finished pods to delete; how many of each revision still block their place; for how long.

    replaced: revisions whose pods are replaced, so that their back-off counts.
    """
    removals, waits, held = [], [], Counter[str]()
    for pod in fleet.failed:
        wait = failed_backoff(pod, now) if pod.revision in replaced else 0.0
        if wait > 0:
            waits.append(wait)
            held[pod.revision] += 1
        else:
            what = " ".join(part for part in (pod.reason, pod.message) if part)
            why = f"{pod.phase.lower()}{': ' + what if what else ''}; it will not run again"
            removals.append(Removal(pod, drain=False, why=why))
    return removals, held, min(waits, default=None)


def moved_pods(fleet: Fleet, now: float) -> tuple[list[Removal], float | None]:
    """Crashing pods whose node is to blame, because the same revision serves on another."""
    removals, waits = [], []
    for pod in fleet.new:
        wait = move_backoff(pod, now)
        elsewhere = {other.node for other in fleet.new if other.ready} - {pod.node}
        if wait is None or not elsewhere:
            continue
        if wait > 0:
            waits.append(wait)
            continue
        found = failure(pod)
        what = found.message if found else f"pod {pod.name} is not ready"
        why = f"{what}; its revision serves on node {min(map(str, elsewhere))}, so it moves"
        removals.append(Removal(pod, drain=False, why=why))
    return removals, min(waits, default=None)


def given_up(fleet: Fleet, wanted: int) -> list[Removal]:
    """Lost pods that nobody waits for: outdated, or replaced by one that serves."""
    replaced = sum(pod.ready for pod in fleet.new) >= wanted
    why = "it was on node {}, which is gone or not Ready; "
    return [
        Removal(
            pod,
            drain=False,
            why=why.format(pod.node) + ("replicas elsewhere serve" if replaced else "outdated"),
        )
        for pod in fleet.lost
        if replaced or pod.revision != fleet.revision
    ]


def _surplus(
    pods: tuple[PodView, ...], wanted: int, spare: int, snapshot: Snapshot
) -> list[Removal]:
    """Pods above `wanted`; of those that serve at most `spare`."""
    count = len(pods) - wanted
    removals: list[Removal] = []
    for pod, reason in order_victims(pods, snapshot):
        if len(removals) >= count:
            break
        if pod.ready and spare <= 0:
            continue
        spare -= pod.ready
        why = f"{len(pods)} replicas, {wanted} wanted; {reason}"
        removals.append(Removal(pod, pod.ready, why))
    return removals


def _may_miss(fleet: Fleet, snapshot: Snapshot, now: float, room: Room) -> tuple[int, float | None]:
    """Replicas that may be missing for the rollout's sake, and until when that may change."""
    rollout = snapshot.deployment.spec.rollout
    if room.stopped:
        return 0, None
    if any(pod.ready for pod in fleet.new):
        return rollout.max_unavailable, None
    trial = min(1, rollout.max_unavailable)
    if rollout.max_surge == 0 or trial == 0 or not fleet.old:
        return trial, None
    if any(pod.node is not None or pod.reason != "Unschedulable" for pod in fleet.new):
        return 0, None
    # Nothing came to be, for example by a quota; or the scheduler knows no place.
    since = room.since if room.since is not None else now
    since = max((pod.created for pod in fleet.new), default=since)
    wait = since + SURGE_PATIENCE_SECONDS - now
    return (0, wait) if wait > 0 else (trial, None)


def _outdated(
    fleet: Fleet, wanted: int, spare: int, snapshot: Snapshot, places: int
) -> list[Removal]:
    """Pods to be replaced that may leave: all that are not ready, and `spare` that are."""
    removals = []
    # Degraded GPUs still serve: each stays until another place is known or taken.
    places += max(0, len(fleet.active) - wanted)
    for pod, reason in order_victims(fleet.old, snapshot):
        sick = pod.revision == fleet.revision
        why = reason if sick else f"revision {pod.revision} is outdated; {reason}"
        if not pod.ready:
            removals.append(Removal(pod, drain=False, why=why))
        elif spare > 0 and (not sick or places > 0):
            spare -= 1
            places -= sick
            removals.append(Removal(pod, drain=True, why=why))
    return removals


def _healthy(heir: Successor, snapshot: Snapshot) -> Successor:
    """The successor, told to keep away from the nodes that are unhealthy now as well."""
    nodes = snapshot.by_name
    used = sorted({pod.node for pod in snapshot.pods if on_sick_node(pod, nodes) and pod.node})
    avoid = (*heir.avoid, *(name for name in used if name not in heir.avoid))
    return Successor(heir.attempt, avoid)
