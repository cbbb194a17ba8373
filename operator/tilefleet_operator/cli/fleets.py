"""What the plugin reads of the cluster: fleets with their pods, and the objects around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import KIND, InferenceDeployment, parse
from tilefleet_operator.cli.connection import Connection
from tilefleet_operator.errors import ConfigInvalid, Forbidden, NotFound, SpecInvalid
from tilefleet_operator.observed import (
    LABEL_DEPLOYMENT,
    LABEL_ROLE,
    ROLE_BALLOON,
    MissingStats,
    NodeView,
    PodView,
    WorkerStats,
    device_use,
    node_view,
    pod_view,
)
from tilefleet_operator.resources import DEPLOYMENTS, NODES, PODS
from tilefleet_operator.units import timestamp

Stats = Mapping[str, WorkerStats | MissingStats]


@dataclass(frozen=True)
class FleetView:
    """One InferenceDeployment as the cluster holds it. pods: its own, oldest first."""

    deployment: InferenceDeployment
    pods: tuple[PodView, ...]
    created: float = 0.0
    stats: Stats = field(default_factory=dict)

    @property
    def status(self) -> Mapping[str, Any]:
        """The operator's report."""
        return self.deployment.status

    def condition(self, kind: str) -> Mapping[str, Any]:
        """One condition; empty before the operator's first report."""
        found = self.status.get("conditions") or ()
        return next((c for c in found if c["type"] == kind), {})

    def pod(self, name: str) -> PodView:
        """One own pod. Raises ConfigInvalid, naming those that there are."""
        for pod in self.pods:
            if pod.name == name:
                return pod
        names = ", ".join(pod.name for pod in self.pods) or "none"
        raise ConfigInvalid(f"{name!r} is no pod of {self.deployment.name}; it has: {names}")


@dataclass(frozen=True)
class Surroundings:
    """Nodes and the devices in use on them. problem: what could not be read, and why."""

    nodes: tuple[NodeView, ...] = ()
    device_use: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    problem: str = ""


async def fleet(connection: Connection, name: str, *, load: bool = False) -> FleetView:
    """One fleet of the connection's namespace. load: ask its workers, too.

    Raises ConfigInvalid when there is none of that name, SpecInvalid for one of another version.
    """
    namespace = connection.namespace
    try:
        body = await connection.api.get(DEPLOYMENTS, namespace, name)
    except NotFound as error:
        if error.reason == "NotFound" and "inferencedeployments" in error.message:
            text = f"no {KIND} {name!r} in namespace {namespace}; see: kubectl get infd -A"
            raise ConfigInvalid(text) from error
        raise ConfigInvalid(f"the cluster does not know {KIND}; install the chart") from error
    selector = f"{LABEL_DEPLOYMENT}={name}"
    found = await connection.api.list(PODS, namespace, label_selector=selector)
    view = _view(body, [pod_view(pod) for pod in found.items])
    return await with_load(connection, view) if load else view


async def fleets(connection: Connection, everywhere: bool) -> tuple[list[FleetView], list[str]]:
    """All fleets, by namespace and name, and a sentence on each that cannot be read."""
    namespace = None if everywhere else connection.namespace
    try:
        bodies = await connection.api.list(DEPLOYMENTS, namespace)
    except NotFound as error:
        raise ConfigInvalid(f"the cluster does not know {KIND}; install the chart") from error
    pods = await connection.api.list(PODS, namespace, label_selector=LABEL_DEPLOYMENT)
    views = [pod_view(pod) for pod in pods.items]
    found, problems = [], []
    for body in bodies.items:
        try:
            found.append(_view(body, views))
        except SpecInvalid as error:
            problems.append(f"{body['metadata']['namespace']}: {error}")
    return sorted(found, key=lambda f: (f.deployment.namespace, f.deployment.name)), problems


async def with_load(connection: Connection, view: FleetView) -> FleetView:
    """The same fleet with its workers' answers."""
    stats = await connection.stats(view.pods)
    return FleetView(view.deployment, view.pods, view.created, stats)


async def surroundings(connection: Connection) -> Surroundings:
    """Nodes and devices in use over all namespaces; what RBAC forbids is said, not raised."""
    try:
        nodes = await connection.api.list(NODES)
        pods = await connection.api.list(PODS, field_selector="status.phase!=Succeeded")
    except Forbidden as error:
        return Surroundings(problem=f"nodes cannot be judged: {error.message}")
    return Surroundings(
        tuple(node_view(body) for body in nodes.items),
        device_use(tuple(pod_view(body) for body in pods.items)),
    )


def _view(body: Mapping[str, Any], pods: Sequence[PodView]) -> FleetView:
    deployment = parse(body)
    own = [
        pod
        for pod in pods
        if pod.namespace == deployment.namespace
        and pod.owner_uid == deployment.uid
        and pod.labels.get(LABEL_ROLE) != ROLE_BALLOON
    ]
    created = timestamp(body["metadata"]["creationTimestamp"])
    return FleetView(deployment, tuple(sorted(own, key=lambda p: (p.created, p.name))), created)
