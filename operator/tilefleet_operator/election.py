"""Leadership by one ``coordination.k8s.io/v1`` Lease.

Judges time by the monotonic clock only: a Lease is stale when its record has not changed for
``duration_seconds`` of this process's own time. Clocks of two machines are never compared; the
times written into the Lease are for people. It does not know what a leader does.

Source: the algorithm of client-go's leaderelection; added are a time limit on each request, a
guard for each write, and the release.
"""

import asyncio
import datetime
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from tilefleet_operator.errors import ApiError, ConfigInvalid, Conflict, LeaseLost, NotFound

logger = logging.getLogger(__name__)

Json = dict[str, Any]


class LeaseStore(Protocol):
    """Where the Lease lives. ``read`` raises NotFound; ``create`` and ``update`` raise Conflict."""

    async def read(self, timeout_seconds: float) -> Json:
        """Return the Lease."""

    async def create(self, spec: Mapping[str, Any], timeout_seconds: float) -> Json:
        """Create the Lease with this spec."""

    async def update(self, lease: Mapping[str, Any], timeout_seconds: float) -> Json:
        """Replace the Lease if its resourceVersion is still the same."""


@dataclass(frozen=True)
class LeaseTiming:
    """Seconds. A crashed leader is replaced after at most ``duration + retry`` and one request."""

    duration_seconds: float = 10.0
    """How long a record holds after its last change."""
    deadline_seconds: float = 7.0
    """A leader that could not renew for this long stops writing; the rest of the duration is slack
    for writes that are already under way."""
    renew_seconds: float = 2.0
    """Pause between renewals."""
    retry_seconds: float = 2.0
    """Pause between looks of a follower."""
    request_seconds: float = 3.0
    """Limit of one request."""

    @classmethod
    def of(cls, duration_seconds: float) -> "LeaseTiming":
        """All of it in the proportions of the defaults. Raises ConfigInvalid below 2 s."""
        if not 2.0 <= duration_seconds <= 600.0:
            raise ConfigInvalid(
                f"a Lease of {duration_seconds:g} s: below 2 s every pause of the API server loses"
                " it, above 600 s a crash stops all work for as long; give 2 to 600"
            )
        share = duration_seconds / cls.duration_seconds
        return cls(*(getattr(cls, field.name) * share for field in fields(cls)))


class Election:
    """One candidate for one Lease."""

    def __init__(
        self,
        store: LeaseStore,
        identity: str,
        timing: LeaseTiming | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self.store = store
        self.identity = identity
        self.timing = timing or LeaseTiming()
        self.clock = clock
        self.sleep = sleep
        self._lease: Json | None = None
        self._version: str | None = None
        self._changed = clock()
        self._renewed: float | None = None

    def is_leader(self) -> bool:
        """Whether this process may write now."""
        return self.remaining_seconds() > 0

    def remaining_seconds(self) -> float:
        """Seconds for which this process may still write without another renewal; 0 if none."""
        if self._renewed is None:
            return 0.0
        return max(0.0, self._renewed + self.timing.deadline_seconds - self.clock())

    def guard(self) -> float:
        """Seconds left for a write that starts now.

        Raises LeaseLost when there are none: a process that was stopped and goes on must not land a
        write of its past.
        """
        remaining = self.remaining_seconds()
        if remaining <= 0:
            raise LeaseLost(
                f"{self.identity} has not renewed its Lease for {self.timing.deadline_seconds:g} s;"
                " it writes nothing any more and must restart as a follower"
            )
        return remaining

    def renewal_age_seconds(self) -> float:
        """Seconds since the last successful renewal; 0 for a follower."""
        return 0.0 if self._renewed is None else self.clock() - self._renewed

    async def acquire(self) -> None:
        """Wait until this process holds the Lease."""
        while True:
            try:
                if await self._try_acquire():
                    return
            except Conflict:
                logger.info("another candidate took the Lease first")
            except ApiError as error:
                logger.warning("the Lease cannot be read or taken: %s", error)
            await self.sleep(self.timing.retry_seconds)

    async def hold(self) -> None:
        """Renew until the Lease is lost; then raise LeaseLost."""
        pause = self.timing.renew_seconds
        while True:
            await self.sleep(min(pause, self.guard()))
            pause = self.timing.renew_seconds
            try:
                await self._renew()
            except ApiError as error:
                logger.warning("the Lease was not renewed: %s", error)
                if isinstance(error, Conflict):
                    await self._reread()
                pause = self.timing.renew_seconds / 4
            self.guard()

    async def release(self) -> None:
        """Give the Lease up so that a follower takes over at once; never raises an ApiError."""
        if not self.is_leader() or self._lease is None:
            return
        self._renewed = None
        spec = {**self._lease["spec"], "holderIdentity": "", "renewTime": _now()}
        try:
            await self.store.update(
                {**self._lease, "spec": spec}, timeout_seconds=self.timing.request_seconds
            )
        except ApiError as error:
            logger.warning("the Lease was not released, a follower waits for its end: %s", error)

    async def _try_acquire(self) -> bool:
        limit = self.timing.request_seconds
        started = self.clock()
        try:
            lease = await self.store.read(timeout_seconds=limit)
        except NotFound:
            return self._won(await self.store.create(self._spec(0), timeout_seconds=limit), started)
        self._observe(lease)
        spec = lease.get("spec") or {}
        holder, idle = spec.get("holderIdentity"), self.clock() - self._changed
        # Ours: it was taken by a request whose answer never came. No other process has this name.
        foreign = holder and holder != self.identity
        if foreign and idle < float(spec.get("leaseDurationSeconds") or 0):
            return False
        transitions = int(spec.get("leaseTransitions") or 0) + 1
        taken = {**lease, "spec": self._spec(transitions)}
        started = self.clock()
        return self._won(await self.store.update(taken, timeout_seconds=limit), started)

    def _observe(self, lease: Json) -> None:
        version = lease["metadata"]["resourceVersion"]
        if version != self._version:
            self._version, self._changed = version, self.clock()

    def _won(self, lease: Json, started: float) -> bool:
        # Counted from before the request: a rival starts its wait at the earliest when the record
        # reached the server, which is later.
        self._lease, self._renewed = lease, started
        return True

    async def _renew(self) -> None:
        lease = self._lease
        if lease is None:
            raise LeaseLost(f"{self.identity} renews a Lease that it never held")
        started = self.clock()
        spec = {**lease["spec"], "renewTime": _now()}
        limit = min(self.timing.request_seconds, self.guard())
        self._won(await self.store.update({**lease, "spec": spec}, timeout_seconds=limit), started)

    async def _reread(self) -> None:
        """After a conflict: take the newer version if the Lease is still ours, else lose it."""
        try:
            lease = await self.store.read(timeout_seconds=self.timing.request_seconds)
        except ApiError as error:
            logger.warning("the Lease cannot be read: %s", error)
            return
        holder = (lease.get("spec") or {}).get("holderIdentity")
        if holder != self.identity:
            self._renewed = None
            raise LeaseLost(f"the Lease of {self.identity} belongs to {holder!r} now")
        self._lease = lease

    def _spec(self, transitions: int) -> Json:
        now = _now()
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": round(self.timing.duration_seconds),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }


def _now() -> str:
    """Wall-clock time as Kubernetes' MicroTime, for people."""
    now = datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
