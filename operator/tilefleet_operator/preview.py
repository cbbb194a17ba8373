"""What the operator would do with given objects, replayed without a cluster.

Uses the very plan() of production through simulation. Several fleets take devices in the order
given. It reads no file and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from tilefleet_operator import placement
from tilefleet_operator.api import KIND, InferenceDeployment, parse
from tilefleet_operator.desired import Defaults
from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.observed import NodeView, PodView, Snapshot, device_use, node_view, pod_view
from tilefleet_operator.placement import Fit
from tilefleet_operator.plan import Action, Plan
from tilefleet_operator.simulation import World, trace

Json = dict[str, Any]
View = TypeVar("View")
STEP_LIMIT = 120


@dataclass(frozen=True)
class Scene:
    """Objects by what they are to a plan. children: namespace → (kind, name) → object."""

    fleets: tuple[InferenceDeployment, ...]
    nodes: tuple[NodeView, ...] = ()
    pods: tuple[PodView, ...] = ()
    children: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Preview:
    """One fleet's replay: (second, plan) of each plan that acts, the world at its end, the nodes.

    placement: judgement of the AMD nodes before the first step; None on vendor cpu or without
    nodes.
    """

    fleet: InferenceDeployment
    steps: tuple[tuple[float, Plan], ...]
    end: World
    placement: Fit | None = None

    @property
    def status(self) -> Mapping[str, Any]:
        """The status at the end."""
        return self.end.snapshot.deployment.status

    def as_json(self) -> Json:
        """Everything that is shown, with whole objects."""
        replicas = ("desiredReplicas", "readyReplicas")
        return {
            "namespace": self.fleet.namespace,
            "name": self.fleet.name,
            "steps": [_step(second, step) for second, step in self.steps],
            "conditions": list(self.status.get("conditions") or ()),
            "replicas": {field: self.status.get(field) for field in replicas},
            "placement": None if self.placement is None else _placement(self.placement),
        }


def scene(objects: Sequence[Mapping[str, Any]]) -> Scene:
    """Sort objects; each needs a mapping as its metadata.

    Raises SpecInvalid or ObservationInvalid, naming the object, for one that cannot be read.
    """
    children: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for body in objects:
        kind, metadata = str(body.get("kind", "")), body["metadata"]
        if kind not in (KIND, "Node", "Pod"):
            space = children.setdefault(str(metadata.get("namespace") or "default"), {})
            space[kind, str(metadata.get("name"))] = body
    return Scene(
        fleets=_views(objects, KIND, parse),
        nodes=_views(objects, "Node", node_view),
        pods=_views(objects, "Pod", pod_view),
        children=children,
    )


def _views(
    objects: Sequence[Mapping[str, Any]], kind: str, view: Callable[[Mapping[str, Any]], View]
) -> tuple[View, ...]:
    views = []
    for body in objects:
        if body.get("kind") != kind:
            continue
        try:
            views.append(view(body))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            name = body["metadata"].get("name")
            text = f"{kind} {name!r}: {error}; it is not what the Kubernetes API would show"
            raise ObservationInvalid(text) from error
    return tuple(views)


def preview(found: Scene, defaults: Defaults) -> list[Preview]:
    """Replay each fleet until nothing is left to do, as if each step took effect at once.

    A simulated pod is ready 5 s after it was placed. Devices of pods in the scene are in use, and
    what one fleet takes is no longer there for the next. Time begins with the newest pod.
    """
    use: Mapping[str, Mapping[str, float]] = device_use(found.pods)
    now = max([pod.created for pod in found.pods], default=0.0)
    shown = []
    for fleet in found.fleets:
        known = [pod for pod in found.pods if pod.namespace == fleet.namespace]
        snapshot = Snapshot(
            deployment=fleet,
            pods=tuple(pod for pod in known if fleet.uid and pod.owner_uid == fleet.uid),
            nodes=found.nodes,
            device_use=use,
            children=found.children.get(fleet.namespace, {}),
        )
        shown.append(_replay(snapshot, now, defaults))
        use = shown[-1].end.snapshot.device_use
    return shown


def _replay(snapshot: Snapshot, now: float, defaults: Defaults) -> Preview:
    steps = trace(World(snapshot, now), defaults, limit=STEP_LIMIT)
    accelerator = snapshot.deployment.spec.accelerator
    judged = accelerator.vendor == "amd" and snapshot.nodes
    return Preview(
        snapshot.deployment,
        tuple((moment.now - now, step) for moment, step in steps if step.actions),
        steps[-1][0],
        placement.fit(accelerator, snapshot.nodes, snapshot.device_use) if judged else None,
    )


def _step(second: float, step: Plan) -> Json:
    return {"seconds": second, "actions": [_action(action) for action in step.actions]}


def _action(action: Action) -> Json:
    shown = {
        "action": type(action).__name__,
        "kind": action.kind,
        "namespace": action.namespace,
        "name": action.name,
        "why": action.why,
    }
    body = asdict(action).get("body")
    return shown if body is None else {**shown, "body": body}


def _placement(fit: Fit) -> Json:
    return {
        "devicesPerReplica": fit.devices,
        "matching": [{"node": n.name, "free": n.free, "total": n.total} for n in fit.matching],
        "refused": [{"node": name, "why": why} for name, why in fit.refused],
    }
