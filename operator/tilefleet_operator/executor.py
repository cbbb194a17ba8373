"""The operator's writes: the actions of one plan, its events, its status.

It decides nothing: order and content come from the plan. It does not know why anything is done.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tilefleet_operator.api import API_VERSION, KIND, PLURAL
from tilefleet_operator.cache import Key, ObjectCache
from tilefleet_operator.client import ApiClient
from tilefleet_operator.errors import ApiError, Conflict, NameTaken, NotFound
from tilefleet_operator.events import EventPoster, Owner
from tilefleet_operator.observed import owner_uid
from tilefleet_operator.plan import Action, Apply, Delete, Drain, Plan
from tilefleet_operator.reasons import Event
from tilefleet_operator.resources import BY_KIND, DEPLOYMENTS, MONITORS, PODS, Resource
from tilefleet_operator.telemetry import Telemetry
from tilefleet_operator.upkeep import is_claimable

logger = logging.getLogger(__name__)

Json = dict[str, Any]
PARALLEL = 8
"""Writes of one plan at a time: a fleet of 1,000 replicas leaves connections to the others."""
PostDrain = Callable[[str, int, float], Awaitable[None]]
"""(pod IP, port, timeout in seconds); never raises for a worker that does not answer."""


class Executor:
    """Carries out plans through one API client; own writes become expectations of the cache."""

    def __init__(
        self,
        api: ApiClient,
        cache: ObjectCache,
        telemetry: Telemetry,
        post_drain: PostDrain,
        identity: str,
    ) -> None:
        self.api, self.cache, self.telemetry = api, cache, telemetry
        self.post_drain, self.poster = post_drain, EventPoster(api, telemetry, identity)

    async def execute(self, owner: Owner, plan: Plan) -> None:
        """The events and the status, then the actions rank by rank, whatever failed before.

        The status says what was seen and decided, and does not wait for a roll: a changed spec is
        acknowledged by the first write. The events of a transition come before the status, which
        would forget them. Independent children do not wait for each other's errors: all are tried,
        and all errors are raised together as an ExceptionGroup of ApiError. Pods wait for the next
        plan when a child's name is taken: it may be their ServiceAccount's; and when a pod that was
        to leave stays: their number counts on its room. LeaseLost is raised at once.
        """
        await self._post(owner, plan.events)
        errors: list[Exception] = []
        lives = False
        if plan.status is not None:
            try:
                lives = await self._status(owner, plan)
                if not lives:
                    return
            except ApiError as error:
                errors.append(error)
        if any(map(_makes_pod, plan.actions)) and not lives and not await self._lives(owner):
            return
        crowded = False
        for _, chosen in itertools.groupby(sorted(plan.actions, key=_rank), _rank):
            actions = [action for action in chosen if not (crowded and _makes_pod(action))]
            failed = await self._all(owner.key, actions)
            errors += failed
            crowded |= bool(failed) and isinstance(actions[0], Drain | Delete)
            if any(isinstance(error, NameTaken) for error in errors):
                break  # pods rank last; the next plan knows whose name it is, and decides anew
        await self._post(owner, [_failure_event(error) for error in errors])
        if errors:
            raise ExceptionGroup(
                f"{len(errors)} of the writes for {owner.namespace}/{owner.name}", errors
            )

    async def _post(self, owner: Owner, events: Sequence[Event]) -> None:
        seen = self.cache.get(PLURAL, *owner.key)
        moment = str(seen["metadata"]["resourceVersion"]) if seen else ""
        for event in events:
            await self.poster.post(owner, event, moment)

    async def _lives(self, owner: Owner) -> bool:
        """Whether the owner is still there, asked of the API server itself.

        Each resource has a watch of its own: that the pods of a deleted fleet are gone may be seen
        before its own end, and they must not be made again.
        """
        try:
            found = await self.api.get(DEPLOYMENTS, owner.namespace, owner.name)
        except NotFound:
            self.cache.bury(PLURAL, owner.uid)
            return False
        return self._is_alive(owner, found)

    def _is_alive(self, owner: Owner, found: Json) -> bool:
        metadata = found["metadata"]
        if metadata["uid"] == owner.uid and "deletionTimestamp" not in metadata:
            return True
        self.cache.observe(PLURAL, None, found)
        return False

    async def _all(self, key: Key, actions: Sequence[Action]) -> list[Exception]:
        limit = asyncio.Semaphore(PARALLEL)

        async def one(action: Action) -> None:
            async with limit:
                await self._act(key, action)

        results = await asyncio.gather(*map(one, actions), return_exceptions=True)
        errors: list[Exception] = []
        for action, result in zip(actions, results, strict=True):
            outcome = "ok" if result is None else "error"
            self.telemetry.actions.labels(type(action).__name__.lower(), outcome).inc()
            if isinstance(result, ApiError):
                errors.append(result)
            elif result is not None:
                raise result
        return errors

    async def _act(self, key: Key, action: Action) -> None:
        what = f"{type(action).__name__.lower()} {action.kind} {action.namespace}/{action.name}"
        logger.info("%s: %s", what, action.why)
        if isinstance(action, Delete):
            await self._delete(key, action)
        elif isinstance(action, Drain):
            await self._apply(key, PODS, action)
            if action.ip is not None:
                await self.post_drain(action.ip, action.port, action.timeout_seconds)
        else:
            resource = BY_KIND[action.kind]
            try:
                await self._claim(key, resource, action)
            except NotFound:
                if resource is not MONITORS:
                    raise
                # Their definition went; the next list of them says so, and no plan wants one then.
                logger.info("%s: the cluster has no PodMonitors any more", what)

    async def _claim(self, key: Key, resource: Resource, action: Apply) -> None:
        """Apply an object, but never take over one of somebody else's by its name.

        One that was never seen is only created. A name that is taken is looked at: it may be our
        own write whose answer was lost, or one that the watch has not shown yet.
        """
        metadata = action.body["metadata"]
        if "uid" in metadata:
            await self._apply(key, resource, action)
            return
        held = self.cache.get(resource.plural, action.namespace, action.name)
        if held is None:
            try:
                await self._apply(key, resource, action, only_new=True)
                return
            except Conflict:
                held = await self.api.get(resource, action.namespace, action.name)
            if resource is not PODS:  # the next plan says of a child whose name it is
                self.cache.observe(resource.plural, None, held)
        if not is_claimable(held, owner_uid(metadata), key[1]):
            text = f"{action.kind} {action.name} exists and is not controlled by this object"
            raise NameTaken(409, "NameTaken", text)
        await self._apply(key, resource, action)

    async def _apply(
        self, key: Key, resource: Resource, action: Apply | Drain, *, only_new: bool = False
    ) -> None:
        answer = await self.api.apply(
            resource, action.body, field_manager=action.field_manager, only_new=only_new
        )
        metadata = answer["metadata"]
        if resource is MONITORS:
            self.cache.observe(resource.plural, None, answer)  # no watch will show it
            return
        self.cache.expect(key, resource.plural, metadata["uid"], metadata["resourceVersion"])

    async def _delete(self, key: Key, action: Delete) -> None:
        resource = BY_KIND[action.kind]
        try:
            answer = await self.api.delete(resource, action.namespace, action.name, action.uid)
        except NotFound:
            self.cache.bury(resource.plural, action.uid)
            return
        except Conflict:
            await self._bury_if_replaced(resource, action)
            return
        if resource is MONITORS:
            self.cache.bury(resource.plural, action.uid)  # no watch will show its end
            return
        metadata = answer.get("metadata") or {}
        # Without a grace period the object is gone at once, and the watch shows only its end.
        lingers = metadata.get("uid") == action.uid and (
            metadata.get("deletionGracePeriodSeconds") or metadata.get("finalizers")
        )
        seen_at = metadata["resourceVersion"] if lingers else None
        self.cache.expect(key, resource.plural, action.uid, seen_at)

    async def _bury_if_replaced(self, resource: Resource, action: Delete) -> None:
        """After a conflict: the name belongs to a newer object, and this UID is dead; or not.

        A conflict may have other causes than our precondition. Raises Conflict for those.
        """
        named = f"metadata.name={action.name}"
        found = await self.api.list(resource, action.namespace, field_selector=named)
        if any(item["metadata"]["uid"] == action.uid for item in found.items):
            raise Conflict(409, "Conflict", "another change came first", f"delete {action.name}")
        self.cache.bury(resource.plural, action.uid)

    async def _status(self, owner: Owner, plan: Plan) -> bool:
        """Write the status; whether the owner is still there, and not about to go."""
        metadata = {"namespace": owner.namespace, "name": owner.name, "uid": owner.uid}
        body = {
            "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": plan.status,
        }  # fmt: skip
        try:
            answer = await self.api.apply(DEPLOYMENTS, body, subresource="status")
        except NotFound:
            logger.info("%s/%s is gone, so is its status", owner.namespace, owner.name)
            self.cache.bury(PLURAL, owner.uid)
            return False
        seen_at = answer["metadata"]["resourceVersion"]
        self.cache.expect(owner.key, PLURAL, owner.uid, seen_at)
        return self._is_alive(owner, answer)


def _rank(action: Action) -> tuple[int, bool]:
    """Actions of one rank do not need each other; pods need the children before them."""
    return (Drain, Delete, Apply).index(type(action)), action.kind == "Pod"


def _makes_pod(action: Action) -> bool:
    return isinstance(action, Apply) and action.kind == PODS.kind


def _failure_event(error: Exception) -> Event:
    return ("Warning", "WriteFailed", str(error))
