"""Which nodes can carry a replica, and why the others cannot.

Sources: facts on AMD's node labeller, device plugin, config manager and remediation; each rule
below names what it reads. Does not know pods, only how many devices of a node are in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    conditions: condition type → status ("True", "False", "Unknown").
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
