"""The operator's view of Kubernetes: lists into the cache, and gather() from it.

It writes nothing and decides nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tilefleet_operator import children
from tilefleet_operator.api import PLURAL, InferenceDeployment, parse
from tilefleet_operator.autoscalers import NodeAutoscalers
from tilefleet_operator.cache import Key, ObjectCache, child_key, version
from tilefleet_operator.client import ApiClient
from tilefleet_operator.echoes import Echoes
from tilefleet_operator.errors import NotFound, SpecInvalid
from tilefleet_operator.hardware import Nodes
from tilefleet_operator.observed import (
    DEVICE_PREFIX,
    DRAINING,
    LABEL_DEPLOYMENT,
    LABEL_ROLE,
    ROLE_WORKER,
    History,
    MissingStats,
    NodeView,
    PodView,
    Snapshot,
    WorkerStats,
    device_use,
    node_view,
    pod_view,
)
from tilefleet_operator.pace import PollTarget
from tilefleet_operator.resources import (
    BY_KIND,
    CHILDREN,
    DEPLOYMENTS,
    MONITORS,
    NODES,
    PODS,
    REVISIONS,
    Resource,
)
from tilefleet_operator.tally import DeviceTally

Json = dict[str, Any]
_LATEST = 2**63


@dataclass(slots=True)
class _Views:
    """Typed views of cached objects, made once per version: UID → (version, view)."""

    pods: dict[str, tuple[int, PodView]] = field(default_factory=dict)
    nodes: dict[str, tuple[int, NodeView]] = field(default_factory=dict)
    deployments: dict[str, tuple[int, InferenceDeployment]] = field(default_factory=dict)
    all_nodes: tuple[int, Nodes] = (-1, Nodes())


class Cluster:
    """One Kubernetes cluster as the leader sees and changes it.

    namespaces: those that are watched; empty for all.
    """

    def __init__(self, api: ApiClient, cache: ObjectCache, namespaces: Sequence[str] = ()) -> None:
        self.api, self.cache, self.namespaces = api, cache, tuple(namespaces)
        self.echoes = Echoes()
        self._views = _Views()
        self._foreign: tuple[PodView, ...] = ()
        self._tally, self._counted = DeviceTally(), 0
        self._autoscalers = NodeAutoscalers(api)
        self.monitors_served = False

    async def list_all(self) -> None:
        """List every resource into the cache; what is gone is forgotten. Raises ApiError.

        Owners last, and taken all at once: a fleet that was deleted meanwhile must not show without
        the pods that went with it, or they would be made again.
        """
        takes = [
            await self._list(resource, selector)
            for resource, selector in (
                (NODES, ""),
                (PODS, LABEL_DEPLOYMENT),
                *((resource, LABEL_DEPLOYMENT) for resource in CHILDREN),
                (DEPLOYMENTS, ""),
            )
        ]
        for take in takes:
            take()
        self._views = _Views(all_nodes=self._views.all_nodes)

    async def _list(self, resource: Resource, selector: str) -> Callable[[], bool]:
        """List one resource; what is returned takes the list into the cache."""
        scopes = self.namespaces if resource.namespaced and self.namespaces else (None,)
        lists = [await self.api.list(resource, ns, label_selector=selector) for ns in scopes]
        oldest = min((one.resource_version for one in lists), key=int)
        items = [item for one in lists for item in one.items]
        return partial(self.cache.replace, resource.plural, items, oldest, labelled=bool(selector))

    async def list_key(self, key: Key) -> bool:
        """List the children of one key, and the object itself. Raises ApiError.

        Returns whether every own write of the key is in the view now.
        """
        namespace, name = key
        selector = f"{LABEL_DEPLOYMENT}={name}"
        listed = {}
        for resource in (PODS, *CHILDREN):
            found = await self.api.list(resource, namespace, label_selector=selector)
            self.cache.replace(resource.plural, found.items, found.resource_version, key=key)
            listed[resource.plural] = int(found.resource_version)
        # By name, as a list: it needs no verb that the watch does not need, and carries a version.
        itself = f"metadata.name={name}"
        found = await self.api.list(DEPLOYMENTS, namespace, field_selector=itself)
        listed[PLURAL] = int(found.resource_version)
        held = self.cache.get(PLURAL, namespace, name)
        for body in found.items:
            self.cache.observe(PLURAL, None, body)
        if held is not None and not found.items and version(held) <= listed[PLURAL]:
            self.cache.bury(PLURAL, held["metadata"]["uid"])
        return self.cache.settle(key, listed)

    async def recheck_names(self, deployment: InferenceDeployment) -> None:
        """Read foreign objects that hold a child's name anew: no watch shows what has no label."""
        key = (deployment.namespace, deployment.name)
        for kind, name in children.names(deployment).items():
            resource = BY_KIND[kind]
            held = self.cache.get(resource.plural, deployment.namespace, name)
            if held is None or child_key(held) == key:
                continue
            try:
                found = await self.api.get(resource, deployment.namespace, name)
                self.cache.observe(resource.plural, None, found)
            except NotFound:
                self.cache.bury(resource.plural, held["metadata"]["uid"])

    async def list_monitors(self) -> bool:
        """Look whether the cluster has PodMonitors, and at ours; returns whether that changed.

        They are not watched: their definition may come and go, and a list a minute costs less.
        """
        before = (self.monitors_served, self.cache.changes(MONITORS.plural))
        try:
            (await self._list(MONITORS, LABEL_DEPLOYMENT))()
            self.monitors_served = True
        except NotFound:
            self.monitors_served = False
            self.cache.replace(MONITORS.plural, (), str(_LATEST))
        return before != (self.monitors_served, self.cache.changes(MONITORS.plural))

    async def list_foreign(self) -> bool:
        """Look for AMD devices held by pods of others; returns whether that changed.

        Only the few facts that count are kept; a fleet without AMD nodes never needs this.
        """
        found = await self.api.list(PODS, field_selector="status.phase!=Succeeded")
        before = self._foreign
        self._foreign = tuple(
            view
            for view in map(pod_view, found.items)
            if any(name.startswith(DEVICE_PREFIX) for name in view.requests)
            and not self._watches(view)
        )
        for view in before:
            self._tally.put(view.uid, None)
        for view in self._foreign:
            self._tally.put(view.uid, view)
        return device_use(before) != device_use(self._foreign)

    async def list_reactions(self) -> set[Key]:
        """Hear node autoscalers on pods without a node; the keys that it is news for."""
        views = (self._pod(body) for body in self.cache.all(PODS.plural))
        return await self._autoscalers.listen(
            {
                view.uid: (view.namespace, view.labels[LABEL_DEPLOYMENT])
                for view in views
                if view.node is None and view.reason == "Unschedulable" and not view.terminating
            }
        )

    def _watches(self, view: PodView) -> bool:
        mine = not self.namespaces or view.namespace in self.namespaces
        return mine and LABEL_DEPLOYMENT in view.labels

    def deployment(self, key: Key) -> InferenceDeployment | None:
        """The parsed object, None when there is none. Raises SpecInvalid."""
        body = self.cache.get(PLURAL, *key)
        if body is None:
            return None
        uid, now = body["metadata"]["uid"], version(body)
        held = self._views.deployments.get(uid)
        if held is None or held[0] != now:
            held = self._views.deployments[uid] = (now, parse(body))
        return held[1]

    def deployments(self) -> Iterable[InferenceDeployment]:
        """Every valid InferenceDeployment."""
        for key in sorted(self.cache.deployment_keys()):
            try:
                found = self.deployment(key)
            except SpecInvalid:
                continue
            if found is not None:
                yield found

    def pods(self, deployment: InferenceDeployment) -> tuple[PodView, ...]:
        """Pods that carry the object's label; a plan tells ours from others by their owner."""
        key = (deployment.namespace, deployment.name)
        return tuple(self._pod(body) for body in self.cache.children(PODS.plural, key))

    def poll_targets(self) -> dict[Key, PollTarget]:
        """Pods whose /stats are needed: those that serve or drain."""
        targets: dict[Key, PollTarget] = {}
        for deployment in self.deployments():
            wanted = tuple(
                pod
                for pod in self.pods(deployment)
                if pod.owner_uid == deployment.uid
                and pod.labels.get(LABEL_ROLE) == ROLE_WORKER
                and pod.ip and not pod.terminating and not pod.finished
                and (pod.state == DRAINING or pod.ready)
            )  # fmt: skip
            urgent = deployment.spec.autoscaling.mode == "Auto"
            urgent = urgent or any(pod.state == DRAINING for pod in wanted)
            if wanted:
                targets[deployment.namespace, deployment.name] = PollTarget(wanted, urgent)
        return targets

    def amd_keys(self) -> list[Key]:
        """Keys whose placement depends on nodes and on devices held by others."""
        amd = (d for d in self.deployments() if d.spec.accelerator.vendor == "amd")
        return [(deployment.namespace, deployment.name) for deployment in amd]

    def gather(
        self,
        deployment: InferenceDeployment,
        stats: Mapping[str, WorkerStats | MissingStats],
        history: History,
    ) -> Snapshot:
        """Everything that is known of one fleet now. Reads the cache only."""
        # Only placement on devices looks at all nodes; the rest must stay cheap at 2 s a fleet.
        amd = deployment.spec.accelerator.vendor == "amd"
        pods = self.pods(deployment)
        return Snapshot(
            deployment=deployment,
            pods=pods,
            nodes=self.nodes() if amd else self._nodes_of(pods),
            device_use=self.device_use() if amd else {},
            stats=stats,
            children=self._children(deployment),
            history=history,
            reactions={p.uid: r for p in pods if (r := self._autoscalers.heard.get(p.uid))},
            monitors_served=self.monitors_served,
        )

    def _children(self, deployment: InferenceDeployment) -> dict[tuple[str, str], Json]:
        """Children by kind and name, whoever owns them: the plan must see that a name is taken."""
        key = (deployment.namespace, deployment.name)
        found = {
            (REVISIONS.kind, body["metadata"]["name"]): body
            for body in self.cache.children(REVISIONS.plural, key)
        }
        for kind, name in children.names(deployment).items():
            held = self.cache.get(BY_KIND[kind].plural, deployment.namespace, name)
            if held is not None:
                found[kind, name] = held
        return found

    def nodes(self) -> Nodes:
        """Every node, by name; the same tuple until one changes in what a view holds."""
        now, (seen, held) = self.cache.changes(NODES.plural), self._views.all_nodes
        if seen != now:
            nodes = Nodes(map(self._node, self.cache.all(NODES.plural)))
            held = held if held == nodes else nodes
            self._views.all_nodes = (now, held)
        return held

    def _nodes_of(self, pods: Iterable[PodView]) -> tuple[NodeView, ...]:
        """The nodes that carry some pods, by name."""
        names = sorted({pod.node for pod in pods if pod.node is not None})
        found = (self.cache.get(NODES.plural, "", name) for name in names)
        return tuple(self._node(body) for body in found if body is not None)

    def device_use(self) -> Mapping[str, Mapping[str, float]]:
        """AMD devices asked for on each node, by our pods and by those of others."""
        changed = self.cache.changed_since(PODS.plural, self._counted)
        if changed is None:
            self._tally = DeviceTally()
            for view in (*self._foreign, *map(self._pod, self.cache.all(PODS.plural))):
                self._tally.put(view.uid, view)
        for uid in changed or ():
            body = self.cache.by_uid(PODS.plural, uid)
            self._tally.put(uid, None if body is None else self._pod(body))
        self._counted = self.cache.changes(PODS.plural)
        return self._tally.use

    def _pod(self, body: Json) -> PodView:
        uid, now = body["metadata"]["uid"], version(body)
        held = self._views.pods.get(uid)
        if held is None or held[0] != now:
            held = self._views.pods[uid] = (now, pod_view(body))
        return held[1]

    def _node(self, body: Json) -> NodeView:
        uid, now = body["metadata"]["uid"], version(body)
        held = self._views.nodes.get(uid)
        if held is None or held[0] != now:
            held = self._views.nodes[uid] = (now, node_view(body))
        return held[1]
