"""Whether one node will do for one choice of devices, and why not.

Does not know what is in use, nor how a pod is told to go there.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefleet_operator.accelerator import AcceleratorSpec, Fallback
from tilefleet_operator.hardware import (
    GPU_RESOURCE,
    NodeView,
    device_ids,
    unhealthy,
    unhealthy_gpus,
    unusable,
)
from tilefleet_operator.partitions import Offer, offers
from tilefleet_operator.products import ids_of


@dataclass(frozen=True)
class Judgement:
    """One node for one choice. offers: those that will do. why: of a refusal, empty without.

    hidden: the refusal is one that the scheduler would not know of. is_partition: nothing but the
    partition mode is wrong.
    """

    node: NodeView
    offers: tuple[Offer, ...]
    why: str
    hidden: bool
    is_partition: bool = False


def judge(
    node: NodeView, choice: Fallback, accelerator: AcceleratorSpec, resource: str
) -> Judgement:
    """Whether a node will do, whatever is in use on it. resource: the only name, empty for any."""
    known = unusable(node, accelerator)
    hidden = unhealthy(node) or other_model(node, choice)
    fitting = tuple(o for o in offers(node) if not _unfit(node, o, choice, resource))
    if hidden or fitting:
        return Judgement(node, fitting, known or hidden, bool(hidden))
    why, is_partition = _no_offer(node, choice, resource)
    return Judgement(node, (), known or why, True, is_partition and not known)


def other_model(node: NodeView, choice: Fallback) -> str:
    """Why the models on a node are not those of a choice; empty when they are."""
    wanted, found = set(wanted_ids(choice)), device_ids(node)
    if not wanted or (found and wanted.issuperset(found)):
        return ""
    if not found:
        return "no device id label"
    if wanted.isdisjoint(found):
        return f"device id {', '.join(found)}, not {', '.join(sorted(wanted))}"
    # A pod asks for a resource name and cannot choose the model on a node that mixes two.
    return f"mixes device ids {', '.join(found)}"


def wanted_ids(choice: Fallback) -> tuple[str, ...]:
    """PCI device ids that may be used, sorted; empty when any may."""
    return tuple(sorted(set(choice.device_ids))) or ids_of(choice.products)


def _unfit(node: NodeView, offer: Offer, choice: Fallback, resource: str) -> bool:
    partition = choice.partition
    parts = offer.compute not in ("", "SPX")
    return (
        bool(resource and offer.resource != resource)
        or partition.compute not in ("Any", offer.compute)
        or partition.memory not in ("Any", offer.memory)
        or (parts and choice.count > 1)
        # The plugin's health is by PCI device: the siblings of a sick partition are still offered.
        or (parts and bool(unhealthy_gpus(node)))
    )


def _no_offer(node: NodeView, choice: Fallback, resource: str) -> tuple[str, bool]:
    """Why none of a node's offers will do, and whether only the partition mode is wrong."""
    found = offers(node)
    if not found:
        return f"offers no {resource or GPU_RESOURCE}", False
    if resource and all(offer.resource != resource for offer in found):
        return f"offers {', '.join(offer.resource for offer in found)}, not {resource}", True
    sick = unhealthy_gpus(node)
    if sick and all(offer.compute not in ("", "SPX") for offer in found):
        return f"partitions of unhealthy GPU {', '.join(sick)} cannot be told from others", False
    modes = ", ".join(offer.partition or "unknown" for offer in found)
    wanted = " ".join(m for m in (choice.partition.compute, choice.partition.memory) if m != "Any")
    return f"partition {modes}, not {wanted or f'{choice.count} whole GPUs'}", True
