"""The devices that a node offers, by resource name, and the partition mode behind each.

Resource names tell the mode under the device plugin's strategy mixed. Under single everything is
amd.com/gpu, and the mode is a label that may be stale (gpu-operator#420), or follows from the
number of devices for each GPU. Allocatable wins over labels. Does not know what anybody wants.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefleet_operator.hardware import (
    GPU_RESOURCE,
    RESOURCE_PATTERN,
    NodeView,
    device_count,
    device_ids,
)
from tilefleet_operator.products import common_product, compute_mode, partitions
from tilefleet_operator.units import quantity

# The labeller's spelling, and the one of its documents and older releases.
PARTITION_KEYS = ("amd.com/gpu.compute-memory-partition", "amd.com/compute-memory-partition")
_VRAM_KEY = "amd.com/gpu.vram"
_RESOURCE_ORDER = ("gpu", "spx", "dpx", "tpx", "qpx", "cpx")


@dataclass(frozen=True)
class Offer:
    """One kind of device on a node.

    compute, memory: partition modes in upper case, empty when not known. total: devices that
    Allocatable counts. bytes_per_device: device memory, None when not known.
    """

    resource: str
    total: int
    compute: str = ""
    memory: str = ""
    bytes_per_device: float | None = None

    @property
    def partition(self) -> str:
        """The mode as labels and resource names write it, for example cpx_nps4; may be empty."""
        return "_".join(part.lower() for part in (self.compute, self.memory) if part)


def resource_order(resource: str) -> tuple[int, str]:
    """Sort key of resource names: the plain one, then from whole GPUs to small partitions."""
    kind = resource.removeprefix("amd.com/").partition("_")[0]
    return _RESOURCE_ORDER.index(kind), resource


def offers(node: NodeView) -> tuple[Offer, ...]:
    """What a node offers now; a key of quantity 0 is a remnant (gpu-operator#382) and no offer."""
    names = [k for k, v in node.allocatable.items() if RESOURCE_PATTERN.match(k) and v >= 1]
    return tuple(_offer(node, name) for name in sorted(names, key=resource_order))


def labels_stale(node: NodeView) -> str:
    """How a node's partition label contradicts Allocatable; empty when it does not."""
    label = _partition_label(node)
    if not label:
        return ""
    found = offers(node)
    named = [offer.partition for offer in found if offer.resource != GPU_RESOURCE]
    if named and label not in named:
        return f"label says {label}, Allocatable {', '.join(named)}"
    inferred = _inferred(node)
    if named or not inferred or label.partition("_")[0].upper() == inferred:
        return ""
    return f"label says {label}, the number of devices {inferred.lower()}"


def _offer(node: NodeView, resource: str) -> Offer:
    compute, memory = _modes(node, resource)
    total = int(node.allocatable[resource])
    return Offer(resource, total, compute, memory, _bytes(node, compute))


def _modes(node: NodeView, resource: str) -> tuple[str, str]:
    if resource != GPU_RESOURCE:
        return _split(resource.removeprefix("amd.com/"))
    if any(k != GPU_RESOURCE and RESOURCE_PATTERN.match(k) and v for k, v in node.capacity.items()):
        # Strategy mixed: only GPUs that cannot be partitioned, such as MI210, keep this name.
        return "", ""
    label, inferred = _partition_label(node), _inferred(node)
    if label and (not inferred or label.partition("_")[0].upper() == inferred):
        return _split(label)
    return inferred, ""


def _split(text: str) -> tuple[str, str]:
    compute, _, memory = text.upper().partition("_")
    return compute, memory


def _partition_label(node: NodeView) -> str:
    return next((node.labels[key].lower() for key in PARTITION_KEYS if node.labels.get(key)), "")


def _inferred(node: NodeView) -> str:
    """Compute mode by devices for each GPU. A GPU that is not advertised must not change it."""
    gpus = device_count(node)
    devices = node.capacity.get(GPU_RESOURCE, 0.0)
    if not gpus or devices < 1:
        return ""
    return compute_mode(max(1, round(devices / gpus)), common_product(device_ids(node)))


def _bytes(node: NodeView, compute: str) -> float | None:
    """Memory of a device: the label on a whole GPU, the smaller of label and share on a part."""
    product = common_product(device_ids(node))
    labelled = _vram(node)
    parts = partitions(compute, product)
    share = product.memory_gb * 1e9 / parts if product and parts else None
    if compute in ("", "SPX"):
        return labelled or share
    return min((b for b in (labelled, share) if b), default=None)


def _vram(node: NodeView) -> float | None:
    try:
        return quantity(node.labels[_VRAM_KEY])
    except (KeyError, ValueError):
        return None
