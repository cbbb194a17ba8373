"""Draining: the order in which a worker stops taking and finishing work.

Not ready first; then, after the removal delay, new requests get 503; then what runs may finish;
what still runs at the deadline is ended with an error event. It ends by count, not by the clock.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tilefleet_worker.server.answers import AnswerDesk
from tilefleet_worker.server.state import WorkerState

LOGGER = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
# After the cut, streams need a moment to write their last event.
_FLUSH_SECONDS = 5.0


class Drain:
    """The drain of one worker. Begins once; later calls can only shorten it."""

    def __init__(self, state: WorkerState, desk: AnswerDesk) -> None:
        self._state = state
        self._desk = desk
        self._task: asyncio.Task[None] | None = None
        self._deadline_seconds = 0.0

    @property
    def num_inflight(self) -> int:
        """Answers that clients still wait for."""
        return self._desk.num_open

    def begin(self, timeout_seconds: float) -> asyncio.Task[None]:
        """Start draining, or bring the deadline of a running drain forward.

        timeout_seconds: longest wait for running requests, counted from the end of the removal
        delay. The task ends when nothing is in flight.
        """
        deadline = time.monotonic() + self._state.config.removal_delay + timeout_seconds
        if self._task is None:
            self._deadline_seconds = deadline
            self._state.draining = True
            self._task = asyncio.get_running_loop().create_task(self._run())
        self._deadline_seconds = min(self._deadline_seconds, deadline)
        return self._task

    def hurry(self) -> None:
        """Cut everything now."""
        self._deadline_seconds = 0.0

    async def _run(self) -> None:
        LOGGER.info("drain begins: %d in flight", self._desk.num_open)
        await self._removal_delay()
        self._state.accepting = False
        if self._state.service is not None:
            self._state.service.engine.drain()
        while self._desk.num_open and time.monotonic() < self._deadline_seconds:
            await asyncio.sleep(_POLL_SECONDS)
        await self._cut()
        LOGGER.info("drain done")

    async def _removal_delay(self) -> None:
        """Keep accepting while routers learn that this worker is not ready."""
        end = time.monotonic() + self._state.config.removal_delay
        while time.monotonic() < min(end, self._deadline_seconds):
            await asyncio.sleep(_POLL_SECONDS)

    async def _cut(self) -> None:
        left = self._desk.num_open
        if not left:
            return
        LOGGER.warning("drain deadline: %d answers are cut", left)
        self._desk.cut()
        end = time.monotonic() + _FLUSH_SECONDS
        while self._desk.num_open and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
