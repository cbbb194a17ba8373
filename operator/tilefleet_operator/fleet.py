"""The pods of one InferenceDeployment: which to add, which to remove, in which order.

    total      = active pods               <= wanted + maxSurge while an old revision is left
    available  = ready active pods         never lowered by us below wanted - maxUnavailable

Draining, terminating and finished pods count as neither. Every choice is made over sorted pods, so
that the order of the input changes nothing. Does not know how a pod is rendered or drained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tilefleet_operator.hardware import GPU_RESOURCE, NodeView, is_sick
from tilefleet_operator.observed import (
    ACTIVE,
    LABEL_DEPLOYMENT,
    LABEL_ROLE,
    ROLE_WORKER,
    PodView,
    Snapshot,
    WorkerStats,
)

# A pod that the kubelet refuses fails at once; replacing it faster would only fill the API server.
FAILED_BACKOFF_SECONDS = 10.0


@dataclass(frozen=True)
class Fleet:
    """Own pods by what they are, each tuple sorted by age, then name.

    names: names that are taken, by whatever pod. failed: finished pods that are still there.
    """

    new: tuple[PodView, ...]
    old: tuple[PodView, ...]
    draining: tuple[PodView, ...]
    failed: tuple[PodView, ...]
    names: frozenset[str]

    @property
    def active(self) -> tuple[PodView, ...]:
        """Pods that serve or will."""
        return (*self.new, *self.old)

    @property
    def ready(self) -> tuple[PodView, ...]:
        """Pods that serve."""
        return tuple(pod for pod in self.active if pod.ready)


@dataclass(frozen=True)
class Removal:
    """A pod that leaves. drain: it serves and must finish its requests first."""

    pod: PodView
    drain: bool
    why: str


@dataclass(frozen=True)
class Moves:
    """What to do to the pods. wait_seconds: until a failed pod may be replaced, None without."""

    removals: tuple[Removal, ...] = ()
    additions: int = 0
    why_add: str = ""
    wait_seconds: float | None = None


def fleet(snapshot: Snapshot, revision: str) -> Fleet:
    """Sort the snapshot's pods. Pods without our owner reference are left alone, names apart."""
    deployment = snapshot.deployment
    pods = sorted(snapshot.pods, key=lambda p: (p.created, p.name, p.uid))
    own = [
        pod
        for pod in pods
        if pod.namespace == deployment.namespace
        and pod.labels.get(LABEL_DEPLOYMENT) == deployment.name
        and pod.labels.get(LABEL_ROLE) == ROLE_WORKER
        and pod.owner_uid == deployment.uid
        and not pod.terminating
    ]
    live = [pod for pod in own if not pod.finished]
    active = [pod for pod in live if pod.state == ACTIVE]
    return Fleet(
        new=tuple(pod for pod in active if pod.revision == revision),
        old=tuple(pod for pod in active if pod.revision != revision),
        draining=tuple(pod for pod in live if pod.state != ACTIVE),
        failed=tuple(pod for pod in own if pod.finished),
        names=frozenset(pod.name for pod in pods),
    )


def moves(fleet: Fleet, wanted: int, snapshot: Snapshot, now: float) -> Moves:
    """One step towards `wanted` pods of the new revision, inside the rollout's bounds."""
    rollout = snapshot.deployment.spec.rollout
    failed, held, wait = _failed(fleet.failed, now)
    surplus = _surplus(fleet, wanted, snapshot)
    # Ready surplus may be counted: it leaves only where `wanted` ready pods of its revision stay.
    spare = len(fleet.ready) - max(0, wanted - rollout.max_unavailable)
    outdated = _outdated(fleet, spare, snapshot)
    new = len(fleet.new) - len(surplus)
    old = len(fleet.old) - len(outdated)
    surge = rollout.max_surge if fleet.old else 0
    room = wanted + surge - new - old - held
    additions = max(0, min(wanted - new - held, room))
    why = f"{new + held} of {wanted} replicas exist"
    if fleet.old:
        why = f"rollout: {new + held} of {wanted} replicas have the new revision"
    return Moves((*surplus, *outdated, *failed), additions, why, wait)


def _failed(failed: tuple[PodView, ...], now: float) -> tuple[list[Removal], int, float | None]:
    """Finished pods to delete, the number that still block their place, and for how long."""
    removals = []
    waits = []
    for pod in failed:
        wait = pod.created + FAILED_BACKOFF_SECONDS - now
        if wait > 0:
            waits.append(wait)
        else:
            what = " ".join(part for part in (pod.reason, pod.message) if part)
            why = f"{pod.phase.lower()}{': ' + what if what else ''}; it will not run again"
            removals.append(Removal(pod, drain=False, why=why))
    return removals, len(waits), min(waits, default=None)


def _surplus(fleet: Fleet, wanted: int, snapshot: Snapshot) -> list[Removal]:
    count = len(fleet.new) - wanted
    why = f"{len(fleet.new)} replicas, {wanted} wanted"
    victims = order_victims(fleet.new, snapshot)[: max(0, count)]
    return [Removal(pod, pod.ready, f"{why}; {reason}") for pod, reason in victims]


def _outdated(fleet: Fleet, spare: int, snapshot: Snapshot) -> list[Removal]:
    """Pods of old revisions that may leave: all that are not ready, and `spare` that are."""
    removals = []
    for pod, reason in order_victims(fleet.old, snapshot):
        why = f"revision {pod.revision} is outdated; {reason}"
        if not pod.ready:
            removals.append(Removal(pod, drain=False, why=why))
        elif spare > 0:
            spare -= 1
            removals.append(Removal(pod, drain=True, why=why))
    return removals


def order_victims(pods: Iterable[PodView], snapshot: Snapshot) -> list[tuple[PodView, str]]:
    """Pods in the order in which they should leave, each with the reason of its place.

    On an unhealthy GPU; not ready; empties its node; fewest requests; fewest cached blocks;
    youngest.
    """
    nodes = {node.name: node for node in snapshot.nodes}
    ranked = []
    for pod in pods:
        stats = snapshot.stats.get(pod.uid)
        sick, empties = _sick(pod, nodes), _empties(pod, snapshot.device_use)
        load = stats.inflight if isinstance(stats, WorkerStats) else 0
        cached = stats.gauges.kv_blocks_cached if isinstance(stats, WorkerStats) else 0
        rank = (not sick, pod.ready, not empties, load, cached, -pod.created, pod.name)
        ranked.append((rank, pod, _place(pod, sick, empties, load)))
    return [(pod, reason) for _, pod, reason in sorted(ranked, key=lambda item: item[0])]


def _place(pod: PodView, sick: bool, empties: bool, load: int) -> str:
    if sick:
        return f"its node {pod.node} is unhealthy"
    if not pod.ready:
        return "it is not ready"
    if empties:
        return f"it leaves node {pod.node} empty"
    return f"it has {load} requests, no other has fewer"


def _sick(pod: PodView, nodes: Mapping[str, NodeView]) -> bool:
    node = nodes.get(pod.node or "")
    return node is not None and is_sick(node)


def _empties(pod: PodView, used: Mapping[str, Mapping[str, float]]) -> bool:
    own = pod.requests.get(GPU_RESOURCE, 0.0)
    return bool(own) and pod.node is not None and own >= used.get(pod.node, {}).get(GPU_RESOURCE, 0)
