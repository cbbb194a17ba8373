"""Karpenter in the local cluster: a cloud that rents nodes of eight MI300X, and its node pool."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed import ROOT, Testbed, condition, until

Json = dict[str, Any]
POOL = "mi300x"
ZONE, OTHER_ZONE = "zone-a", "zone-b"
# What AMD's node labeller would write. Labels below kubernetes.io are not a node pool's to give.
LABELS = {
    "amd.com/gpu.device-id": "74a1",
    "amd.com/gpu.family": "AI",
    "amd.com/gpu.vram": "192G",
    "amd.com/gpu.cu-count": "304",
    "amd.com/gpu.compute-memory-partition": "spx_nps1",
}
RESOURCES = {
    "cpu": "192",
    "memory": "2Ti",
    "pods": "110",
    "ephemeral-storage": "1Ti",
    "amd.com/gpu": "8",
}


def _one_of(key: str, *values: str) -> Json:
    return {"key": key, "operator": "In", "values": list(values)}


def instance_types() -> list[Json]:
    """The one machine of the cloud, offered in one zone."""
    where = _one_of("topology.kubernetes.io/zone", ZONE)
    offering = {
        "Price": 14.0,
        "Available": True,
        "Requirements": [_one_of("karpenter.sh/capacity-type", "on-demand"), where],
    }
    return [
        {
            "name": "mi300x-8",
            "offerings": [offering],
            "architecture": "amd64",
            "operatingSystems": ["linux"],
            "resources": RESOURCES,
        }
    ]


def pool_objects(register_seconds: int) -> list[Json]:
    """Node class and pool; a machine registers as a node `register_seconds` after it was rented."""
    template = {
        "nodeClassRef": {"group": "karpenter.kwok.sh", "kind": "KWOKNodeClass", "name": POOL},
        "taints": [{"key": "amd.com/gpu", "value": "present", "effect": "NoSchedule"}],
        "requirements": _requirements(ZONE),
        "expireAfter": "720h",
    }
    pool = {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodePool",
        "metadata": {"name": POOL},
        "spec": {
            "template": {"metadata": {"labels": LABELS}, "spec": template},
            "limits": {"amd.com/gpu": "16"},
            "disruption": {"consolidationPolicy": "WhenEmpty", "consolidateAfter": "5s"},
        },
    }
    node_class = {
        "apiVersion": "karpenter.kwok.sh/v1alpha1",
        "kind": "KWOKNodeClass",
        "metadata": {"name": POOL},
        "spec": {"nodeRegistrationDelay": f"{register_seconds}s"},
    }
    return [node_class, pool]


def _requirements(zone: str) -> list[Json]:
    return [
        _one_of("karpenter.sh/capacity-type", "on-demand"),
        _one_of("topology.kubernetes.io/zone", zone),
    ]


def use_zone(testbed: Testbed, zone: str) -> None:
    """Let the pool rent in one zone; only ZONE has an offering."""
    patch = {"spec": {"template": {"spec": {"requirements": _requirements(zone)}}}}
    testbed.kubectl("patch", "nodepool", POOL, "--type=merge", "-p", json.dumps(patch))


def nodes(testbed: Testbed) -> list[str]:
    """Names of the nodes of the pool."""
    listed = testbed.kubectl("get", "nodes", "-l", f"karpenter.sh/nodepool={POOL}", "-o", "name")
    return sorted(name.removeprefix("node/") for name in listed.split())


@contextlib.contextmanager
def running(testbed: Testbed, folder: Path, register_seconds: int = 8) -> Iterator[None]:
    """Karpenter with an empty pool; afterwards pool, nodes and Karpenter are gone."""
    types = folder / "instance-types.json"
    types.write_text(json.dumps(instance_types()))
    command = [sys.executable, "hack/cluster", "karpenter", str(types)]
    log = folder / "karpenter.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        # A cold machine builds it first.
        until("Karpenter's definitions", lambda: _served(testbed, process, log), 800, every=1)
        for obj in pool_objects(register_seconds):
            testbed.apply(obj)
        until("the node pool is Ready", lambda: _pool_ready(testbed, process, log), 60)
        yield
        testbed.kubectl("delete", "nodepool", POOL, "--wait=true", seconds=120)
        # Only a running Karpenter takes its finalizers away.
        until("the nodes are gone", lambda: (not nodes(testbed) or None, "some are left"), 120)
        testbed.kubectl("delete", "kwoknodeclass", POOL, "--wait=true", seconds=60)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _served(
    testbed: Testbed, process: subprocess.Popen[bytes], log: Path
) -> tuple[bool | None, str]:
    _alive(process, log)
    found = testbed.get("crd", "kwoknodeclasses.karpenter.kwok.sh")
    established = condition(found or {}, "Established").get("status") == "True"
    return (True if established else None), log.read_text()[-200:]


def _pool_ready(
    testbed: Testbed, process: subprocess.Popen[bytes], log: Path
) -> tuple[bool | None, str]:
    _alive(process, log)
    ready = condition(testbed.get("nodepool", POOL) or {}, "Ready")
    return (True if ready.get("status") == "True" else None), str(ready)


def _alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"Karpenter ended with {process.returncode}: {log.read_text()[-2000:]}")
