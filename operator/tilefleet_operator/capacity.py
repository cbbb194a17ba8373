"""Why replicas have no node, and whether one is coming.

Pending on a node that is on its way is told apart from Pending for ever: an autoscaler spoke of the
pod, or a node with AMD devices is young. Without either, and some patience later, it is a shortage
with its arithmetic. Does not know how nodes are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefleet_operator.fleet import Fleet
from tilefleet_operator.hardware import is_candidate
from tilefleet_operator.judgement import other_model
from tilefleet_operator.observed import PodView, Snapshot
from tilefleet_operator.partitions import offers
from tilefleet_operator.placement import Fit
from tilefleet_operator.reactions import Reaction
from tilefleet_operator.reasons import ShortageReason

# Cluster Autoscaler scans every 10 s, Karpenter batches for up to 10 s.
PATIENCE_SECONDS = 30.0
# Cluster Autoscaler's maxNodeProvisionTime; Karpenter gives up on a NodeClaim after the same time.
ARRIVAL_SECONDS = 900.0


@dataclass(frozen=True)
class Shortage:
    """Replicas that have no node. wait_seconds: until this may change by time alone, None never."""

    reason: ShortageReason
    message: str
    wait_seconds: float | None = None


def shortage(
    snapshot: Snapshot, pods: Fleet, wanted: int, fit: Fit | None, adding: int, now: float
) -> Shortage | None:
    """Why fewer than `wanted` replicas find a node; None when all do.

    fit: judgement of the AMD nodes with the fleet's own devices counted as free, None on vendor
    cpu. adding: replicas that are created right now.
    """
    unscheduled = [pod for pod in pods.active if pod.node is None]
    refused = [pod for pod in unscheduled if pod.reason == "Unschedulable"]
    short = fit is not None and len(pods.ready) < wanted and fit.replicas < wanted
    if not short and not refused:
        return None
    text = fit.arithmetic(wanted) if fit is not None and short else _refusal(refused[0])
    words = [snapshot.reactions[p.uid] for p in unscheduled if p.uid in snapshot.reactions]
    coming = _coming(snapshot, words, now)
    if coming is not None:
        who, until = coming
        return Shortage("WaitingForNode", f"{text}; {who}", until - now)
    began = min([pod.created for pod in unscheduled], default=now if adding else None)
    if not words and began is not None and now < began + PATIENCE_SECONDS:
        more = f"a node autoscaler has {PATIENCE_SECONDS:g} s to react"
        return Shortage("WaitingForNode", f"{text}; {more}", began + PATIENCE_SECONDS - now)
    reason: ShortageReason = "InsufficientGPU" if short else "InsufficientResources"
    no = next((word for word in words if not word.coming), None)
    return Shortage(reason, text + (f"; {no}" if no else "; no node autoscaler reacts"))


def _refusal(pod: PodView) -> str:
    return f"pod {pod.name}: {pod.message}"


def _coming(snapshot: Snapshot, words: list[Reaction], now: float) -> tuple[str, float] | None:
    """Who brings a node, and until when that is believed; None when nobody does."""
    promises = [word for word in words if word.coming and now < word.time + ARRIVAL_SECONDS]
    if promises:
        return str(promises[0]), min(word.time for word in promises) + ARRIVAL_SECONDS
    choices = snapshot.deployment.spec.accelerator.choices
    for node in snapshot.nodes:
        until = node.created + ARRIVAL_SECONDS
        # Its kubelet or the device plugin is not there yet.
        young = now < until and is_candidate(node) and not (node.ready and offers(node))
        if young and not all(other_model(node, choice) for choice in choices):
            return f"node {node.name} is new and offers its devices soon", until
    return None
