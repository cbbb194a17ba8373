"""Fake AMD MI300X nodes, kept alive by kwok, with the labels AMD's node labeller writes."""

import json
import subprocess

from kit.errors import KitError

PREFIX = "fake-mi300x"
MARK = "kwok.x-k8s.io/node"
GPUS = 8

# Values of eight whole MI300X as the node labeller of ROCm/k8s-device-plugin reports them.
_PROPERTIES = {
    "family": "AI",
    "device-id": "74a1",
    "product-name": "AMD_Instinct_MI300X_OAM",
    "vram": "192G",
    "simd-count": "1216",
    "cu-count": "304",
}


def labels(name: str) -> dict[str, str]:
    """All labels of one fake node: form A, the beta forms, and those of node feature discovery."""
    found = {
        MARK: "fake",
        "kubernetes.io/hostname": name,
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/os": "linux",
        "feature.node.kubernetes.io/amd-gpu": "true",
        "feature.node.kubernetes.io/amd-gpu-mi300x": "true",
        "amd.com/gpu.driver-version": "6.12.12",
    }
    for key, value in _PROPERTIES.items():
        found[f"amd.com/gpu.{key}"] = value
        found[f"beta.amd.com/gpu.{key}"] = value
        found[f"beta.amd.com/gpu.{key}.{value}"] = str(GPUS)
    return found


def manifest(index: int) -> dict[str, object]:
    """One Node object of a 192-core, 2 TiB machine with eight MI300X. Pure."""
    name = f"{PREFIX}-{index}"
    resources = {
        "cpu": "192",
        "memory": "2Ti",
        "ephemeral-storage": "1Ti",
        "pods": "110",
        "amd.com/gpu": str(GPUS),
    }
    # The taint keeps real pods off: a fake node runs no processes.
    taint = {"key": "amd.com/gpu", "value": "present", "effect": "NoSchedule"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels(name), "annotations": {MARK: "fake"}},
        "spec": {"taints": [taint]},
        "status": {"capacity": resources, "allocatable": resources},
    }


def manifests(count: int) -> str:
    """A List of nodes 0..count-1 as JSON."""
    items = [manifest(index) for index in range(count)]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1)


def add(count: int, prefix: list[str], environment: dict[str, str]) -> None:
    """Make nodes 0..count-1 exist and be Ready; existing ones are brought up to date.

    prefix: the command that enters the cluster's network. Raises KitError.
    """
    _kubectl(prefix, environment, ["apply", "-f", "-"], manifests(count))
    names = [f"node/{PREFIX}-{index}" for index in range(count)]
    _kubectl(prefix, environment, ["wait", "--for=condition=Ready", "--timeout=30s", *names])


def remove(prefix: list[str], environment: dict[str, str]) -> None:
    """Delete all fake nodes and the pods on them."""
    listing = _kubectl(prefix, environment, ["get", "nodes", "-l", f"{MARK}=fake", "-o", "name"])
    for node in listing.split():
        where = f"spec.nodeName={node.removeprefix('node/')}"
        _kubectl(prefix, environment, ["cordon", node])
        pods = ["delete", "pods", "-A", "--field-selector", where, "--grace-period=0", "--force"]
        _kubectl(prefix, environment, pods)
        _kubectl(prefix, environment, ["delete", node])


def _kubectl(
    prefix: list[str], environment: dict[str, str], arguments: list[str], text: str = ""
) -> str:
    result = subprocess.run(
        [*prefix, "kubectl", *arguments],
        env=environment,
        input=text,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise KitError(f"kubectl {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout
