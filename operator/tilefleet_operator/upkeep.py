"""Children against what is wanted: what to apply, what to delete, and whose name is taken.

A child is ours when its controller is this very object, by UID. One without a controller is taken
over only when its annotation tilefleet.io/adopt names the fleet. Fields and list items that the
operator does not name belong to others and are left alone. Does not know how a child is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tilefleet_operator.actions import Apply, Delete
from tilefleet_operator.api import GROUP, InferenceDeployment
from tilefleet_operator.observed import Snapshot, owner_uid

ANNOTATION_ADOPT = f"{GROUP}/adopt"
# Lists whose items Kubernetes merges by these keys; every other list belongs to one manager whole.
_MERGED_LISTS: Mapping[str, tuple[str, ...]] = {
    "metadata.ownerReferences": ("uid",),
    "Service.spec.ports": ("port", "protocol"),
}

Json = Mapping[str, Any]


def upkeep(
    snapshot: Snapshot, wanted: Sequence[Json], names: Mapping[str, str]
) -> Iterator[Apply | Delete]:
    """Actions that bring the children to what is wanted. names: kind → name of what may exist."""
    deployment = snapshot.deployment
    for body in wanted:
        kind = body["kind"]
        seen = snapshot.children.get((kind, names[kind]))
        if seen is None:
            yield Apply(body, f"the {kind} does not exist")
        elif is_claimable(seen, deployment.uid, deployment.name) and not covers(seen, body):
            yield Apply(body, f"the {kind} differs from what is wanted")
    for kind in names.keys() - {body["kind"] for body in wanted}:
        seen = snapshot.children.get((kind, names[kind]))
        if seen is None or owner_uid(seen["metadata"]) != deployment.uid:
            continue
        uid = seen["metadata"]["uid"]
        yield Delete(names[kind], deployment.namespace, uid, f"no {kind} is wanted", kind)


def conflicts(snapshot: Snapshot, wanted: Sequence[Json]) -> dict[str, str]:
    """Kind → what is wrong and the remedy, for each wanted child whose name is somebody else's."""
    deployment = snapshot.deployment
    found = {}
    for body in wanted:
        kind, name = body["kind"], body["metadata"]["name"]
        seen = snapshot.children.get((kind, name))
        if seen is not None and not is_claimable(seen, deployment.uid, deployment.name):
            found[kind] = f"{kind} {name} {remedy(seen, deployment)}"
    return found


def remedy(seen: Json, deployment: InferenceDeployment) -> str:
    """What to do about an object that holds a child's name and is not ours."""
    rename = "or give the InferenceDeployment another name"
    if owner_uid(seen.get("metadata") or {}):
        return f"exists and belongs to another controller; delete it, {rename}"
    hand_over = f"hand it over with the annotation {ANNOTATION_ADOPT}={deployment.name}"
    return f"exists and belongs to somebody else; delete it, {hand_over}, {rename}"


def is_claimable(seen: Json, uid: str, name: str) -> bool:
    """Whether the InferenceDeployment of this UID and name may write the object."""
    metadata = seen.get("metadata") or {}
    owner = owner_uid(metadata)
    offered = (metadata.get("annotations") or {}).get(ANNOTATION_ADOPT) == name
    return owner == uid or (not owner and offered)


def covers(seen: Json, wanted: Json) -> bool:
    """True when a child holds everything that `wanted` names."""
    return _covers(seen, wanted, "", str(wanted.get("kind", "")))


def _covers(seen: object, wanted: object, path: str, kind: str) -> bool:
    # Both come from JSON or from our builders; a dict is told far faster than a Mapping.
    if isinstance(wanted, dict):
        return isinstance(seen, dict) and all(
            key in seen and _covers(seen[key], value, f"{path}.{key}".lstrip("."), kind)
            for key, value in wanted.items()
        )
    if not isinstance(wanted, list):
        return seen == wanted
    if not isinstance(seen, list):
        return False
    keys = _MERGED_LISTS.get(path) or _MERGED_LISTS.get(f"{kind}.{path}")
    if keys is None:
        pairs = zip(seen, wanted, strict=False)
        return len(seen) == len(wanted) and all(_covers(a, b, f"{path}[]", kind) for a, b in pairs)
    held = {tuple(item.get(key) for key in keys): item for item in seen}
    found = ((held.get(tuple(item.get(key) for key in keys)), item) for item in wanted)
    return all(_covers(item, ours, f"{path}[]", kind) for item, ours in found)
