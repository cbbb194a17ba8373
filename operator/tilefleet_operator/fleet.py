"""The pods of one InferenceDeployment, sorted by what they are.

Knows no wish but the wanted revision: how many pods there ought to be is decided elsewhere, and
what to do about it in moves.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tilefleet_operator.hardware import NodeView
from tilefleet_operator.observed import (
    ACTIVE,
    LABEL_DEPLOYMENT,
    LABEL_ROLE,
    ROLE_WORKER,
    PodView,
    Snapshot,
)
from tilefleet_operator.victims import on_sick_node

# A node may miss its heartbeats for a moment; Kubernetes itself waits for minutes.
LOST_SECONDS = 30.0


@dataclass(frozen=True)
class Fleet:
    """Own pods by what they are, each tuple sorted by age, then name.

    new: of the wanted revision. old: to be replaced, for their revision or their unhealthy GPU.
    failed: finished pods that are still there. lost: not ready, on a node that is gone or not
    Ready. names: names that are taken, by whatever pod. wait_seconds: until a pod may count as
    lost, None without.
    """

    new: tuple[PodView, ...]
    old: tuple[PodView, ...]
    draining: tuple[PodView, ...]
    failed: tuple[PodView, ...]
    names: frozenset[str]
    lost: tuple[PodView, ...] = ()
    revision: str = ""
    wait_seconds: float | None = None

    @property
    def active(self) -> tuple[PodView, ...]:
        """Pods that serve or will."""
        return (*self.new, *self.old)

    @property
    def ready(self) -> tuple[PodView, ...]:
        """Pods that serve."""
        return tuple(pod for pod in self.active if pod.ready)

    @property
    def updated(self) -> tuple[PodView, ...]:
        """Active pods of the wanted revision, whatever their node."""
        return tuple(pod for pod in self.active if pod.revision == self.revision)


def fleet(snapshot: Snapshot, revision: str, now: float) -> Fleet:
    """Sort the snapshot's pods. Pods without our owner reference are left alone, names apart."""
    deployment = snapshot.deployment
    nodes = snapshot.by_name
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
    waits = {pod.uid: _lost_in(pod, nodes, now) for pod in live if pod.state == ACTIVE}
    lost = {uid for uid, wait in waits.items() if wait is not None and wait <= 0}
    active = [pod for pod in live if pod.state == ACTIVE and pod.uid not in lost]
    old = [
        pod
        for pod in active
        if pod.revision != revision or (pod.ready and on_sick_node(pod, nodes))
    ]
    return Fleet(
        new=tuple(pod for pod in active if pod not in old),
        old=tuple(old),
        draining=tuple(pod for pod in live if pod.state != ACTIVE),
        failed=tuple(pod for pod in own if pod.finished),
        names=frozenset(pod.name for pod in pods),
        lost=tuple(pod for pod in live if pod.uid in lost),
        revision=revision,
        wait_seconds=min((w for w in waits.values() if w is not None and w > 0), default=None),
    )


def _lost_in(pod: PodView, nodes: Mapping[str, NodeView], now: float) -> float | None:
    """Seconds until a pod counts as lost, None while its node is well or unknown."""
    if pod.ready or pod.node is None or not nodes:
        return None
    node = nodes.get(pod.node)
    if node is not None and node.ready:
        return None
    since = pod.unready_since if pod.unready_since is not None else pod.created
    return max(since, node.ready_changed if node is not None else 0.0) + LOST_SECONDS - now
