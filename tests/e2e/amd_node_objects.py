"""Node objects of AMD nodes as the field shows them, kept alive by kwok in the local cluster."""

import json
from typing import Any

from testbed import ROOT, Testbed, condition, until

Json = dict[str, Any]
FIXTURES: Json = json.loads((ROOT / "tests/operator/data/amd_nodes.json").read_text())
MACHINE = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "1Ti", "pods": "110"}
MARK = "kwok.x-k8s.io/node"


def node(kind: str, name: str) -> Json:
    """A fixture as a whole Node: a machine around its devices, and what every kubelet sets."""
    body: Json = json.loads(json.dumps(FIXTURES[kind]))
    labels = {**body["metadata"]["labels"], "kubernetes.io/hostname": name, MARK: "fake"}
    body["metadata"] = {"name": name, "labels": labels, "annotations": {MARK: "fake"}}
    status = body["status"]
    allocatable = {**MACHINE, **status["allocatable"]}
    status |= {"allocatable": allocatable, "capacity": allocatable | status.get("capacity", {})}
    keep_off = {"key": "amd.com/gpu", "value": "present", "effect": "NoSchedule"}
    body["spec"] = {"taints": [*body.get("spec", {}).get("taints", []), keep_off]}
    return body


def add(testbed: Testbed, kinds: dict[str, str]) -> None:
    """Nodes by name and kind, once they are Ready. Testbed.remove_fake_nodes takes them away."""
    for name, kind in kinds.items():
        testbed.apply(node(kind, name))
    for name in kinds:
        until(f"node {name} is Ready", lambda name=name: _ready(testbed, name), 60)


def _ready(testbed: Testbed, name: str) -> tuple[bool | None, str]:
    found = condition(testbed.get("node", name) or {}, "Ready")
    return (True if found.get("status") == "True" else None), str(found)
