"""What a process does while it leads: watch, list, poll, reconcile; and how it stops.

It does not know how leadership is won.
"""

import asyncio
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import kopf

from tilefleet_operator.api import PLURAL
from tilefleet_operator.cache import Key, ObjectCache
from tilefleet_operator.client import ApiClient
from tilefleet_operator.cluster import Cluster
from tilefleet_operator.desired import Defaults
from tilefleet_operator.errors import ApiError, TooManyRequests
from tilefleet_operator.executor import Executor
from tilefleet_operator.handlers import Shell, is_unanswered
from tilefleet_operator.login import Login
from tilefleet_operator.metrics import WorkerPoller, post_drain
from tilefleet_operator.reconcile import Reconciler, work
from tilefleet_operator.telemetry import Telemetry
from tilefleet_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaderTiming:
    """Seconds, and the number of reconciles at a time."""

    workers: int = 16
    resync_seconds: float = 240.0
    """Pause between full lists, with 25 % jitter; a list prunes what the watches missed."""
    relist_seconds: float = 5.0
    """Pause before the full list that follows a broken watch; several breaks share one."""
    retry_seconds: float = 2.0
    """Pause after a full list that failed."""
    suspect_seconds: float = 80.0
    """How long full lists go on after a watch was late, with doubling pauses: a half-open watch
    is replaced after 70 s, see handlers.configure."""
    foreign_seconds: float = 30.0
    """Pause between looks at the devices that pods of others hold; only with AMD fleets."""
    monitor_seconds: float = 60.0
    """Pause between lists of PodMonitors, which also say whether the cluster has them."""
    stuck_seconds: float = 120.0
    """A key that waits or runs longer means that reconciling is stuck: requests end after 10 s, and
    the queue hands out 500 keys a second."""
    blind_seconds: float = 600.0
    """No watch event and no list of a resource for so long: two full lists were missed."""
    reaction_seconds: float = 5.0
    """Pause between looks at what node autoscalers say; only while pods have no node."""
    stop_seconds: float = 3.0
    """How long a stopping leader lets running reconciles finish."""


class Leader:
    """All tasks of one leader. Any of them ending is fatal to the process."""

    def __init__(
        self,
        api: ApiClient,
        login: Login,
        telemetry: Telemetry,
        defaults: Defaults,
        identity: str,
        namespaces: Sequence[str] = (),
        timing: LeaderTiming | None = None,
    ) -> None:
        self.timing = timing or LeaderTiming()
        self.telemetry, self.namespaces = telemetry, tuple(namespaces)
        self.cache, self.queue = ObjectCache(), WorkQueue()
        self.cluster = Cluster(api, self.cache, namespaces)
        self.poller = WorkerPoller(self.cluster.poll_targets, self.queue.add, telemetry)
        self.executor = Executor(api, self.cache, telemetry, post_drain, identity)
        self.reconciler = Reconciler(
            self.cluster, self.executor, self.poller, defaults, telemetry, late=self._late
        )
        self.shell = Shell(self.cluster, login, self._dirty, self._relisted)
        self._resync_now = asyncio.Event()
        self._late_since = -math.inf
        self._stop_kopf = asyncio.Event()
        self._synced = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []

    async def run(self, on_signal: Callable[[], None]) -> None:
        """Lead until cancelled, or until a task ends, which raises.

        Nothing is written before the first full list. on_signal: our handler of SIGTERM and SIGINT,
        installed anew after kopf has put its own there.
        """
        await self._list_until_done()
        # kopf cancels every task that was created after its start, so ours come first.
        kopf_ready = asyncio.Event()
        self._workers = [
            asyncio.create_task(self._work(), name=f"worker {number}")
            for number in range(self.timing.workers)
        ]
        tasks = [
            *self._workers,
            asyncio.create_task(self._resync(kopf_ready, on_signal), name="resync"),
            asyncio.create_task(self.poller.run(), name="poller"),
            asyncio.create_task(self._watch_foreign(), name="foreign devices"),
            asyncio.create_task(self._watch_reactions(), name="node autoscalers"),
            asyncio.create_task(self._watch_monitors(), name="pod monitors"),
        ]
        tasks.append(asyncio.create_task(self._kopf(kopf_ready), name="kopf"))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            cause = task.exception()
            raise RuntimeError(f"the task {task.get_name()!r} ended: {cause}") from cause

    async def stop(self) -> None:
        """Let running reconciles finish, within bounds, and start no other."""
        self.queue.close()
        self._synced.set()  # a worker that still waits for the first list ends, too
        running = [task for task in self._workers if not task.done()]
        if running:
            await asyncio.wait(running, timeout=self.timing.stop_seconds)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._stop_kopf.set()

    def refresh(self) -> None:
        """Set the gauges that are read, not counted."""
        self.telemetry.queue_depth.set(self.queue.depth())
        self.telemetry.queue_oldest_seconds.set(self.queue.oldest_seconds())
        for plural, age in self.cache.ages().items():
            self.telemetry.watch_age_seconds.labels(plural).set(age)

    def problems(self) -> list[str]:
        """What only a restart cures: a stuck queue, or a view that nothing renews any more."""
        oldest, limit = self.queue.oldest_seconds(), self.timing.stuck_seconds
        problems = []
        if oldest > limit:
            problems.append(f"a key waits for {oldest:.0f} s, limit {limit:.0f} s")
        limit = self.timing.blind_seconds
        problems += [
            f"nothing was seen of {plural} for {age:.0f} s, limit {limit:.0f} s"
            for plural, age in sorted(self.cache.ages().items())
            if age > limit
        ]
        return problems

    @property
    def synced(self) -> bool:
        """Whether the first full list is done, so that fleets are worked on."""
        return self._synced.is_set()

    async def _kopf(self, ready: asyncio.Event) -> None:
        await kopf.operator(
            registry=self.shell.registry(),
            standalone=True,
            clusterwide=not self.namespaces,
            namespaces=self.namespaces,
            ready_flag=ready,
            stop_flag=self._stop_kopf,
        )

    async def _work(self) -> None:
        await self._synced.wait()
        await work(self.queue, self.reconciler, self.telemetry)

    async def _list_until_done(self) -> None:
        """One full list. Errors, such as a CRD that is not there yet, are waited out."""
        while True:
            try:
                await self.cluster.list_all()
                return
            except ApiError as error:
                logger.warning("the full list failed, nothing is changed until it works: %s", error)
                asked = error.retry_after_seconds if isinstance(error, TooManyRequests) else 0.0
                await asyncio.sleep(max(self.timing.retry_seconds, asked))

    async def _resync(self, kopf_ready: asyncio.Event, on_signal: Callable[[], None]) -> None:
        await kopf_ready.wait()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        while True:
            for key in self.cache.deployment_keys():
                body = self.cache.get(PLURAL, *key)
                self.queue.add(key, urgent=body is not None and is_unanswered(body))
            self._synced.set()
            pause = self._resync_pause()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._resync_now.wait(), pause)
                await asyncio.sleep(self.timing.relist_seconds)
            self._resync_now.clear()
            started = time.monotonic()
            await self._list_until_done()
            logger.info("full list in %.2f s", time.monotonic() - started)

    def _resync_pause(self) -> float:
        """Long while the watches work; as long as the doubt has lasted after one was late."""
        doubted = time.monotonic() - self._late_since
        if doubted < self.timing.suspect_seconds:
            return max(self.timing.relist_seconds, doubted)
        return self.timing.resync_seconds * random.uniform(0.75, 1.25)

    def _dirty(self, key: Key, *, urgent: bool = False) -> None:
        self.queue.add(key, urgent=urgent)

    def _late(self) -> None:
        if time.monotonic() - self._late_since > self.timing.suspect_seconds:
            self._late_since = time.monotonic()
            self._resync_now.set()

    def _relisted(self) -> None:
        self._resync_now.set()

    async def _watch_foreign(self) -> None:
        while True:
            if keys := self.cluster.amd_keys():
                try:
                    changed = await self.cluster.list_foreign()
                except ApiError as error:
                    logger.warning("devices held by pods of others are unknown: %s", error)
                    changed = False
                for key in keys if changed else ():
                    self.queue.add(key)
            await asyncio.sleep(self.timing.foreign_seconds)

    async def _watch_monitors(self) -> None:
        while True:
            try:
                changed = await self.cluster.list_monitors()
            except ApiError as error:
                logger.warning("PodMonitors are not looked after: %s", error)
                changed = False
            for key in self.cache.deployment_keys() if changed else ():
                self.queue.add(key)
            await asyncio.sleep(self.timing.monitor_seconds)

    async def _watch_reactions(self) -> None:
        while True:
            await asyncio.sleep(self.timing.reaction_seconds)
            try:
                for key in sorted(await self.cluster.list_reactions()):
                    self.queue.add(key)
            except ApiError as error:
                logger.warning("what node autoscalers say is unknown: %s", error)
