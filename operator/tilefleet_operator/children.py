"""One builder per child beside the pods: Service, ServiceAccount, budget, network policy, monitor.

Every builder returns a fresh dictionary for server-side apply. Does not know what exists.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.desired import (
    ADMIN_PORT,
    API_PORT,
    Defaults,
    child_labels,
    child_metadata,
    serving_labels,
)
from tilefleet_operator.observed import LABEL_DEPLOYMENT, LABEL_ROLE, ROLE_WORKER

Json = dict[str, Any]
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"


def names(deployment: InferenceDeployment) -> dict[str, str]:
    """Kind → name of every child that a fleet may have."""
    kinds = ("Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor")
    return {
        kind: deployment.service_account if kind == "ServiceAccount" else deployment.name
        for kind in kinds
    }


def children(
    deployment: InferenceDeployment, desired: int, defaults: Defaults, monitors_served: bool
) -> list[Json]:
    """The children that ought to exist; of the kinds in `names`, no other may.

    desired: replicas that are wanted. monitors_served: whether the cluster has PodMonitors.
    """
    wanted = [
        service_account(deployment),
        service(deployment),
        disruption_budget(deployment, desired),
    ]
    if defaults.network_policy:
        wanted.append(network_policy(deployment, defaults))
    if monitors_served and deployment.spec.monitoring.pod_monitor == "auto":
        wanted.append(pod_monitor(deployment))
    return wanted


def service(deployment: InferenceDeployment) -> Json:
    """The Service that clients use; draining replicas leave it at once by their label."""
    spec = {
        "type": "ClusterIP",
        "selector": serving_labels(deployment),
        "ports": [{"name": "http", "port": API_PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    return _child(deployment, "v1", "Service", spec=spec)


def service_account(deployment: InferenceDeployment) -> Json:
    """The identity of the pods. It is bound to no role, and its token is mounted nowhere."""
    return _child(deployment, "v1", "ServiceAccount", automountServiceAccountToken=False)


def disruption_budget(deployment: InferenceDeployment, desired: int) -> Json:
    """What a node drain may take at a time: rollout.maxUnavailable, but at least one replica.

    With 0 a node could never be emptied. minAvailable, and not maxUnavailable: for that Kubernetes
    takes the expected number from spec.replicas of /scale, which is not the fleet's size in Auto
    (pkg/controller/disruption/disruption.go).
    """
    spec = {
        "minAvailable": max(0, desired - max(1, deployment.spec.rollout.max_unavailable)),
        "selector": {"matchLabels": serving_labels(deployment)},
        # A replica that is not ready protects nobody, and must not hold a node for ever.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return _child(deployment, "policy/v1", "PodDisruptionBudget", spec=spec)


def network_policy(deployment: InferenceDeployment, defaults: Defaults) -> Json:
    """The serving port is open to all; the admin port to the operator and to `admin_from` only.

    Kubelet probes need no rule: traffic from a pod's own node is always allowed (NetworkPolicy,
    Kubernetes documentation). Egress stays open: checkpoints come from hubs, mirrors, proxies and
    storage whose addresses nobody here knows, and a wrong guess would stop every new replica.
    """
    peers = [_peer(one) for one in sorted({defaults.namespace, *defaults.admin_from})]
    spec = {
        "podSelector": {"matchLabels": {LABEL_DEPLOYMENT: deployment.name}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"ports": [{"port": API_PORT, "protocol": "TCP"}]},
            {"ports": [{"port": ADMIN_PORT, "protocol": "TCP"}], "from": peers},
        ],
    }
    return _child(deployment, "networking.k8s.io/v1", "NetworkPolicy", spec=spec)


def pod_monitor(deployment: InferenceDeployment) -> Json:
    """Tells the Prometheus operator to scrape every replica, draining ones too."""
    labels = {LABEL_DEPLOYMENT: deployment.name, LABEL_ROLE: ROLE_WORKER}
    spec = {
        "selector": {"matchLabels": labels},
        "podMetricsEndpoints": [{"port": "admin", "path": "/metrics"}],
    }
    return _child(deployment, "monitoring.coreos.com/v1", "PodMonitor", spec=spec)


def _peer(origin: str) -> Json:
    """A NetworkPolicy peer: every pod of a namespace, or an address block."""
    try:
        return {"ipBlock": {"cidr": str(ipaddress.ip_network(origin))}}
    except ValueError:
        return {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME_LABEL: origin}}}


def _child(deployment: InferenceDeployment, api_version: str, kind: str, **rest: Any) -> Json:
    name, labels = names(deployment)[kind], child_labels(deployment)
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": child_metadata(deployment, name, labels, {}),
        **rest,
    }
