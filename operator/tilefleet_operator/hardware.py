"""What AMD's node labeller, device plugin, config manager and remediation write on a Node.

Says which devices a node has and whether it is well. Does not know what anybody wants, apart from
the taints that a replica tolerates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tilefleet_operator.accelerator import AcceleratorSpec

GPU_RESOURCE = "amd.com/gpu"
GPU_TAINT = "amd.com/gpu"
# The device plugin's names in its strategies single and mixed (k8s-device-plugin configuration.md).
RESOURCE_PATTERN = re.compile(r"^amd\.com/(gpu|(spx|dpx|tpx|qpx|cpx)_nps[1248])$")
DEVICE_ID_KEY = "amd.com/gpu.device-id"
BETA_DEVICE_ID_KEY = "beta.amd.com/gpu.device-id"
_HEALTH_LABEL = re.compile(r"^metricsexporter\.amd\.com\.gpu\.([^.]+)\.state$")
_DCM_STATE = "dcm.amd.com/gpu-config-profile-state"
_GPU_MODE = "amd.com/gpu.mode"
_CANDIDATE_LABELS = ("feature.node.kubernetes.io/amd-gpu", "feature.node.kubernetes.io/amd-vgpu")
Answer = TypeVar("Answer")
# Set by remediation, and by the admin before a repartitioning (gpu-operator).
_REPAIR_TAINTS = ("amd-dcm", "amd-gpu-unhealthy")
_BLOCKING_EFFECTS = ("NoSchedule", "NoExecute")


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


class Nodes(tuple[NodeView, ...]):
    """Nodes at one moment, with a notebook for what costs much to find out about all of them.

    A thousand fleets ask the same of the same nodes; the answers go when a node changes, and with
    it this tuple.
    """

    _known: dict[Hashable, Any]

    def recall(self, question: Hashable, find: Callable[[], Answer]) -> Answer:
        """The answer of `find`, which must depend on these nodes and the question alone."""
        known = self.__dict__.setdefault("_known", {})
        if question not in known:
            known[question] = find()
        answer: Answer = known[question]
        return answer


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


def device_count(node: NodeView) -> int | None:
    """GPUs of a node by the labeller's count forms, None when it wrote no count."""
    for key in (DEVICE_ID_KEY, BETA_DEVICE_ID_KEY):
        counts = [v for label, v in node.labels.items() if label.startswith(f"{key}.")]
        total = sum(int(count) for count in counts if count.isdigit())
        if total:
            return total
    return None


def unhealthy_gpus(node: NodeView) -> tuple[str, ...]:
    """Ids of the GPUs that the metrics exporter marks; it writes the label only while not well."""
    found = (_HEALTH_LABEL.match(key) for key in node.labels)
    return tuple(sorted(match.group(1) for match in found if match))


def _bare(device_id: str) -> str:
    return device_id.lower().removeprefix("0x")


def is_candidate(node: NodeView) -> bool:
    """True when a node carries AMD devices by label or by an Allocatable key."""
    return any(node.labels.get(key) == "true" for key in _CANDIDATE_LABELS) or any(
        RESOURCE_PATTERN.match(key) for key in node.allocatable
    )


def unusable(node: NodeView, accelerator: AcceleratorSpec) -> str:
    """Why the scheduler keeps a replica from a node, apart from devices; empty without reason."""
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


def unhealthy(node: NodeView) -> str:
    """Why a node's devices must not be used, which no scheduler knows; empty without reason."""
    # Remediation sets one condition for each kind of error; the names are configurable, the prefix
    # is not (gpu-operator auto-remediation.md).
    for name, status in sorted(node.conditions.items()):
        if name.startswith("AMDGPU") and status == "True":
            return f"condition {name}"
    state = node.labels.get(_DCM_STATE, "success")
    if state != "success":
        return f"partitioning {state}"
    mode = node.labels.get(_GPU_MODE, "container")
    if mode != "container":
        return f"mode {mode}"
    # Also where a replica tolerates every taint: nobody may work on a node in repair.
    marked = [taint.key for taint in node.taints if taint.key in _REPAIR_TAINTS]
    return f"taint {marked[0]}" if marked else ""


def is_sick(node: NodeView) -> bool:
    """True when remediation or repartitioning marked the node: its replicas leave first."""
    return bool(unhealthy(node))
