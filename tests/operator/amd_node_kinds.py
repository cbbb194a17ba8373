"""AMD Node objects of every kind: the fixtures, and what goes wrong with them in the field."""

from typing import Any

from tests.operator.builders import AMD_NODES, node_object

Json = dict[str, Any]


def changed(kind: str, name: str, **patch: Any) -> Json:
    """A fixture with labels, taints, allocatable, conditions or unschedulable changed."""
    body = node_object(kind, name)
    labels = patch.get("labels", {})
    body["metadata"]["labels"] = {
        k: v for k, v in {**body["metadata"]["labels"], **labels}.items() if v is not None
    }
    if "taints" in patch:
        body.setdefault("spec", {})["taints"] = patch["taints"]
    if "unschedulable" in patch:
        body.setdefault("spec", {})["unschedulable"] = patch["unschedulable"]
    if "allocatable" in patch:
        body["status"]["allocatable"] = patch["allocatable"]
        body["status"].pop("capacity", None)
    if "conditions" in patch:
        body["status"]["conditions"] = patch["conditions"]
    return body


def kinds(name: str) -> dict[str, Json]:
    """Every fixture of the facts and every delta of it, with a node name of its own."""
    dcm = "dcm.amd.com/gpu-config-profile-state"
    partition = "amd.com/gpu.compute-memory-partition"
    ready = {"type": "Ready", "status": "True"}
    found = {kind: node_object(kind, name) for kind in AMD_NODES}
    found |= {
        "cpx-failed": changed("cpx64", name, labels={dcm: "failure"}),
        "cpx-busy": changed("cpx64", name, labels={dcm: "applying"}),
        "cpx-tainted": changed(
            "cpx64",
            name,
            taints=[{"key": "amd-dcm", "value": "up", "effect": "NoExecute"}],
        ),
        "cpx-remnant": changed("cpx64", name, allocatable={"amd.com/spx_nps1": "63"}),
        "cpx-single": changed(
            "cpx64",
            name,
            allocatable={"amd.com/gpu": "64"},
            labels={"amd.com/compute-memory-partition": None, partition: "cpx_nps1"},
        ),
        "cpx-unlabelled": changed(
            "cpx64",
            name,
            allocatable={"amd.com/gpu": "63"},
            labels={"amd.com/compute-memory-partition": None},
        ),
        "cpx-sick-gpu": changed(
            "cpx64", name, labels={"metricsexporter.amd.com.gpu.3.state": "unhealthy"}
        ),
        "stale": changed("spx8", name, allocatable={"amd.com/cpx_nps4": "64"}),
        "stale-single": changed("spx8", name, allocatable={"amd.com/gpu": "64"}),
        "provisioning": changed("spx8", name, allocatable={}),
        "sick-untainted": changed("sick", name, taints=[]),
        "sick-gpu": changed("sick", name, taints=[], conditions=[ready]),
        "cordoned": changed("spx8", name, unschedulable=True),
        "not-ready": changed("spx8", name, conditions=[{"type": "Ready", "status": "False"}]),
        "convention": changed(
            "spx8",
            name,
            taints=[{"key": "amd.com/gpu", "value": "yes", "effect": "NoSchedule"}],
        ),
        "dedicated": changed("spx8", name, taints=[{"key": "team", "effect": "NoSchedule"}]),
        "passthrough": changed("spx8", name, labels={"amd.com/gpu.mode": "vf-passthrough"}),
        "odd-mode": changed("spx8", name, labels={"amd.com/gpu.mode": "sriov"}),
        "mi210": changed(
            "spx8",
            name,
            labels={
                "amd.com/gpu.device-id": "740f",
                "beta.amd.com/gpu.device-id": "740f",
                "beta.amd.com/gpu.device-id.74a1": None,
                "beta.amd.com/gpu.device-id.740f": "8",
                partition: None,
            },
        ),
        "leftover": changed(
            "spx8",
            name,
            labels={"amd.com/gpu.device-id": "740f", "amd.com/gpu.device-id.74a1": "8"},
        ),
        "zero-count": changed(
            "twoids", name, labels={"amd.com/gpu.device-id.74a1": "0"}
        ),
        "unknown-model": changed(
            "twoids",
            name,
            labels={"amd.com/gpu.device-id.ffff": "4", "amd.com/gpu.device-id.740f": None},
        ),
        "no-labels": {
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"allocatable": {"amd.com/gpu": "8"}, "conditions": [ready]},
        },
        "plain": {
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"allocatable": {"cpu": "8"}, "conditions": [ready]},
        },
    }  # fmt: skip
    return found
