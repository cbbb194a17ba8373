"""Revisions: which one a spec is, the record of each, and the way back to one.

A record is a ControllerRevision (apps/v1) with the part of the spec that changes a pod and the
image that was used. A spec is a recorded revision when both render the same pod, whatever version
of the operator looks: so a new operator, or a new default image of it, restarts no replica. The
new default image comes with the next change of the spec. Does not know which pods exist.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from tilefleet_operator import desired
from tilefleet_operator.actions import Apply, Delete
from tilefleet_operator.api import InferenceDeployment, Spec
from tilefleet_operator.desired import Defaults
from tilefleet_operator.errors import RevisionNotFound
from tilefleet_operator.observed import LABEL_REVISION, owner_uid

REVISION_KIND = "ControllerRevision"
# Paths in the spec that a pod is made from; tests/operator/test_history.py proves it for each
# field of the spec.
TEMPLATE_PATHS = (("model",), ("engine",), ("accelerator",), ("rollout", "drain"))


@dataclass(frozen=True)
class Revision:
    """One recorded revision.

    name: eight hex digits, as in pod names. number: order in time, newest highest. spec: the
    recorded part of the spec. image: that its pods run. created: RFC 3339. uid: of the record,
    empty while it is not written.
    """

    name: str
    number: int
    spec: Mapping[str, Any]
    image: str
    created: str = ""
    uid: str = ""


@dataclass(frozen=True)
class Former:
    """A deployment as it was in a revision, and the defaults that its pods run with."""

    revision: str
    deployment: InferenceDeployment
    defaults: Defaults


def revisions(
    children: Mapping[tuple[str, str], Mapping[str, Any]], uid: str
) -> tuple[Revision, ...]:
    """The records of the deployment with this UID, oldest first; others are passed over."""
    found = [
        _revision(body)
        for (kind, _), body in children.items()
        if kind == REVISION_KIND and owner_uid(body.get("metadata") or {}) == uid
    ]
    return tuple(sorted(found, key=lambda one: (one.number, one.name)))


def _revision(body: Mapping[str, Any]) -> Revision:
    metadata, data = body["metadata"], body.get("data") or {}
    return Revision(
        name=(metadata.get("labels") or {}).get(LABEL_REVISION, ""),
        number=int(body.get("revision") or 0),
        spec=data.get("spec") or {},
        image=str(data.get("image") or ""),
        created=str(metadata.get("creationTimestamp") or ""),
        uid=str(metadata.get("uid") or ""),
    )


def template(spec: Spec) -> dict[str, Any]:
    """The part of a spec that its pods are made from, with defaults filled in."""
    whole = spec.model_dump(mode="json", by_alias=True)
    part: dict[str, Any] = {}
    for path in TEMPLATE_PATHS:
        source, target = whole, part
        for key in path[:-1]:
            source, target = source[key], target.setdefault(key, {})
        target[path[-1]] = source[path[-1]]
    return part


def current(
    deployment: InferenceDeployment, known: tuple[Revision, ...], defaults: Defaults
) -> tuple[Revision, Defaults]:
    """The revision that the spec asks for, recorded or new, and the defaults its pods run with."""
    wanted = template(deployment.spec)
    # Equal specs need no rendering: this is every plan but the first after a change.
    for one in reversed(known):
        if one.spec == wanted:
            return one, _pinned(defaults, one)
    for one in reversed(known):
        if _renders_alike(deployment, one, defaults):
            return one, _pinned(defaults, one)
    name = desired.revision(deployment, defaults)
    image = desired.image(deployment, defaults)
    number = max((one.number for one in known), default=0) + 1
    return Revision(name, number, wanted, image), defaults


def _pinned(defaults: Defaults, one: Revision) -> Defaults:
    return replace(defaults, worker_image=one.image, worker_cpu_image=one.image)


def _renders_alike(deployment: InferenceDeployment, one: Revision, defaults: Defaults) -> bool:
    try:
        spec = Spec.model_validate({**one.spec})
    except ValidationError:
        return False  # recorded by another version, whose spec had other fields
    # An image that the spec named and names no more gives way to the operator's default.
    pinned = defaults if spec.engine.image else _pinned(defaults, one)
    before = replace(deployment, spec=spec)
    return desired.revision(before, pinned) == desired.revision(deployment, pinned)


def former(
    deployment: InferenceDeployment, known: tuple[Revision, ...], name: str, defaults: Defaults
) -> Former | None:
    """The deployment as it was in a recorded revision.

    None when there is no such record, or this version cannot read it.
    """
    one = next((one for one in known if one.name == name), None)
    if one is None:
        return None
    try:
        spec = Spec.model_validate({**one.spec})
    except ValidationError:
        return None
    return Former(name, replace(deployment, spec=spec), _pinned(defaults, one))


def record(
    deployment: InferenceDeployment,
    wanted: Revision,
    known: tuple[Revision, ...],
    in_use: Collection[str],
) -> Iterator[Apply | Delete]:
    """Write the wanted revision's record as the newest, delete those above the limit.

    in_use: names of revisions whose records stay whatever their age.
    """
    newest = known[-1] if known else None
    if newest is None or newest.name != wanted.name:
        number = newest.number + 1 if newest else 1
        why = f"revision {wanted.name} is wanted from now on, as number {number}"
        if wanted.uid:
            why = f"revision {wanted.name} is wanted again, as number {number}"
        yield Apply(_body(deployment, wanted, number), why)
    limit = deployment.spec.rollout.revision_history_limit
    spare = [one for one in known if one.name not in in_use and one.name != wanted.name]
    for one in spare[: max(0, len(spare) - limit)]:
        name = _record_name(deployment, one)
        why = f"more than rollout.revisionHistoryLimit {limit} earlier revisions are recorded"
        yield Delete(name, deployment.namespace, one.uid, why, kind=REVISION_KIND)


def _record_name(deployment: InferenceDeployment, one: Revision) -> str:
    return f"{deployment.name}-{one.name}"


def _body(deployment: InferenceDeployment, one: Revision, number: int) -> dict[str, Any]:
    """The record as an object. Kubernetes never lets its data change, but its number."""
    labels = desired.child_labels(deployment) | {LABEL_REVISION: one.name}
    return {
        "apiVersion": "apps/v1",
        "kind": REVISION_KIND,
        "metadata": desired.child_metadata(deployment, _record_name(deployment, one), labels, {}),
        "data": {"spec": dict(one.spec), "image": one.image},
        "revision": number,
    }


def recorded(known: tuple[Revision, ...], number: int = 0) -> Revision:
    """The revision of a number; of 0 the one before the newest. Raises RevisionNotFound."""
    if number:
        chosen = next((one for one in known if one.number == number), None)
    else:
        chosen = known[-2] if len(known) > 1 else None
    if chosen is None:
        have = ", ".join(str(one.number) for one in known) or "none"
        what = f"revision {number} is not recorded" if number else "there is no earlier revision"
        raise RevisionNotFound(f"{what}; recorded: {have}")
    return chosen


def undo(known: tuple[Revision, ...], number: int = 0) -> list[dict[str, Any]]:
    """The JSON patch (RFC 6902) of an InferenceDeployment that brings a recorded revision back.

    number: of the revision; 0 means the one before the newest. The operator never applies it:
    the spec is its user's. Raises RevisionNotFound, which names those that are recorded.
    """
    chosen = recorded(known, number)
    operations = []
    for path in TEMPLATE_PATHS:
        value: Any = chosen.spec
        for key in path:
            value = value[key]
        operations.append({"op": "add", "path": "/spec/" + "/".join(path), "value": value})
    return operations
