"""What the watches have shown: the newest version of each object, by UID.

It owns two promises. A late event never brings an old state back, because versions only rise and
the dead stay dead. And ``unmet`` says whether the view is older than the operator's own last write
of a key. It does not know HTTP, kopf, or what any object means beyond its metadata.

Source: ConsistencyStore of Kubernetes 1.36 (expected versions), KEP-5504 (versions compare).
"""

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import PLURAL
from tilefleet_operator.observed import LABEL_DEPLOYMENT

Json = dict[str, Any]
Key = tuple[str, str]

EXPECTATION_SECONDS = 5.0
_TOMBSTONES = 20_000
_LOGGED = 4_096  # changes of one resource that can be told from one another


@dataclass(slots=True)
class _Expected:
    """Own writes of one key that the watch has not shown yet."""

    deadline: float
    versions: dict[tuple[str, str], int] = field(default_factory=dict)


class ObjectCache:
    """Objects of several resources; ``plural`` names the resource everywhere."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._objects: dict[tuple[str, str], Json] = {}
        self._kinds: dict[str, dict[str, Json]] = {}
        self._uids: dict[tuple[str, str, str], str] = {}
        self._children: dict[tuple[str, Key], set[str]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        self._expected: dict[Key, _Expected] = {}
        self._seen: dict[str, float] = {}
        self._changes: dict[str, int] = {}
        self._log: dict[str, deque[str]] = {}

    def observe(self, plural: str, event: str | None, body: Mapping[str, Any]) -> bool:
        """Take one watch event (ADDED, MODIFIED, DELETED) or a listed object (None).

        Returns whether the view changed; old versions and dead objects are ignored. ``body`` is
        not kept but copied without its managed fields.
        """
        self._seen[plural] = self.clock()
        uid = body["metadata"]["uid"]
        if event == "DELETED":
            return self._bury(plural, uid, version(body))
        held = self._objects.get((plural, uid))
        if held is not None and version(held) >= version(body):
            return False
        # Only a version above its end brings an object back: it left our label selector, not life.
        if self._gone.get(uid, -1) >= version(body):
            return False
        self._gone.pop(uid, None)
        return self._put(plural, uid, body)

    def replace(
        self,
        plural: str,
        items: Iterable[Mapping[str, Any]],
        list_version: str,
        *,
        key: Key | None = None,
        labelled: bool = False,
    ) -> bool:
        """Take a whole list and bury what it lacks, unless that is newer than the list.

        key: the list holds only the children of this key. labelled: it holds only children, of any
        key. Returns whether the view changed.
        """
        changed = False
        listed = set()
        for item in items:
            listed.add(item["metadata"]["uid"])
            changed |= self.observe(plural, None, item)
        self._seen[plural] = self.clock()
        for uid in self._scope(plural, key, labelled) - listed:
            if version(self._objects[plural, uid]) <= int(list_version):
                changed |= self._bury(plural, uid, int(list_version))
        return changed

    def bury(self, plural: str, uid: str) -> bool:
        """Take note that the API server knows no object of this UID."""
        held = self._objects.get((plural, uid))
        return self._bury(plural, uid, 0 if held is None else version(held))

    def get(self, plural: str, namespace: str, name: str) -> Json | None:
        """The object that holds this name now; namespace is "" for cluster-wide ones."""
        uid = self._uids.get((plural, namespace, name))
        return None if uid is None else self._objects[plural, uid]

    def children(self, plural: str, key: Key) -> list[Json]:
        """Objects that carry the label of ``key``, by name."""
        uids = self._children.get((plural, key), ())
        return sorted((self._objects[plural, uid] for uid in uids), key=_name)

    def all(self, plural: str) -> list[Json]:
        """Every object of a resource, by namespace and name."""
        return sorted(self._kinds.get(plural, {}).values(), key=_name)

    def deployment_keys(self) -> set[Key]:
        """Keys of all deployments, and of children whose deployment is unknown."""
        named = {(ns, name) for plural, ns, name in self._uids if plural == PLURAL}
        return named | {key for _, key in self._children}

    def expect(self, key: Key, plural: str, uid: str, resource_version: str | None) -> None:
        """Remember an own write: no plan for ``key`` until the watch has shown it.

        resource_version: of the answer; None for a delete that removed the object at once.
        """
        if uid in self._gone:
            return
        wanted = NEVER if resource_version is None else int(resource_version)
        held = self._objects.get((plural, uid))
        if held is not None and version(held) >= wanted:
            return
        expected = self._expected.setdefault(key, _Expected(deadline=0.0))
        expected.deadline = self.clock() + EXPECTATION_SECONDS
        expected.versions[plural, uid] = wanted

    def unmet(self, key: Key) -> float | None:
        """None when all own writes of ``key`` have been seen; else seconds to the deadline.

        A value <= 0 means that the watch is late: list instead, then ``settle``.
        """
        expected = self._expected.get(key)
        if expected is None:
            return None
        expected.versions = {
            (plural, uid): wanted
            for (plural, uid), wanted in expected.versions.items()
            if uid not in self._gone
            and ((plural, uid) not in self._objects or version(self._objects[plural, uid]) < wanted)
        }
        if not expected.versions:
            del self._expected[key]
            return None
        return expected.deadline - self.clock()

    def settle(self, key: Key, listed: Mapping[str, int]) -> bool:
        """Forget what was expected of ``key`` up to the versions of lists; whether that was all.

        What a list is too old for gets a new deadline: that server lags behind our own write.
        """
        if expected := self._expected.get(key):
            late = {k: v for k, v in expected.versions.items() if v > listed.get(k[0], 0)}
            expected.versions, expected.deadline = late, self.clock() + EXPECTATION_SECONDS
        return self.unmet(key) is None

    def changes(self, plural: str) -> int:
        """How often the view of a resource has changed."""
        return self._changes.get(plural, 0)

    def changed_since(self, plural: str, count: int) -> set[str] | None:
        """UIDs of what changed after the change of this number; None when that is too long ago."""
        log, missed = self._log.get(plural, ()), self.changes(plural) - count
        if missed > len(log):
            return None
        return set(itertools.islice(reversed(log), missed))

    def by_uid(self, plural: str, uid: str) -> Json | None:
        """The object of this UID, None when it is gone."""
        return self._objects.get((plural, uid))

    def ages(self) -> dict[str, float]:
        """Seconds since the last event or list of each resource."""
        now = self.clock()
        return {plural: now - seen for plural, seen in self._seen.items()}

    def _scope(self, plural: str, key: Key | None, labelled: bool) -> set[str]:
        if key is not None:
            return set(self._children.get((plural, key), ()))
        return {
            uid
            for uid, body in self._kinds.get(plural, {}).items()
            if not labelled or child_key(body) is not None
        }

    def _put(self, plural: str, uid: str, body: Mapping[str, Any]) -> bool:
        metadata = {k: v for k, v in body["metadata"].items() if k != "managedFields"}
        fresh = {**body, "metadata": metadata}
        place = (plural, metadata.get("namespace") or "", metadata["name"])
        rival = self._uids.get(place)
        if rival is not None and rival != uid:
            if version(self._objects[plural, rival]) > version(fresh):
                self._remember_gone(uid, version(fresh))  # the former holder of the name
                return False
            self._bury(plural, rival, version(fresh))
        self._unlink(plural, uid)
        self._note(plural, uid)
        self._objects[plural, uid] = self._kinds.setdefault(plural, {})[uid] = fresh
        self._uids[place] = uid
        owner = child_key(fresh)
        if owner is not None:
            self._children.setdefault((plural, owner), set()).add(uid)
        return True

    def _note(self, plural: str, uid: str) -> None:
        self._changes[plural] = self.changes(plural) + 1
        self._log.setdefault(plural, deque(maxlen=_LOGGED)).append(uid)

    def _unlink(self, plural: str, uid: str) -> None:
        """Remove an object from the index of children; its label may have changed."""
        held = self._objects.get((plural, uid))
        owner = None if held is None else child_key(held)
        if owner is None:
            return
        siblings = self._children.get((plural, owner), set())
        siblings.discard(uid)
        if not siblings:
            self._children.pop((plural, owner), None)

    def _bury(self, plural: str, uid: str, at: int) -> bool:
        self._unlink(plural, uid)
        held = self._objects.pop((plural, uid), None)
        self._kinds.get(plural, {}).pop(uid, None)
        self._remember_gone(uid, at)
        if held is None:
            return False
        self._note(plural, uid)
        metadata = held["metadata"]
        place = (plural, metadata.get("namespace") or "", metadata["name"])
        if self._uids.get(place) == uid:
            del self._uids[place]
        return True

    def _remember_gone(self, uid: str, at: int) -> None:
        self._gone[uid] = max(at, self._gone.get(uid, 0))
        self._gone.move_to_end(uid)
        while len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)


NEVER = 2**63
"""A version that no object reaches: met only by the object's end."""


def version(body: Mapping[str, Any]) -> int:
    """The resourceVersion as a number; those of one resource compare."""
    return int(body["metadata"]["resourceVersion"])


def child_key(body: Mapping[str, Any]) -> Key | None:
    """The deployment that a child's label names, in the child's own namespace."""
    metadata = body["metadata"]
    name = (metadata.get("labels") or {}).get(LABEL_DEPLOYMENT)
    return (metadata.get("namespace") or "", name) if name else None


def _name(body: Mapping[str, Any]) -> tuple[str, str]:
    metadata = body["metadata"]
    return metadata.get("namespace") or "", metadata["name"]
