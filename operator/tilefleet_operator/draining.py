"""How a replica leaves: out of the Service, told to finish, deleted when empty or overdue.

The beginning stands in an annotation, written together with the label that takes the pod out of the
Service, so that a new leader continues where the old one stopped. Does not know which pod leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tilefleet_operator.actions import Action, Delete, Drain
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.moves import Removal
from tilefleet_operator.observed import (
    ANNOTATION_DRAIN_STARTED,
    DRAINING,
    LABEL_STATE,
    PodView,
    Snapshot,
    WorkerStats,
)
from tilefleet_operator.units import rfc3339, seconds

# An answer must be this much younger than the order to drain before it proves anything.
DRAIN_PROOF_SECONDS = 3.0
# The clocks of two operators may differ this much; beyond it one of them was set back.
CLOCK_SECONDS = 5.0


def leave(
    deployment: InferenceDeployment, removals: Sequence[Removal], now: float
) -> Iterator[Action]:
    """The first action for each pod that leaves: drain what serves, delete the rest."""
    for removal in removals:
        pod = removal.pod
        if removal.drain:
            yield _drain(deployment, pod, now, removal.why)
        else:
            yield Delete(pod.name, pod.namespace, pod.uid, removal.why)


def order(pod: PodView, started: float) -> dict[str, Any]:
    """What is applied to a pod that drains; the UID keeps another pod of that name safe."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": pod.uid,
            "labels": {LABEL_STATE: DRAINING},
            "annotations": {ANNOTATION_DRAIN_STARTED: rfc3339(started)},
        },
    }


def _drain(deployment: InferenceDeployment, pod: PodView, started: float, why: str) -> Drain:
    timeout = seconds(deployment.spec.rollout.drain.timeout)
    body = order(pod, started)
    return Drain(pod.name, pod.namespace, pod.uid, pod.ip, body, timeout, why)


def finish(snapshot: Snapshot, pods: Fleet, now: float) -> Iterator[Action]:
    """Delete what is drained or overdue; repeat the order where the worker has not heard it."""
    deployment = snapshot.deployment
    timeout = seconds(deployment.spec.rollout.drain.timeout)
    for pod in pods.draining:
        stats = snapshot.stats.get(pod.uid)
        started = pod.drain_started
        if started is None:
            yield _drain(deployment, pod, now, "it drains, but nothing says since when")
        elif started > now + CLOCK_SECONDS:
            yield _drain(
                deployment, pod, now, "its drain began in the future: a clock was set back"
            )
        elif now >= started + timeout:
            why = f"its requests did not end within drain.timeout {timeout:g} s"
            yield Delete(pod.name, pod.namespace, pod.uid, why)
        elif pod.node is None or pod.ip is None:
            yield Delete(pod.name, pod.namespace, pod.uid, "it never ran, nothing to drain")
        elif isinstance(stats, WorkerStats) and (
            now - stats.age_seconds >= started + DRAIN_PROOF_SECONDS
        ):
            if not stats.draining:
                yield _drain(deployment, pod, started, "its worker has not heard of the drain")
            elif stats.inflight == 0:
                yield Delete(pod.name, pod.namespace, pod.uid, "drained: no request is left")
