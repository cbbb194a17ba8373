"""The ways to place a replica, and what a pod demands so that the scheduler takes no other.

An option is a choice of the spec (the accelerator itself, then its fallbacks) under one resource
name that the nodes offer. Its terms let the scheduler choose exactly the nodes that were judged to
match, and new nodes by their labels. Does not know which option is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilefleet_operator.accelerator import Fallback
from tilefleet_operator.affinity import HOSTNAME_KEY, Term, label_terms, matches, named, narrowed
from tilefleet_operator.hardware import GPU_RESOURCE, NodeView
from tilefleet_operator.judgement import Judgement, wanted_ids
from tilefleet_operator.partitions import Offer, offers, resource_order


@dataclass(frozen=True)
class NodeFit:
    """A node that can carry replicas. free: devices not used by others; total: allocatable."""

    name: str
    free: int
    total: int
    host: str = ""
    partition: str = ""
    bytes_per_device: float | None = None


@dataclass(frozen=True)
class Option:
    """One way to place a replica. number: 0 for the accelerator itself, n for its n-th fallback.

    title: devices in words. terms: required node affinity.
    """

    number: int
    title: str
    resource: str
    count: int
    matching: tuple[NodeFit, ...]
    terms: tuple[Term, ...]

    @property
    def key(self) -> str:
        """Eight hex digits over what a pod of this option demands of its node."""
        text = json.dumps([self.resource, self.count, self.terms], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def free_devices(self) -> int:
        """Free devices over all matching nodes."""
        return sum(node.free for node in self.matching)

    def arithmetic(self, replicas: int) -> str:
        """Why `replicas` fit or do not fit, with the numbers."""
        wanted = replicas * self.count
        nodes = ", ".join(f"{n.name} ({n.free} free of {n.total})" for n in self.matching[:8])
        more = f" and {len(self.matching) - 8} more" if len(self.matching) > 8 else ""
        have = f"matching nodes {nodes}{more} = {self.free_devices}" if nodes else "no node matches"
        text = f"{replicas} replicas × {self.count} {self.resource} = {wanted} wanted; {have}"
        whole = sum(node.free // self.count for node in self.matching)
        if wanted > self.free_devices:
            text += f"; short of {wanted - self.free_devices}"
        elif whole < replicas:
            text += f"; only {whole} replicas find {self.count} on one node"
        return text


@dataclass(frozen=True)
class Placement:
    """What one pod demands. host: hostname label of the node that it prefers, empty for none."""

    option: Option
    host: str = ""


def node_affinity(placement: Placement | None, avoid: Sequence[str]) -> dict[str, Any]:
    """Required: nodes that were judged to match. Preferred: the one that packs best, and none of
    those to avoid. placement: None where any node will do. Empty when nothing is asked for.
    """  # fmt: skip
    affinity: dict[str, Any] = {}
    preferred = []
    if avoid:
        # The API server allows one value for each requirement on a field.
        names = [{"key": "metadata.name", "operator": "NotIn", "values": [n]} for n in avoid]
        preferred.append({"weight": 100, "preference": {"matchFields": names}})
    if placement is not None:
        terms = [dict(term) for term in placement.option.terms]
        if terms:
            required = {"nodeSelectorTerms": terms}
            affinity["requiredDuringSchedulingIgnoredDuringExecution"] = required
        if placement.host:
            host = {"key": HOSTNAME_KEY, "operator": "In", "values": [placement.host]}
            preferred.append({"weight": 100, "preference": {"matchExpressions": [host]}})
    if preferred:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return affinity


def options(
    number: int, choice: Fallback, judged: Sequence[Judgement], resource: str
) -> list[Option]:
    """The choice under each resource name that accepted nodes offer, or under the likeliest."""
    offered = {o.resource for j in judged if not j.why for o in j.offers}
    names = sorted(offered, key=resource_order) or [resource or _likely(choice, judged)]
    return [_option(number, choice, name, judged) for name in names]


def _likely(choice: Fallback, judged: Sequence[Judgement]) -> str:
    """The resource name of nodes that are not there yet: by the strategy of those that are."""
    modes = (choice.partition.compute, choice.partition.memory)
    mixed = any(o.resource != GPU_RESOURCE for j in judged for o in offers(j.node))
    return f"amd.com/{'_'.join(modes).lower()}" if mixed and "Any" not in modes else GPU_RESOURCE


def _option(number: int, choice: Fallback, resource: str, judged: Sequence[Judgement]) -> Option:
    labels = label_terms(wanted_ids(choice), _partition_pattern(choice, resource))
    base = narrowed(labels, ())
    found = [(j.node, o) for j in judged if not j.why for o in j.offers if o.resource == resource]
    unmatched = [node for node, _ in found if not matches(base, node)]
    excluded = [
        j.node
        for j in judged
        if j.hidden and j.node.allocatable.get(resource, 0) >= 1 and matches(base, j.node)
    ]
    byname = [node for node in unmatched if node.labels.get(HOSTNAME_KEY)]
    lost = [node for node in unmatched if node not in byname]
    return Option(
        number=number,
        title=_title(choice, resource),
        resource=resource,
        count=choice.count,
        matching=tuple(_node_fit(node, offer) for node, offer in found if node not in lost),
        terms=(*narrowed(labels, excluded), *named(byname)),
    )


def _partition_pattern(choice: Fallback, resource: str) -> str:
    """What labels must say of the partition; nothing where the resource name says it."""
    if resource != GPU_RESOURCE:
        return ""
    compute, memory = choice.partition.compute.lower(), choice.partition.memory.lower()
    if compute == memory == "any":
        return "whole" if choice.count > 1 else ""
    return f"{'' if compute == 'any' else compute}_{'' if memory == 'any' else memory}"


def _title(choice: Fallback, resource: str) -> str:
    models = "/".join(choice.device_ids or choice.products) or "any AMD GPU"
    modes = [m for m in (choice.partition.compute, choice.partition.memory) if m != "Any"]
    return " ".join([models, *modes, "×", str(choice.count), resource])


def _node_fit(node: NodeView, offer: Offer) -> NodeFit:
    host = node.labels.get(HOSTNAME_KEY, "")
    return NodeFit(
        node.name, offer.total, offer.total, host, offer.partition, offer.bytes_per_device
    )
