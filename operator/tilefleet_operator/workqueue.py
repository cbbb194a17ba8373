"""A queue of dirty keys: coalesced, one worker a key, backoff a key, one token bucket for all.

It does not know what a key means nor what a worker does with it.

Source: the semantics of client-go's rate limiting work queue; one heap instead of three queues.
"""

import asyncio
import heapq
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from tilefleet_operator.errors import OperatorError
from tilefleet_operator.rate import TokenBucket

_SPARE = 64
"""Superseded entries that the heap may hold beyond one a key: memory is bounded by the keys."""

Key = tuple[str, str]
"""(namespace, name) of one InferenceDeployment."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Rates and delays of a WorkQueue."""

    keys_per_second: float = 500.0
    """Steady rate at which keys are handed out, over all workers. It bounds our own CPU; writes
    have a lower limit of their own in the client."""
    burst: int = 1000
    """Keys handed out at once after a quiet time."""
    base_seconds: float = 0.05
    """First backoff of a failing key; it doubles with each failure in a row."""
    cap_seconds: float = 300.0
    """Longest backoff of a failing key."""
    event_floor_seconds: float = 5.0
    """An event wakes a failing key from its backoff, but not sooner than this after the failure:
    a refused write that provokes an event each time must not become a hot loop."""
    head_start_seconds: float = 30.0
    """An urgent key goes before those that fell due less than this before it: a user's change does
    not wait behind the roll of a thousand fleets, and no fleet waits for ever behind changes."""


class QueueClosed(OperatorError):
    """The queue hands out no more keys."""


class WorkQueue:
    """Dirty keys in the order in which they fall due; urgent ones have a head start.

    Promises: a key that is being worked on is never handed out again before ``done``; a key added
    meanwhile is handed out once afterwards; of several requests for one key the earliest wins.
    """

    def __init__(
        self,
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.limits = limits or QueueLimits()
        self.clock = clock
        self.rand = rand
        # key → (rank, due): the rank orders, and is before the due time for an urgent key
        self._due: dict[Key, tuple[float, float]] = {}
        self._heap: list[tuple[float, Key]] = []
        self._running: dict[Key, float] = {}
        self._again: dict[Key, tuple[float, float]] = {}
        self._failures: dict[Key, int] = {}
        self._floor: dict[Key, float] = {}
        self._bucket = TokenBucket(self.limits.keys_per_second, self.limits.burst, clock)
        self._wake = asyncio.Event()
        self._closed = False

    def add(self, key: Key, delay_seconds: float = 0.0, *, urgent: bool = False) -> None:
        """Ask for one run of ``key`` in ``delay_seconds``; an earlier request wins.

        urgent: somebody waits for the answer. What is not due yet has no head start.
        """
        now = self.clock()
        due = max(now + delay_seconds, self._floor.get(key, now))
        ahead = self.limits.head_start_seconds if urgent and due <= now else 0.0
        self._ask(key, due - ahead, due)

    def _ask(self, key: Key, rank: float, due: float) -> None:
        waiting = self._again if key in self._running else self._due
        held = waiting.get(key, (math.inf, math.inf))
        if rank >= held[0]:
            return
        waiting[key] = (rank, min(due, held[1]))
        if waiting is self._due:
            heapq.heappush(self._heap, (rank, key))
            if len(self._heap) > 2 * len(self._due) + _SPARE:
                self._heap = [(rank, key) for key, (rank, _) in self._due.items()]
                heapq.heapify(self._heap)
            self._wake.set()

    def close(self) -> None:
        """Hand out no key any more: every ``get`` raises QueueClosed."""
        self._closed = True
        self._wake.set()

    async def get(self) -> tuple[Key, float]:
        """Wait for the next due key; returns it and the seconds that it waited beyond its due time.

        The caller must call ``done`` for the key, whatever happens. Raises QueueClosed after
        ``close``.
        """
        while True:
            if self._closed:
                raise QueueClosed
            self._wake.clear()
            wait = self._seconds_to_next()
            if wait is not None and wait <= 0:
                _, key = heapq.heappop(self._heap)
                _, due = self._due.pop(key)
                self._bucket.take()
                now = self.clock()
                self._running[key] = now
                return key, max(0.0, now - due)
            try:
                await asyncio.wait_for(self._wake.wait(), wait)
            except TimeoutError:
                continue

    def done(
        self,
        key: Key,
        *,
        failed: bool = False,
        retry_after_seconds: float | None = None,
        requeue_after_seconds: float | None = None,
    ) -> None:
        """End a run of ``key``.

        failed: the key comes back after its backoff, but not before ``retry_after_seconds`` (what
        the API server asked for). requeue_after_seconds: come back then though all went well.
        """
        del self._running[key]
        again = self._again.pop(key, None)
        if failed:
            delay = max(self._backoff(key), retry_after_seconds or 0.0)
            self._floor[key] = self.clock() + min(delay, self.limits.event_floor_seconds)
            self.add(key, delay)
        else:
            self.forget(key)
        if again is not None:
            floor = self._floor.get(key, -math.inf)
            self._ask(key, *(max(one, floor) for one in again))
        if requeue_after_seconds is not None:
            self.add(key, requeue_after_seconds)

    def forget(self, key: Key) -> None:
        """Drop what is remembered of a key's failures."""
        self._failures.pop(key, None)
        self._floor.pop(key, None)

    def depth(self) -> int:
        """Keys that are due now and wait for a worker."""
        now = self.clock()
        return sum(1 for _, due in self._due.values() if due <= now)

    def oldest_seconds(self) -> float:
        """Age of the longest overdue or longest running key; 0 when there is none."""
        now = self.clock()
        waiting = (due for _, due in self._due.values())
        return max(0.0, now - min([*waiting, *self._running.values()], default=now))

    def _backoff(self, key: Key) -> float:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        full = min(self.limits.cap_seconds, self.limits.base_seconds * 2.0 ** min(count - 1, 30))
        # Full jitter: keys that failed together must not come back together.
        return max(self.limits.base_seconds, full * self.rand())

    def _seconds_to_next(self) -> float | None:
        """Seconds until a key may be handed out, <= 0 for now, None for an empty queue."""
        nothing = (math.nan, math.nan)
        while self._heap and self._due.get(self._heap[0][1], nothing)[0] != self._heap[0][0]:
            heapq.heappop(self._heap)  # superseded by an earlier request
        if not self._heap:
            return None
        _, due = self._due[self._heap[0][1]]
        return max(due - self.clock(), self._bucket.wait_seconds())
