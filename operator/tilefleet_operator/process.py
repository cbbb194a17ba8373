"""One operator process: probes, the Lease, leading, and a clean end.

A follower is Ready: it waits for the Lease and does nothing else. A leader that loses the Lease, or
one of its tasks, ends the process at once; the kubelet starts a new follower.
"""

import asyncio
import logging
import os
import signal
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tilefleet_operator.client import ApiClient
from tilefleet_operator.desired import Defaults
from tilefleet_operator.election import Election, LeaseTiming
from tilefleet_operator.leader import Leader
from tilefleet_operator.login import login
from tilefleet_operator.ports import serve_metrics, serve_probes
from tilefleet_operator.rate import Rate
from tilefleet_operator.resources import LEASES
from tilefleet_operator.telemetry import Telemetry

logger = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that ``run`` is told; no field is resolved later."""

    namespace: str
    """Namespace of the Lease: the operator's own."""
    identity: str
    """Name of this process, unique among the replicas: the pod's name."""
    defaults: Defaults
    lease_name: str = "tilefleet-operator"
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose objects are managed; empty for all."""
    probe_port: int = 8080
    metrics_port: int = 8081
    kubeconfig: str | None = None
    """None: the pod's service account."""
    timing: LeaseTiming = field(default_factory=LeaseTiming)
    rate: Rate = field(default_factory=lambda: Rate(per_second=1000.0, burst=2000))
    """Of all requests to the API server but the Lease's and the watches."""


class ApiLease:
    """The Lease on the API server; fits election.LeaseStore."""

    def __init__(self, api: ApiClient, namespace: str, name: str) -> None:
        self.api, self.namespace, self.name = api, namespace, name

    async def read(self, timeout_seconds: float) -> Json:
        """GET it."""
        return await self.api.get(LEASES, self.namespace, self.name, timeout_seconds)

    async def create(self, spec: Mapping[str, Any], timeout_seconds: float) -> Json:
        """POST it."""
        body = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": spec,
        }
        return await self.api.create(LEASES, body, timeout_seconds)

    async def update(self, lease: Mapping[str, Any], timeout_seconds: float) -> Json:
        """PUT it, with its resourceVersion as the precondition."""
        return await self.api.update(LEASES, lease, timeout_seconds)


class Process:
    """One run of the operator."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.telemetry = Telemetry()
        self.login = login(config.kubeconfig)
        self.api = ApiClient(
            self.login,
            rate=config.rate,
            guard=self._guard,
            observer=self.telemetry.observe_request,
        )
        # A client of its own: the Lease must never wait behind a burst of other requests.
        self.lease_api = ApiClient(self.login, observer=self.telemetry.observe_request)
        # The suffix tells this process from one of the same name that was killed.
        self.identity = f"{config.identity}_{uuid.uuid4().hex[:8]}"
        store = ApiLease(self.lease_api, config.namespace, config.lease_name)
        self.election = Election(store, self.identity, config.timing)
        self.leader: Leader | None = None
        self.stopping = asyncio.Event()

    async def run(self) -> int:
        """Serve until SIGTERM; returns the exit status. A lost Lease does not return."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        await serve_probes(self.unhealthy, self.unready, self.config.probe_port)
        await serve_metrics(self.telemetry, self._refresh, self.config.metrics_port)
        async with self.api, self.lease_api:
            if await self._first(self.election.acquire()):
                return 0
            logger.info("%s leads", self.identity)
            await self._lead()
        return 0

    async def _lead(self) -> None:
        config = self.config
        self.leader = Leader(
            self.api,
            self.login,
            self.telemetry,
            config.defaults,
            self.identity,
            config.watch_namespaces,
        )
        hold = asyncio.create_task(self.election.hold(), name="lease")
        lead = asyncio.create_task(self.leader.run(self.stopping.set), name="leader")
        stop = asyncio.create_task(self.stopping.wait(), name="stop")
        await asyncio.wait((hold, lead, stop), return_when=asyncio.FIRST_COMPLETED)
        if hold.done():
            logger.critical("%s ends: %s", self.identity, hold.exception())
            _exit(1)
        if lead.done():
            logger.critical(
                "%s ends: %s", self.identity, lead.exception(), exc_info=lead.exception()
            )
            await self.leader.stop()
            await self.election.release()
            _exit(1)
        logger.info("%s stops", self.identity)
        await self.leader.stop()
        await self.election.release()
        # kopf may take many seconds to end. The Lease is free and nothing is under way.
        _exit(0)

    async def _first(self, work: Any) -> bool:
        """Run ``work`` until it or the stop signal comes; whether it was the signal."""
        task = asyncio.ensure_future(work)
        stop = asyncio.create_task(self.stopping.wait())
        done, pending = await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        for one in pending:
            one.cancel()
        if task in done:
            task.result()
        return task not in done

    def unhealthy(self) -> list[str]:
        """What only a restart cures."""
        problems = []
        age, limit = self.election.renewal_age_seconds(), self.config.timing.duration_seconds
        if age > limit:
            problems.append(f"the Lease was renewed {age:.0f} s ago, limit {limit:.0f} s")
        return problems + (self.leader.problems() if self.leader is not None else [])

    def unready(self) -> list[str]:
        """Why this process should not count as available; a follower does."""
        if self.stopping.is_set():
            return ["the process stops"]
        if self.leader is not None and not self.leader.synced:
            return ["the first full list is not done; is the CustomResourceDefinition installed?"]
        return []

    def _guard(self) -> float:
        return self.election.guard()

    def _refresh(self) -> None:
        self.telemetry.leader.set(1.0 if self.election.is_leader() else 0.0)
        if self.leader is not None:
            self.leader.refresh()


def _exit(status: int) -> NoReturn:
    """End now: no cleanup may write, wait or hang."""
    logging.shutdown()
    os._exit(status)
