"""The pod of a replica, as a fresh dictionary for server-side apply.

Does not know what exists, nor how many replicas are wanted. The other children: children.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from tilefleet_operator.api import API_VERSION, KIND, InferenceDeployment
from tilefleet_operator.failures import Successor
from tilefleet_operator.hardware import GPU_TAINT
from tilefleet_operator.observed import (
    ACTIVE,
    ANNOTATION_ACCELERATOR,
    ANNOTATION_ATTEMPT,
    ANNOTATION_AVOID,
    ANNOTATION_PLACEMENT,
    LABEL_DEPLOYMENT,
    LABEL_REVISION,
    LABEL_ROLE,
    LABEL_STATE,
    ROLE_WORKER,
)
from tilefleet_operator.options import Placement, node_affinity
from tilefleet_operator.placement import unseen
from tilefleet_operator.units import quantity, seconds

DO_NOT_DISRUPT = "karpenter.sh/do-not-disrupt"
API_PORT, ADMIN_PORT = 8000, 8001
MODELS_PATH, CACHE_PATH = "/models", "/var/lib/tilefleet"
USER_ID = 65532
# Endpoints learn late that a pod leaves, so a draining worker goes on accepting for this long.
# With 2 s, one stream in 8 rolls under 60 met a worker that no longer accepted, 4 s after it had
# left the Service (two cores under a load of 35). KServe waits 15 s, too.
REMOVAL_DELAY_SECONDS = 15
# ROCm needs at least 15 s to free device memory; the rest is for the process itself.
TEARDOWN_SECONDS = 20
# Loading a large checkpoint from a cold network store may take this long.
STARTUP_SECONDS = 3600
SHM_SIZE = "16Gi"


@dataclass(frozen=True)
class Defaults:
    """What the operator's flags supply to every deployment.

    worker_image: ROCm image, for vendor amd. worker_cpu_image: for vendor cpu.
    hf_endpoint: base URL of the model hub, None for the public one.
    image_pull_policy: empty leaves it to Kubernetes. namespace: the operator's own.
    network_policy: whether fleets get one. admin_from: namespaces and address blocks (CIDR) that
    may reach the admin port beside the operator's namespace. device_groups: host groups that own
    the GPU devices, such as render and video; their ids differ between distributions.
    balloon_priority_class: below the priority of every replica.
    """

    worker_image: str = ""
    worker_cpu_image: str = ""
    hf_endpoint: str | None = None
    image_pull_policy: str = ""
    namespace: str = "tilefleet-system"
    network_policy: bool = True
    admin_from: tuple[str, ...] = ()
    device_groups: tuple[int, ...] = ()
    balloon_priority_class: str = "tilefleet-balloon"


def selector(deployment: InferenceDeployment) -> str:
    """Label selector of the replicas that serve, as the scale subresource shows it."""
    return ",".join(f"{key}={value}" for key, value in sorted(serving_labels(deployment).items()))


def revision(deployment: InferenceDeployment, defaults: Defaults) -> str:
    """Eight hex digits over everything in a pod that the spec or the operator's flags decide."""
    template = pod(deployment, 0, "", defaults)
    text = json.dumps([template["metadata"]["labels"], template["spec"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def pod_name(deployment: InferenceDeployment, slot: int, revision: str) -> str:
    """Name of the replica in a slot of a revision; at most 63 characters."""
    return f"{deployment.name}-{revision}-{slot}"


def pod(
    deployment: InferenceDeployment,
    slot: int,
    revision: str,
    defaults: Defaults,
    heir: Successor | None = None,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """One replica, within the restricted Pod Security Standard on every vendor.

    heir: what it takes over from failed predecessors; no part of the revision. placement: where it
    may go, for vendor amd; by default where no node is known.
    """
    spec = deployment.spec
    amd = spec.accelerator.vendor == "amd"
    if amd and placement is None:
        placement = unseen(spec.accelerator)
    body: dict[str, Any] = {
        "serviceAccountName": deployment.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": _grace_seconds(deployment),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(deployment, defaults, placement)],
        "volumes": _volumes(deployment),
    }
    if amd and defaults.device_groups:
        body["securityContext"]["supplementalGroups"] = list(defaults.device_groups)
    if spec.accelerator.node_selector:
        body["nodeSelector"] = dict(spec.accelerator.node_selector)
    tolerations = _tolerations(deployment)
    if tolerations:
        body["tolerations"] = tolerations
    heir = heir or Successor()
    affinity = node_affinity(placement, heir.avoid)
    if affinity:
        body["affinity"] = {"nodeAffinity": affinity}
    marks = serving_labels(deployment) | child_labels(deployment) | {LABEL_REVISION: revision}
    annotations = protection(spec.capacity.protect_startup or spec.capacity.protect_serving)
    if heir.attempt:
        annotations[ANNOTATION_ATTEMPT] = str(heir.attempt)
    if heir.avoid:
        annotations[ANNOTATION_AVOID] = ",".join(heir.avoid)
    if placement is not None:
        annotations[ANNOTATION_ACCELERATOR] = placement.option.title
        annotations[ANNOTATION_PLACEMENT] = placement.option.key
    name = pod_name(deployment, slot, revision)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": child_metadata(deployment, name, marks, annotations),
        "spec": body,
    }


def protection(protected: bool) -> dict[str, str]:
    """What node autoscalers read: whether they may move a pod.

    Movable is said, too: Cluster Autoscaler spares pods that no controller of its list owns.
    """
    return {
        DO_NOT_DISRUPT: str(protected).lower(),
        "cluster-autoscaler.kubernetes.io/safe-to-evict": str(not protected).lower(),
    }


def child_labels(deployment: InferenceDeployment) -> dict[str, str]:
    """Labels of every child."""
    return {
        LABEL_DEPLOYMENT: deployment.name,
        "app.kubernetes.io/name": "tilefleet-worker",
        "app.kubernetes.io/instance": deployment.name,
        "app.kubernetes.io/managed-by": "tilefleet",
    }


def worker_args(deployment: InferenceDeployment, defaults: Defaults) -> list[str]:
    """The worker's arguments; tests/contract proves that the worker parses them."""
    spec, engine = deployment.spec, deployment.spec.engine
    cpu = spec.accelerator.vendor == "cpu"
    args = ["serve", "--model", _model_argument(spec.model.uri)]
    args += ["--served-model-name", deployment.served_name]
    args += ["--max-model-len", str(spec.model.max_model_len)]
    args += ["--backend", "cpu" if cpu else "auto"]
    if engine.kv_cache.memory:
        args += ["--kv-cache-memory", engine.kv_cache.memory]
    if engine.kv_cache.block_size:
        args += ["--block-size", str(engine.kv_cache.block_size)]
    if not engine.kv_cache.prefix_caching:
        args.append("--no-prefix-caching")
    if engine.kv_cache.host_offload:
        args += ["--kv-offloading-size", engine.kv_cache.host_offload]
    args += ["--max-batch-tokens", str(engine.max_batch_tokens)]
    args += ["--max-concurrent", str(engine.max_concurrent)]
    args += ["--cache-dir", CACHE_PATH]
    if defaults.hf_endpoint and spec.model.uri.startswith("hf://"):
        args += ["--hf-endpoint", defaults.hf_endpoint]
    args += ["--drain-timeout", spec.rollout.drain.timeout]
    args += ["--removal-delay", f"{REMOVAL_DELAY_SECONDS}s"]
    if cpu:
        args += ["--threads", str(max(1, math.ceil(quantity(engine.resources.cpu))))]
    return args + list(engine.args)


def _model_argument(uri: str) -> str:
    if not uri.startswith("pvc://"):
        return uri
    return f"file://{MODELS_PATH}/{uri.removeprefix('pvc://').partition('/')[2]}".rstrip("/")


def image(deployment: InferenceDeployment, defaults: Defaults) -> str:
    """The image of a replica."""
    cpu = deployment.spec.accelerator.vendor == "cpu"
    default = defaults.worker_cpu_image if cpu else defaults.worker_image
    return deployment.spec.engine.image or default


def _container(
    deployment: InferenceDeployment, defaults: Defaults, placement: Placement | None
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "worker",
        "image": image(deployment, defaults),
        "args": worker_args(deployment, defaults),
        "env": _environment(deployment),
        "ports": [
            {"name": "http", "containerPort": API_PORT, "protocol": "TCP"},
            {"name": "admin", "containerPort": ADMIN_PORT, "protocol": "TCP"},
        ],
        "resources": _resources(deployment, placement),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # One second, because a cached small model is ready in two; 3600 tries for a large one.
        "startupProbe": _probe("/startupz", period=1, failures=STARTUP_SECONDS),
        "readinessProbe": _probe("/readyz", period=1, failures=2),
        # The worker itself decides when it is stuck; the kubelet adds a generous minute.
        "livenessProbe": _probe("/livez", period=10, failures=6),
        "volumeMounts": _mounts(deployment),
        # An abort of the GPU runtime writes no message; the log's end then says what happened.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if defaults.image_pull_policy:
        container["imagePullPolicy"] = defaults.image_pull_policy
    return container


def _environment(deployment: InferenceDeployment) -> list[dict[str, Any]]:
    # The read-only root needs a writable home for libraries that cache beside the user.
    variables: list[dict[str, Any]] = [{"name": "HOME", "value": "/tmp"}]
    # By reference, so that the revision is not part of what it is computed from.
    label = {"fieldRef": {"fieldPath": f"metadata.labels['{LABEL_REVISION}']"}}
    variables.append({"name": "TILEFLEET_REVISION", "valueFrom": label})
    secret = deployment.spec.model.secret_ref
    if secret.name:
        reference = {"secretKeyRef": {"name": secret.name, "key": secret.key}}
        variables.append({"name": "HF_TOKEN", "valueFrom": reference})
    return variables


def _resources(deployment: InferenceDeployment, placement: Placement | None) -> dict[str, Any]:
    resources = deployment.spec.engine.resources
    requests = {"cpu": resources.cpu, "memory": resources.memory}
    # No CPU limit: throttling would stretch steps; the number of threads is the bound.
    limits = {"memory": resources.memory}
    if placement is not None:
        option = placement.option
        requests[option.resource] = limits[option.resource] = str(option.count)
    return {"requests": requests, "limits": limits}


def _probe(path: str, *, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "admin"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _volumes(deployment: InferenceDeployment) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
    ]
    uri = deployment.spec.model.uri
    if uri.startswith("pvc://"):
        claim = {"claimName": uri.removeprefix("pvc://").partition("/")[0], "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
    if deployment.spec.accelerator.vendor == "amd":
        # The default 64 MiB is too small for RCCL.
        memory = {"medium": "Memory", "sizeLimit": SHM_SIZE}
        volumes.append({"name": "shm", "emptyDir": memory})
    return volumes


def _mounts(deployment: InferenceDeployment) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_PATH},
    ]
    if deployment.spec.model.uri.startswith("pvc://"):
        mounts.append({"name": "models", "mountPath": MODELS_PATH, "readOnly": True})
    if deployment.spec.accelerator.vendor == "amd":
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return mounts


def _tolerations(deployment: InferenceDeployment) -> list[dict[str, Any]]:
    accelerator = deployment.spec.accelerator
    amd = [{"key": GPU_TAINT, "operator": "Exists"}] if accelerator.vendor == "amd" else []
    given = [
        {k: v for k, v in toleration.model_dump(by_alias=True).items() if v}
        for toleration in accelerator.tolerations
    ]
    return amd + [toleration for toleration in given if toleration not in amd]


def _grace_seconds(deployment: InferenceDeployment) -> int:
    drain = math.ceil(seconds(deployment.spec.rollout.drain.timeout))
    return drain + REMOVAL_DELAY_SECONDS + TEARDOWN_SECONDS


def serving_labels(deployment: InferenceDeployment) -> dict[str, str]:
    """Labels of the replicas that serve."""
    return {
        LABEL_DEPLOYMENT: deployment.name,
        LABEL_ROLE: ROLE_WORKER,
        LABEL_STATE: ACTIVE,
    }


def child_metadata(
    deployment: InferenceDeployment, name: str, labels: dict[str, str], annotations: dict[str, str]
) -> dict[str, Any]:
    """Metadata of a child, with the deployment as its controller."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": deployment.name,
        "uid": deployment.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    result: dict[str, Any] = {
        "name": name,
        "namespace": deployment.namespace,
        "labels": labels,
        "ownerReferences": [owner],
    }
    if annotations:
        result["annotations"] = annotations
    return result
