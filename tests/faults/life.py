"""One life of a fleet: create, scale up, roll, scale down, delete; each stage judged.

The judge knows nothing of the faults. It holds the fleet to what the undisturbed life showed: the
same state at the end of each stage, the same number of pods ever made, no more pods than allowed
and no fewer ready ones at any instant.
"""

import asyncio
import difflib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.faults.view import FLEETS, Admin, ClusterView, Json
from tests.operator.apiserver import fleet

STAGES = ("create", "scale up", "roll", "scale down", "delete")
FLEET = "fleet"
SIZES = {"create": 2, "scale up": 3, "roll": 3, "scale down": 2, "delete": 0}
FLOORS = {"create": 0, "scale up": 2, "roll": 3, "scale down": 2, "delete": 0}
"""Ready replicas that a stage must keep at every instant: maxUnavailable is 0."""
CEILINGS = {"create": 2, "scale up": 3, "roll": 4, "scale down": 3, "delete": 2}
"""Active replicas that a stage may have: maxSurge is 1."""
STEADY_SECONDS = 1.0
"""How long a state must stay after a fault to count as reached."""
OTHERS = (
    "/apis/policy/v1/{}/poddisruptionbudgets",
    "/apis/networking.k8s.io/v1/{}/networkpolicies",
    "/api/v1/{}/serviceaccounts",
    "/api/v1/{}/configmaps",
    "/apis/apps/v1/{}/controllerrevisions",
)
# Identities, instants, places, and the figures measured at the instant of a decision.
_DROPPED = frozenset(
    {
        "uid", "resourceVersion", "creationTimestamp", "managedFields", "clusterIP", "clusterIPs",
        "lastTransitionTime", "time", "sampledAt", "nodeName", "podIP", "podIPs", "generation",
        "disruptedPods", "startTime", "tilefleet.io/drain-started", "inputs",
        "capacity", "utilization", "demand",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """What an undisturbed life showed. Each maps a stage to its value."""

    states: dict[str, str] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    writes: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One broken promise."""

    kind: str
    """One of results.KINDS."""
    text: str


class Life:
    """One namespace with one fleet."""

    def __init__(self, admin: Admin, view: ClusterView, namespace: str, golden: Golden) -> None:
        self.admin, self.view, self.namespace, self.golden = admin, view, namespace, golden
        self.stage = ""
        self.problems: list[Problem] = []
        self.looks = 0
        """Instants at which ready and active pods were counted."""
        self.created: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._names: Counter[str] = Counter()
        view.listeners.append(self._observe)

    async def born(self) -> None:
        """Make the namespace."""
        await self.admin.send("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})

    async def begin(self, stage: str) -> None:
        """Change the spec as this stage does."""
        self.stage = stage
        path = f"{FLEETS}/namespaces/{self.namespace}/inferencedeployments"
        if stage == "create":
            rollout = {"maxSurge": 1, "maxUnavailable": 0, "drain": {"timeout": "120s"}}
            body = fleet(FLEET, replicas=SIZES[stage], rollout=rollout)
            await self.admin.send("POST", path, body)
        elif stage == "delete":
            await self.admin.send("DELETE", f"{path}/{FLEET}", {"propagationPolicy": "Background"})
        else:
            spec: Json = {"replicas": SIZES[stage]}
            if stage == "roll":
                spec["engine"] = {"image": "worker:2"}
            await self.admin.send("PATCH", f"{path}/{FLEET}", {"spec": spec})

    async def settle(self, stage: str) -> str:
        """Wait for the end of a stage in an undisturbed life; returns the state."""
        before, since = "", time.monotonic()
        while True:
            await asyncio.sleep(0.2)
            finished = self._finished(stage)
            now = await self.state(stage)
            if now != before or not finished:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > 3.0:
                return now

    async def arrived(self, stage: str, steady: float = 0.0) -> None:
        """Until the state is that of the undisturbed life, and has been so for ``steady``."""
        since = None
        while True:
            await asyncio.sleep(0.1 if since is None else max(0.1, steady / 2))
            now = time.monotonic()
            if not self._finished(stage) or await self.state(stage) != self.golden.states[stage]:
                since = None
            elif now - (since := since or now) >= steady:
                return

    async def reach(self, stage: str, limit: float, steady: float = 0.0) -> None:
        """Judge the end of a stage: the state, and the pods made."""
        try:
            await asyncio.wait_for(self.arrived(stage, steady), limit)
        except TimeoutError:
            difference = _difference(self.golden.states[stage], await self.state(stage))
            self._broken("state", f"not as undisturbed: {difference}")
        else:
            self._count(stage)

    async def state(self, stage: str) -> str:
        """Everything of this namespace, without names of instants and places."""
        found: Json = {plural: self.view.of(plural, self.namespace) for plural in self.view.objects}
        for path in OTHERS:
            listed = await self.admin.send("GET", path.format(f"namespaces/{self.namespace}"))
            owned = [one for one in listed["items"] if one["metadata"].get("ownerReferences")]
            found[path] = sorted(owned, key=lambda one: str(one["metadata"]["name"]))
        text = json.dumps(_plain(found), indent=1, sort_keys=True)
        text = text.replace(self.namespace, "NAMESPACE")
        # Which of two equal replicas left depends on the second in which each was created.
        return _renumbered(text) if stage == "scale down" else text

    def _finished(self, stage: str) -> bool:
        """Cheap first look: the counts are right and the fleet says so."""
        pods = self.view.of("pods", self.namespace)
        fleets = self.view.of("inferencedeployments", self.namespace)
        if stage == "delete":
            return not pods and not fleets and not self.view.of("services", self.namespace)
        if len(pods) != SIZES[stage] or not fleets:
            return False
        status, metadata = fleets[0].get("status") or {}, fleets[0]["metadata"]
        conditions = {c["type"]: c["status"] for c in status.get("conditions") or []}
        return (
            status.get("observedGeneration") == metadata["generation"]
            and status.get("readyReplicas") == SIZES[stage]
            and status.get("updatedReplicas") == SIZES[stage]
            and conditions.get("Ready") == "True"
            and conditions.get("Progressing") == "False"
        )

    def _count(self, stage: str) -> None:
        wanted = self.golden.created.get(stage)
        if wanted is not None and self.created[stage] != wanted:
            self._broken("made", f"{self.created[stage]} pods were created, undisturbed {wanted}")

    def _observe(self, plural: str, kind: str, body: Json) -> None:
        metadata = body["metadata"]
        if plural != "pods" or metadata["namespace"] != self.namespace:
            return
        if metadata["uid"] not in self._seen:
            self._seen.add(metadata["uid"])
            self.created[self.stage] += 1
            self._names[metadata["name"]] += 1
            if self._names[metadata["name"]] > 1:
                self._broken("twice", f"the pod {metadata['name']} was made twice")
        pods = [pod for pod in self.view.of("pods", self.namespace) if _active(pod)]
        ready = sum(map(_ready, pods))
        self.looks += 1
        if ready < FLOORS[self.stage]:
            self._broken("down", f"{ready} ready, at least {FLOORS[self.stage]}")
        if len(pods) > CEILINGS[self.stage]:
            self._broken("surplus", f"{len(pods)} pods, at most {CEILINGS[self.stage]}")

    def _broken(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, f"{self.stage}: {text}"))

    def over(self) -> None:
        """Look no more."""
        self.view.listeners.remove(self._observe)


def _active(pod: Json) -> bool:
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    return labels.get("tilefleet.io/state") == "active" and "deletionTimestamp" not in metadata


def _ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        # Whether replicas were asked lately depends on when the last one drained.
        if value.get("type") == "MetricsAvailable":
            return {"type": "MetricsAvailable"}
        return {key: _plain(one) for key, one in value.items() if key not in _DROPPED}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _renumbered(text: str) -> str:
    """Slot numbers replaced by their ranks."""
    names = sorted(set(re.findall(rf"{FLEET}-[0-9a-f]+-\d+", text)))
    for rank, name in enumerate(names):
        slot = name.rpartition("-")[2]
        text = text.replace(name, f"{FLEET}-RANK-{rank}")
        text = text.replace(f'"tilefleet.io/slot": "{slot}"', '"tilefleet.io/slot": "RANK"')
    return text


def _difference(wanted: str, now: str) -> str:
    lines = difflib.unified_diff(wanted.splitlines(), now.splitlines(), "undisturbed", "now", n=1)
    return "\n".join(list(lines)[:60]) or "nothing differs, but the fleet was not finished"
