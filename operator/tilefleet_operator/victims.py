"""Which pods leave first, and why these. Does not know how many must leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tilefleet_operator.hardware import NodeView, is_sick
from tilefleet_operator.observed import DEVICE_PREFIX, PodView, Snapshot, WorkerStats


def order_victims(pods: Iterable[PodView], snapshot: Snapshot) -> list[tuple[PodView, str]]:
    """Pods in the order in which they should leave, each with the reason of its place.

    On an unhealthy GPU; not ready, those without a node before those that load; empties its node;
    fewest requests; fewest cached blocks; youngest.
    """
    nodes = snapshot.by_name
    ranked = []
    for pod in pods:
        stats = snapshot.stats.get(pod.uid)
        known = isinstance(stats, WorkerStats)
        sick, empties = on_sick_node(pod, nodes), _empties(pod, snapshot.device_use)
        load = stats.inflight if isinstance(stats, WorkerStats) else 0
        cached = stats.gauges.kv_blocks_cached if isinstance(stats, WorkerStats) else 0
        rank = (
            *(not sick, pod.ready, pod.node is not None, not empties),
            *(load, cached, -pod.created, pod.name),
        )
        ranked.append((rank, pod, _place(pod, sick, empties, load if known else None)))
    return [(pod, reason) for _, pod, reason in sorted(ranked, key=lambda item: item[0])]


def on_sick_node(pod: PodView, nodes: Mapping[str, NodeView]) -> bool:
    """True when remediation, or a partitioning under way, marked the pod's node."""
    node = nodes.get(pod.node or "")
    return node is not None and is_sick(node)


def _place(pod: PodView, sick: bool, empties: bool, load: int | None) -> str:
    if sick:
        return f"its node {pod.node} is unhealthy"
    if not pod.ready:
        return "it is not ready"
    if empties:
        return f"it leaves node {pod.node} empty"
    if load is None:
        return "it is the youngest"
    return f"it has {load} requests, no other has fewer"


def _empties(pod: PodView, used: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether nobody else has devices on the pod's node."""
    own = {k: v for k, v in pod.requests.items() if k.startswith(DEVICE_PREFIX)}
    here = used.get(pod.node or "", {})
    return pod.node is not None and bool(own) and all(own.get(k, 0.0) >= here[k] for k in here)
