"""Balloons: pods of a replica's shape that do nothing but hold its place on a warm node.

Their priority is below every replica's. A replica without room takes a balloon's place at once, the
new balloon finds none, and the node autoscaler brings a node for it: the fleet grows into a node
that is there, with the image on it, while the next one comes. Does not know the fleet's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tilefleet_operator.actions import Apply, Delete
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.desired import Defaults, child_labels, child_metadata, pod, protection
from tilefleet_operator.observed import (
    LABEL_DEPLOYMENT,
    LABEL_REVISION,
    LABEL_ROLE,
    ROLE_BALLOON,
    PodView,
    Snapshot,
)
from tilefleet_operator.options import Placement
from tilefleet_operator.placement import Fit

# A balloon that ends at once, for example on a node under pressure, is not made anew faster.
BACKOFF_SECONDS = 30.0


def balloons(
    snapshot: Snapshot, revision: str, fit: Fit | None, defaults: Defaults, now: float
) -> Iterator[Apply | Delete]:
    """Bring the number of balloons to what the spec wants, all of them of the revision's shape.

    fit: judgement of the AMD nodes, None on vendor cpu; balloons hold places of the first choice.
    """
    deployment = snapshot.deployment
    wanted = deployment.spec.capacity.balloon.replicas
    held = sorted(_own(snapshot, deployment), key=lambda one: (one.created, one.name))
    kept = [one for one in held if _may_stay(one, revision, now)][:wanted]
    for one in held:
        if one not in kept:
            why = f"{wanted} balloons are wanted, running and of revision {revision}"
            yield Delete(one.name, one.namespace, one.uid, why)
    names = {one.name for one in snapshot.pods}
    free = (n for n in itertools.count() if balloon_name(deployment, n, revision) not in names)
    place = None if fit is None else Placement(fit.options[0])
    for slot in itertools.islice(free, wanted - len(kept)):
        body = balloon(deployment, slot, revision, defaults, place)
        yield Apply(body, f"{len(kept)} of {wanted} balloons exist")


def balloon_name(deployment: InferenceDeployment, slot: int, revision: str) -> str:
    """Name of a balloon; at most 63 characters."""
    return f"{deployment.name}-{revision}-b{slot}"


def balloon(
    deployment: InferenceDeployment,
    slot: int,
    revision: str,
    defaults: Defaults,
    placement: Placement | None,
) -> dict[str, Any]:
    """A pod of a replica's shape and image that sleeps: with it the image is on the node, too."""
    spec = pod(deployment, slot, revision, defaults, placement=placement)["spec"]
    worker = spec["containers"][0]
    kept = ("image", "imagePullPolicy", "resources", "securityContext")
    sleep = {"name": "balloon", "command": ["python3", "-c", "import signal; signal.pause()"]}
    spec["containers"] = [{**sleep, **{key: worker[key] for key in kept if key in worker}}]
    spec |= {"priorityClassName": defaults.balloon_priority_class, "volumes": []}
    # As the first process of its container it would not hear SIGTERM.
    spec["terminationGracePeriodSeconds"] = 0
    labels = child_labels(deployment) | {
        LABEL_DEPLOYMENT: deployment.name,
        LABEL_ROLE: ROLE_BALLOON,
        LABEL_REVISION: revision,
        "app.kubernetes.io/name": "tilefleet-balloon",
    }
    name = balloon_name(deployment, slot, revision)
    metadata = child_metadata(deployment, name, labels, protection(protected=False))
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _own(snapshot: Snapshot, deployment: InferenceDeployment) -> Iterator[PodView]:
    for one in snapshot.pods:
        mine = one.namespace == deployment.namespace and one.owner_uid == deployment.uid
        named = one.labels.get(LABEL_DEPLOYMENT) == deployment.name
        if mine and named and one.labels.get(LABEL_ROLE) == ROLE_BALLOON and not one.terminating:
            yield one


def _may_stay(one: PodView, revision: str, now: float) -> bool:
    ended = one.finished and now >= one.created + BACKOFF_SECONDS
    return one.revision == revision and not ended
