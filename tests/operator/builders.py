"""Builders of observed objects for the tests of the pure half, and Hypothesis strategies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tilefleet_operator import children as builders
from tilefleet_operator import history as records
from tilefleet_operator.actions import Apply
from tilefleet_operator.api import API_VERSION, KIND, InferenceDeployment, parse
from tilefleet_operator.desired import Defaults
from tilefleet_operator.observed import (
    Counters,
    Gauges,
    History,
    MissingStats,
    NodeView,
    PodView,
    Snapshot,
    Step,
    WorkerStats,
    node_view,
)

NOW = 1_800_000_000.0
UID = "cr-uid"
DEFAULTS = Defaults(worker_image="rocm:1", worker_cpu_image="cpu:1")


AMD_NODES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "amd_nodes.json").read_text()
)


def node_object(kind: str, name: str = "") -> dict[str, Any]:
    """A Node of data/amd_nodes.json, with the hostname label that every kubelet sets."""
    body: dict[str, Any] = json.loads(json.dumps(AMD_NODES[kind]))
    metadata = body["metadata"]
    metadata["name"] = name or metadata["name"]
    metadata["labels"]["kubernetes.io/hostname"] = metadata["name"]
    return body


def node(kind: str, name: str = "") -> NodeView:
    """The view of node_object()."""
    return node_view(node_object(kind, name))


class Clock:
    """Time that moves only when it is told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def document(name: str = "llm", **spec: Any) -> dict[str, Any]:
    """An InferenceDeployment object; spec is merged over the least valid one, vendor cpu."""
    base: dict[str, Any] = {
        "model": {"uri": "file:///models/tiny"},
        "accelerator": {"vendor": "cpu"},
    }
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": "team", "uid": UID, "generation": 1},
        "spec": base | spec,
    }


def deployment(status: dict[str, Any] | None = None, **spec: Any) -> InferenceDeployment:
    """A parsed deployment, vendor cpu unless given."""
    return parse(document(**spec) | {"status": status or {}})


def manual(replicas: int, **spec: Any) -> InferenceDeployment:
    """A deployment of a fixed size."""
    return deployment(replicas=replicas, autoscaling={"mode": "Manual"}, **spec)


def amd(replicas: int, count: int = 8, **spec: Any) -> InferenceDeployment:
    """A fleet of MI300X replicas of a fixed size."""
    accelerator = {"vendor": "amd", "products": ["MI300X"], "count": count}
    return manual(replicas, accelerator=accelerator, **spec)


def pod(name: str, revision: str, **changes: Any) -> PodView:
    """A ready replica of the deployment `llm` unless changed."""
    state = changes.get("state", "active")
    view = PodView(
        name=name,
        uid=f"uid-{name}",
        namespace="team",
        labels={
            "tilefleet.io/deployment": "llm",
            "tilefleet.io/role": "worker",
            "tilefleet.io/state": state,
            "tilefleet.io/revision": revision,
        },
        phase="Running",
        ready=True,
        ip="192.0.2.1",
        node="n1",
        created=NOW - 600,
        revision=revision,
        owner_uid=UID,
    )
    return replace(view, **changes)


def stats(**changes: Any) -> WorkerStats:
    """An answer of a worker; keyword arguments go to the counters, gauges or the answer itself.

    `steps` is the answer's reservoir, not the counter of the same name.
    """
    names = Counters.__dataclass_fields__.keys() - {"steps"}
    counters = {k: v for k, v in changes.items() if k in names}
    gauges = {k: v for k, v in changes.items() if k in Gauges.__dataclass_fields__}
    rest = {k: v for k, v in changes.items() if k not in counters and k not in gauges}
    gauges.setdefault("max_concurrent", 256)
    gauges.setdefault("kv_blocks_total", 25_000)
    rest.setdefault("uptime_seconds", 10_000.0)
    return WorkerStats(
        counters=Counters(**counters), gauges=Gauges(**gauges), block_size=16, ready=True, **rest
    )


def steps_of(a: float, b: float, c: float, d: float, count: int = 64) -> tuple[Step, ...]:
    """Steps whose duration is exactly a + b p + c N + d K, over a spread of batches."""
    result = []
    for i in range(count):
        prefill, sequences, kv = (i * 37) % 512, 1 + (i * 11) % 200, 1000 + (i * 7919) % 90_000
        seconds = a + b * prefill + c * sequences + d * kv
        result.append(Step(seconds, prefill, sequences, kv))
    return tuple(result)


@st.composite
def pods(draw: st.DrawFn, revisions: tuple[str, ...]) -> tuple[PodView, ...]:
    """A fleet in any state a cluster can show: revisions, phases, draining, dying, foreign."""
    found = []
    for slot in range(draw(st.integers(0, 6))):
        revision = draw(st.sampled_from(revisions))
        view = pod(f"llm-{revision}-{slot}", revision)
        kind = draw(st.sampled_from(["ready", "ready", "starting", "failed", "draining", "dying"]))
        if kind == "starting":
            view = replace(view, ready=False, phase="Pending", node=None, ip=None, created=NOW)
        elif kind == "failed":
            view = replace(view, ready=False, phase="Failed", reason="Evicted")
        elif kind == "draining":
            labels = {**view.labels, "tilefleet.io/state": "draining"}
            view = replace(view, labels=labels, state="draining", drain_started=NOW - 1)
        elif kind == "dying":
            view = replace(view, ready=False, terminating=True)
        if draw(st.integers(0, 9)) == 0:
            view = replace(view, owner_uid="somebody-else")
        found.append(replace(view, created=view.created + draw(st.integers(-50, 0))))
    return tuple(found)


def snapshot(
    of: InferenceDeployment,
    pods: tuple[PodView, ...] = (),
    answers: dict[str, WorkerStats | MissingStats] | None = None,
    **changes: Any,
) -> Snapshot:
    """A snapshot without nodes or children unless given."""
    return Snapshot(deployment=of, pods=pods, stats=answers or {}, **changes)


def record(of: InferenceDeployment, number: int = 1) -> dict[str, Any]:
    """The written record of the deployment's revision, as its only one."""
    wanted, _ = records.current(of, (), DEFAULTS)
    (action,) = records.record(of, wanted, (), ())
    assert isinstance(action, Apply)
    metadata = {**action.body["metadata"], "uid": f"uid-record-{action.name}"}
    return {**action.body, "metadata": metadata, "revision": number}


def children(
    of: InferenceDeployment, size: int | None = None, monitors_served: bool = False
) -> dict[tuple[str, str], dict[str, Any]]:
    """Every child but the pods, as it ought to be; size: replicas, spec.replicas if not given."""
    wanted = of.spec.replicas if size is None else size
    bodies = builders.children(of, wanted, DEFAULTS, monitors_served)
    for body in bodies:
        body["metadata"]["uid"] = f"uid-{body['kind']}"
    return {(body["kind"], body["metadata"]["name"]): body for body in [*bodies, record(of)]}


def history(*frames: tuple[float, dict[str, WorkerStats]]) -> History:
    """A history of polls, (seconds after NOW, answers) each."""
    result = History()
    for offset, answers in frames:
        result = result.add(NOW + offset, answers)
    return result
