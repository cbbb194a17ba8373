"""The only meeting of observing, deciding and acting: gather, plan, execute, for one key."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tilefleet_operator.api import PLURAL
from tilefleet_operator.cache import Key, ObjectCache
from tilefleet_operator.cluster import Cluster
from tilefleet_operator.desired import Defaults
from tilefleet_operator.errors import ApiError, LeaseLost, SpecInvalid, TooManyRequests
from tilefleet_operator.events import Owner
from tilefleet_operator.executor import Executor
from tilefleet_operator.metrics import WorkerPoller
from tilefleet_operator.plan import Plan, invalid, plan
from tilefleet_operator.status import is_minor, plans_alike
from tilefleet_operator.telemetry import Telemetry
from tilefleet_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

MINOR_SECONDS = 1.0
"""Pause between two statuses of one fleet that differ in counts only: a replica that starts passes
three states at once, and a fleet of 1,000 that rolls thousands."""


class Reconciler:
    """Brings one fleet nearer to its spec, again and again."""

    def __init__(
        self,
        cluster: Cluster,
        executor: Executor,
        poller: WorkerPoller,
        defaults: Defaults,
        telemetry: Telemetry,
        wall: Callable[[], float] = time.time,
        late: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """late: called when a watch did not show an own write in time; it may be half-open."""
        self.cluster, self.executor, self.poller = cluster, executor, poller
        self.defaults, self.telemetry, self.wall = defaults, telemetry, wall
        self.late, self.clock = late, clock
        self._reported: dict[Key, float] = {}

    async def reconcile(self, key: Key) -> float | None:
        """One round for ``key``; returns seconds until the next is needed anyway, or None.

        Raises ApiError or an ExceptionGroup of them; LeaseLost when nothing may be written.
        """
        if await self._is_stale(key):
            return self.cache.unmet(key)
        body = self.cache.get(PLURAL, *key)
        if body is None:
            self._forget(key)
            return None
        owner = Owner(*key, uid=body["metadata"]["uid"])
        try:
            made = await self._decide(key)
        except SpecInvalid as error:
            # The schema refuses such an object, but an older schema may have let it in.
            made = invalid(body, error.problems, self.wall())
        before = body.get("status") or {}
        made = self._paced(key, made, before)
        if made.status is not None and not made.actions and plans_alike(before, made.status):
            self.cluster.echoes.foresee(key, body, made.status)
        await self.executor.execute(owner, made)
        report = made.status or before
        self.telemetry.observe_fleet(*key, report, made.telemetry)
        if made.decision:
            self.telemetry.decisions.labels(made.decision).inc()
        return made.requeue_after

    def _paced(self, key: Key, made: Plan, before: Mapping[str, Any]) -> Plan:
        """The plan; without its status when that has little to say so soon after the last one."""
        if made.status is None:
            return made
        now = self.clock()
        left = self._reported.get(key, -math.inf) + MINOR_SECONDS - now
        if left <= 0 or made.actions or made.events or not is_minor(before, made.status):
            self._reported[key] = now
            return made
        due = left if made.requeue_after is None else min(left, made.requeue_after)
        return replace(made, status=None, requeue_after=due)

    async def _decide(self, key: Key) -> Plan:
        """The plan of an existing object. Raises SpecInvalid."""
        deployment = self.cluster.deployment(key)
        if deployment is None:
            return Plan()
        await self.cluster.recheck_names(deployment)
        stats = self.poller.stats(self.cluster.pods(deployment))
        snapshot = self.cluster.gather(deployment, stats, self.poller.history(key))
        return plan(snapshot, self.defaults, self.wall())

    @property
    def cache(self) -> ObjectCache:
        """The view that plans are made on."""
        return self.cluster.cache

    async def _is_stale(self, key: Key) -> bool:
        """Whether an own write is not in the view yet. A late watch is replaced by a list."""
        left = self.cache.unmet(key)
        if left is None:
            return False
        if left > 0:
            # What this round would have seen is looked at when the write shows.
            self.cluster.echoes.forget(key)
            self.telemetry.stale_plan_skips.inc()
            return True
        logger.warning("%s/%s: the watch is late, listing instead", *key)
        self.late()
        return not await self.cluster.list_key(key)

    def _forget(self, key: Key) -> None:
        self._reported.pop(key, None)
        self.poller.forget(key)
        self.cluster.echoes.forget(key)
        self.telemetry.forget_fleet(*key)


async def work(queue: WorkQueue, reconciler: Reconciler, telemetry: Telemetry) -> None:
    """Take keys for ever. An error of one key costs that key its backoff, and nobody else."""
    while True:
        key, waited = await queue.get()
        telemetry.queue_wait_seconds.observe(waited)
        started = time.monotonic()
        result = "error"
        try:
            requeue = await reconciler.reconcile(key)
        except (asyncio.CancelledError, LeaseLost):
            raise
        except Exception as error:
            _log(key, error)
            queue.done(key, failed=True, retry_after_seconds=_retry_after(error))
        else:
            result = "ok" if reconciler.cache.unmet(key) is None else "waiting"
            queue.done(key, requeue_after_seconds=requeue)
        finally:
            telemetry.reconcile_seconds.labels(result).observe(time.monotonic() - started)


def _leaves(error: Exception) -> list[Exception]:
    if isinstance(error, ExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _retry_after(error: Exception) -> float | None:
    """The longest wait that the API server asked for."""
    waits = [
        leaf.retry_after_seconds for leaf in _leaves(error) if isinstance(leaf, TooManyRequests)
    ]
    return max(waits, default=None)


def _log(key: Key, error: Exception) -> None:
    """API errors as one line each; anything else is a defect of ours and gets its trace."""
    for leaf in _leaves(error):
        if isinstance(leaf, ApiError):
            logger.warning("%s/%s: %s", *key, leaf)
        else:
            logger.error("%s/%s: %s", *key, leaf, exc_info=leaf)
