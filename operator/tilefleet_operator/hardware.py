"""Which nodes can carry a replica, and why the others cannot.

Reads what AMD's node labeller, device plugin, config manager and remediation write on a Node. The
wanted model is matched by PCI device id, never by product-name, which is missing on virtual
functions (gpu-operator#183). Does not know pods, only how many devices of a node are in use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import AcceleratorSpec

GPU_RESOURCE = "amd.com/gpu"
GPU_TAINT = "amd.com/gpu"
# The device plugin's names in its strategies single and mixed (k8s-device-plugin configuration.md).
RESOURCE_PATTERN = re.compile(r"^amd\.com/(gpu|(spx|dpx|tpx|qpx|cpx)_nps[1248])$")
DEVICE_ID_KEY = "amd.com/gpu.device-id"
BETA_DEVICE_ID_KEY = "beta.amd.com/gpu.device-id"
_DCM_STATE = "dcm.amd.com/gpu-config-profile-state"
_GPU_MODE = "amd.com/gpu.mode"
_CANDIDATE_LABELS = ("feature.node.kubernetes.io/amd-gpu", "feature.node.kubernetes.io/amd-vgpu")
_BLOCKING_EFFECTS = ("NoSchedule", "NoExecute")

# Physical and virtual functions (gpu-operator gpu-nfd-default-rule.yaml, labeller amdgpu.ids).
PRODUCT_DEVICE_IDS: Mapping[str, tuple[str, ...]] = {
    "MI210": ("740f", "7410"),
    "MI250X": ("7408", "740c"),
    "MI300A": ("74a0",),
    "MI300X": ("74a1", "74a9", "74b5", "74bd"),
    "MI308X": ("74a2", "74a8", "74b6", "74bc"),
    "MI325X": ("74a5", "74b9"),
    "MI350X": ("75a0", "75b0"),
    "MI355X": ("75a3", "75b3"),
}
_KNOWN_IDS = tuple(sorted(i for ids in PRODUCT_DEVICE_IDS.values() for i in ids))


@dataclass(frozen=True)
class Taint:
    """A node taint."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"


@dataclass(frozen=True)
class NodeView:
    """What a decision needs to know of one Node.

    allocatable, capacity: resource name → quantity in base units (cores, bytes, devices).
    conditions: condition type → status ("True", "False", "Unknown"). ready_changed: when `ready`
    last changed. Times are seconds since the epoch.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ready: bool = True
    schedulable: bool = True
    taints: tuple[Taint, ...] = ()
    allocatable: Mapping[str, float] = field(default_factory=dict)
    capacity: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0
    ready_changed: float = 0.0


@dataclass(frozen=True)
class NodeFit:
    """A node that can carry replicas. free: devices not used by others; total: allocatable."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Fit:
    """Every AMD node, sorted by name: usable, or refused with the reason."""

    devices: int
    matching: tuple[NodeFit, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def free_devices(self) -> int:
        """Free devices over all matching nodes."""
        return sum(node.free for node in self.matching)

    @property
    def replicas(self) -> int:
        """Replicas that fit, each whole on one node."""
        return sum(node.free // self.devices for node in self.matching) if self.devices else 0

    def arithmetic(self, replicas: int) -> str:
        """Why `replicas` fit or do not fit, as one sentence with the numbers."""
        wanted = replicas * self.devices
        nodes = ", ".join(f"{n.name} ({n.free} free of {n.total})" for n in self.matching[:8])
        more = f" and {len(self.matching) - 8} more" if len(self.matching) > 8 else ""
        have = f"matching nodes {nodes}{more} = {self.free_devices}" if nodes else "no node matches"
        text = f"{replicas} replicas × {self.devices} {GPU_RESOURCE} = {wanted} wanted; {have}"
        if wanted > self.free_devices:
            text += f"; short of {wanted - self.free_devices}"
        elif self.replicas < replicas:
            text += f"; only {self.replicas} replicas find {self.devices} on one node"
        return text + self.refusals()

    def refusals(self) -> str:
        """The refused nodes with their reasons, as the end of a sentence; empty without any."""
        named = ", ".join(f"{name} ({why})" for name, why in self.refused[:5])
        more = f" and {len(self.refused) - 5} more" if len(self.refused) > 5 else ""
        return f"; refused: {named}{more}" if named else ""


def wanted_ids(accelerator: AcceleratorSpec) -> tuple[str, ...]:
    """PCI device ids that may be used, sorted; empty when any may."""
    if accelerator.device_ids:
        return tuple(sorted(set(accelerator.device_ids)))
    return tuple(sorted(i for p in set(accelerator.products) for i in PRODUCT_DEVICE_IDS[p]))


def device_ids(node: NodeView) -> tuple[str, ...]:
    """PCI device ids of a node, sorted: value form, then count form, then the beta count form.

    A count of 0 is a remnant that the labeller did not remove and is ignored.
    """
    value = node.labels.get(DEVICE_ID_KEY)
    if value:
        return (_bare(value),)
    for key in (DEVICE_ID_KEY, BETA_DEVICE_ID_KEY):
        counted = {
            _bare(label.removeprefix(f"{key}."))
            for label, count in node.labels.items()
            if label.startswith(f"{key}.") and count != "0"
        }
        if counted:
            return tuple(sorted(counted))
    beta = node.labels.get(BETA_DEVICE_ID_KEY)
    return (_bare(beta),) if beta else ()


def _bare(device_id: str) -> str:
    return device_id.lower().removeprefix("0x")


def is_candidate(node: NodeView) -> bool:
    """True when a node carries AMD devices by label or by an Allocatable key."""
    return any(node.labels.get(key) == "true" for key in _CANDIDATE_LABELS) or any(
        RESOURCE_PATTERN.match(key) for key in node.allocatable
    )


def why_not(node: NodeView, accelerator: AcceleratorSpec) -> str:
    """Why a node cannot carry a replica; empty when it can, whatever is in use on it."""
    for reason in (_unusable(node, accelerator), _unhealthy(node), _other_model(node, accelerator)):
        if reason:
            return reason
    if node.allocatable.get(GPU_RESOURCE, 0) >= 1:
        return ""
    others = sorted(k for k, v in node.allocatable.items() if RESOURCE_PATTERN.match(k) and v >= 1)
    offered = f"offers {', '.join(others)}, not" if others else "offers no"
    return f"{offered} {GPU_RESOURCE}"


def _unusable(node: NodeView, accelerator: AcceleratorSpec) -> str:
    if not node.ready:
        return "not Ready"
    if not node.schedulable:
        return "cordoned"
    for taint in node.taints:
        if taint.effect in _BLOCKING_EFFECTS and not _tolerated(taint, accelerator):
            return f"taint {taint.key}" + (f"={taint.value}" if taint.value else "")
    for key, value in sorted(accelerator.node_selector.items()):
        if node.labels.get(key) != value:
            return f"label {key} is {node.labels.get(key, 'absent')}, not {value}"
    return ""


def _tolerated(taint: Taint, accelerator: AcceleratorSpec) -> bool:
    if taint.key == GPU_TAINT:
        return True
    return any(
        t.key in ("", taint.key)
        and t.effect in ("", taint.effect)
        and (t.operator == "Exists" or t.value == taint.value)
        for t in accelerator.tolerations
    )


def _unhealthy(node: NodeView) -> str:
    # Remediation sets one condition for each kind of error; the names are configurable, the prefix
    # is not (gpu-operator auto-remediation.md).
    for name, status in sorted(node.conditions.items()):
        if name.startswith("AMDGPU") and status == "True":
            return f"condition {name}"
    state = node.labels.get(_DCM_STATE, "success")
    if state != "success":
        return f"partitioning {state}"
    mode = node.labels.get(_GPU_MODE, "container")
    return "" if mode == "container" else f"mode {mode}"


def _other_model(node: NodeView, accelerator: AcceleratorSpec) -> str:
    wanted, found = set(wanted_ids(accelerator)), device_ids(node)
    if not wanted or (found and wanted.issuperset(found)):
        return ""
    if not found:
        return "no device id label"
    if wanted.isdisjoint(found):
        return f"device id {', '.join(found)}, not {', '.join(sorted(wanted))}"
    # A pod asks for amd.com/gpu and cannot choose the model on a node that mixes two.
    return f"mixes device ids {', '.join(found)}"


def is_sick(node: NodeView) -> bool:
    """True when remediation marked the node: its replicas leave first."""
    return bool(_unhealthy(node)) or any(t.key == "amd-gpu-unhealthy" for t in node.taints)


def fit(
    accelerator: AcceleratorSpec,
    nodes: Iterable[NodeView],
    used: Mapping[str, Mapping[str, float]],
) -> Fit:
    """Judge every AMD node. used: node name → resource → devices that others hold."""
    matching, refused = [], []
    for node in sorted(nodes, key=lambda n: n.name):
        if not is_candidate(node):
            continue
        reason = why_not(node, accelerator)
        if reason:
            refused.append((node.name, reason))
            continue
        total = math.floor(node.allocatable[GPU_RESOURCE])
        taken = math.ceil(used.get(node.name, {}).get(GPU_RESOURCE, 0.0))
        matching.append(NodeFit(node.name, max(0, total - taken), total))
    return Fit(accelerator.devices, tuple(matching), tuple(refused))


def node_selector_terms(accelerator: AcceleratorSpec) -> list[dict[str, Any]]:
    """ORed nodeSelectorTerms that find the wanted models; empty when any may be used.

    Value form: In. Count forms, new and beta: the id Exists and no other known id does, because a
    pod cannot choose the model on a node that mixes two.
    """
    wanted = wanted_ids(accelerator)
    if not wanted:
        return []
    terms = [_term({"key": DEVICE_ID_KEY, "operator": "In", "values": list(wanted)})]
    others = [i for i in _KNOWN_IDS if i not in wanted]
    for key in (DEVICE_ID_KEY, BETA_DEVICE_ID_KEY):
        absent = [{"key": f"{key}.{i}", "operator": "DoesNotExist"} for i in others]
        terms += [_term({"key": f"{key}.{i}", "operator": "Exists"}, *absent) for i in wanted]
    return terms


def _term(*expressions: dict[str, Any]) -> dict[str, Any]:
    return {"matchExpressions": [dict(expression) for expression in expressions]}
