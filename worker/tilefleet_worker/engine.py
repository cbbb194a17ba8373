"""The engine: one thread that turns requests into tokens, with an inbox and an outbox."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import EngineError
from tilefleet_worker.pipeline import Pipeline, StepRunner
from tilefleet_worker.request import Delta, FinishReason, Refusal, Request
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.stats import EngineInfo, EngineStats, StepLog
from tilefleet_worker.step import StepPlan
from tilefleet_worker.watchdog import Watchdog

LOGGER = logging.getLogger(__name__)

MAX_FINISH_TIMES = 64
MAX_RETRY_AFTER_SECONDS = 60

Sink = Callable[[list[Delta]], None]
Message = Request | tuple[str, Literal["abort", "stop"]]


class Engine:
    """Owns the thread, the scheduler and the runner; knows nothing of HTTP, text or tensors.

    `submit`, `abort`, `stats`, `stall` and `drain` may be called from any thread. The sink is
    called on the engine's thread with all deltas of a step; it must not block. Every accepted
    request gets exactly one delta with a finish reason, whatever happens.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: StepRunner,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
        info: EngineInfo | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        """on_stop: called once the engine's thread has ended, to give back what is behind it."""
        self.config = config
        self.info = info or EngineInfo(
            scheduler.vocab_size, scheduler.max_model_len, scheduler.pool.block_size
        )
        self._pipeline = Pipeline(runner, scheduler, clock)
        self._scheduler = scheduler
        self._clock = clock
        self._on_stop = on_stop
        self._watchdog = Watchdog(config.stall_seconds)
        self._sink: Sink = _discard
        self._wake = threading.Condition()
        # Under _wake: a Request is to be added; (id, reason) ends one.
        self._inbox: deque[Message] = deque()
        self._inflight: set[str] = set()
        self._stopping = False
        self._draining = False
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._started_seconds = clock()
        self._progress_seconds = clock()
        self._last_step_seconds: float | None = None
        self._steps = StepLog()
        self._finish_times: deque[float] = deque(maxlen=MAX_FINISH_TIMES)
        self._num_arrivals = 0
        # When requests left the queue, until their first delta; the engine's thread only.
        self._started: dict[str, float] = {}
        self._scheduler_gauges = scheduler.gauges()

    # Any thread ---------------------------------------------------------------------------------

    def set_sink(self, sink: Sink) -> None:
        """Name the receiver of deltas. Call it before `start`."""
        self._sink = sink

    def start(self) -> None:
        """Start the engine's thread. Raises EngineError when it was started before."""
        if self._thread is not None:
            raise EngineError("The engine was started before: build a new one instead.")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Refusal | None:
        """Accept a request, or say at once why not. Deltas follow through the sink."""
        refusal = self._scheduler.refusal(request)
        if refusal is not None:
            return refusal
        with self._wake:
            refusal = self._refuse_now(request)
            if refusal is not None:
                return refusal
            if not self._inflight:
                self._progress_seconds = self._clock()
            self._inflight.add(request.request_id)
            self._num_arrivals += 1
            self._inbox.append(request)
            self._wake.notify()
        return None

    def abort(self, request_id: str, reason: Literal["abort", "stop"] = "abort") -> None:
        """End a request early. Unknown and finished ids are ignored.

        reason: "stop" when its answer is complete, which only a reader of its text can see.
        """
        with self._wake:
            if request_id in self._inflight:
                self._inbox.append((request_id, reason))
                self._wake.notify()

    def drain(self) -> None:
        """Refuse new requests with 503 from now on; those accepted go on to their end."""
        with self._wake:
            self._draining = True

    @property
    def draining(self) -> bool:
        """True once `drain` was called."""
        return self._draining

    @property
    def num_inflight(self) -> int:
        """Requests accepted and not finished."""
        return len(self._inflight)

    @property
    def failure(self) -> str | None:
        """Why the engine ended for good, or None."""
        return self._failure

    @property
    def last_step_seconds(self) -> float | None:
        """When the last step finished, on the engine's clock; None before the first."""
        return self._last_step_seconds

    def stall(self) -> str | None:
        """Say why `/livez` should fail, or None. Load alone is never a reason."""
        if self._failure is not None:
            return self._failure
        with self._wake:
            waited = self._clock() - self._progress_seconds if self._inflight else 0.0
            slowest = self._steps.slowest_seconds
        return self._watchdog.stall(waited, slowest)

    def stats(self) -> EngineStats:
        """All counters, gauges and recent steps, consistent with one another."""
        with self._wake:
            scheduler = self._scheduler_gauges
            new = [message for message in self._inbox if isinstance(message, Request)]
            arrivals = [request.arrival_seconds for request in new]
            if scheduler.oldest_arrival_seconds is not None:
                arrivals.append(scheduler.oldest_arrival_seconds)
            gauges = {
                "running": scheduler.running,
                "waiting": scheduler.waiting + len(new),
                "waiting_prompt_tokens": scheduler.waiting_prompt_tokens
                + sum(len(request.prompt_token_ids) for request in new),
                "oldest_wait_seconds": max(0.0, self._clock() - min(arrivals)) if arrivals else 0.0,
                "kv_blocks_total": scheduler.blocks_total,
                "kv_blocks_used": scheduler.blocks_used,
                "kv_blocks_cached": scheduler.blocks_cached,
                "kv_tokens_wasted": scheduler.tokens_wasted,
                "max_concurrent": self._scheduler.max_concurrent,
                "max_model_len": self._scheduler.max_model_len,
            }
            counters = {
                "arrivals": self._num_arrivals,
                "steps": self._steps.count,
                "busy_seconds": self._steps.busy_seconds,
                **scheduler.counts,
            }
            return EngineStats(
                counters, gauges, self._steps.newest, self._steps.histograms(),
                scheduler.bytes_by_cause,
            )  # fmt: skip

    def fail(self, failure: str) -> None:
        """Note that the engine cannot go on, though its thread may be stuck or waiting for work.

        Requests in flight get their last delta from the thread, if it ever returns.
        """
        with self._wake:
            self._failure = self._failure or failure
            self._stopping = True
            self._wake.notify()

    def stop(self, timeout_seconds: float = 30.0) -> None:
        """Abort what is in flight and end the thread. Idempotent.

        Raises EngineError when the thread is still in a step after `timeout_seconds`.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                raise EngineError(
                    f"The engine's thread did not end within {timeout_seconds:.0f} s."
                )
        if self._on_stop is not None:
            self._on_stop()

    def _refuse_now(self, request: Request) -> Refusal | None:
        """What depends on the moment: failure, drain, a reused id, a full queue. Holds _wake."""
        if self._failure is not None:
            return Refusal(503, "engine_failed", f"The engine ended: {self._failure}", None, 5)
        if self._draining or self._stopping:
            message = "This worker is shutting down: send the request to another one."
            return Refusal(503, "draining", message, None, 1)
        if request.request_id in self._inflight:
            message = f"Request id {request.request_id!r} is in flight: use another one."
            return Refusal(400, "duplicate_request_id", message, None)
        limit = self.config.max_concurrent + self.config.max_waiting
        if len(self._inflight) >= limit:
            message = f"{limit} requests are in flight, which is the limit: try again later."
            return Refusal(429, "queue_full", message, None, self._retry_after_seconds())
        return None

    def _retry_after_seconds(self) -> int:
        """Whole seconds until one more request is likely to have ended."""
        if len(self._finish_times) < 2:
            return 1
        per_request = (self._clock() - self._finish_times[0]) / len(self._finish_times)
        return min(MAX_RETRY_AFTER_SECONDS, max(1, math.ceil(per_request)))

    # The engine's thread ------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while (messages := self._next_messages()) is not None:
                self._publish(self._turn(messages))
            self._pipeline.drain()
            reason: FinishReason = "abort" if self._failure is None else "error"
            self._publish(self._scheduler.end_all(reason, self._failure))
        except Exception as error:
            LOGGER.exception("the engine ended")
            self._end(f"{type(error).__name__}: {error}")
        finally:
            self._abandon()

    def _next_messages(self) -> list[Message] | None:
        """Wait for something to do. None means stop."""
        with self._wake:
            while not (self._stopping or self._inbox or self._has_work()):
                self._wake.wait()
            if self._stopping:
                return None
            messages = list(self._inbox)
            self._inbox.clear()
            return messages

    def _has_work(self) -> bool:
        return self._scheduler.has_work or self._pipeline.busy

    def _turn(self, messages: list[Message]) -> list[Delta]:
        """Apply what arrived between steps, then let the pipeline make one."""
        began = self._clock()
        deltas: list[Delta] = []
        for message in messages:
            if isinstance(message, tuple):
                deltas += self._scheduler.abort(*message)
            else:
                deltas += self._add(message)
        deltas += self._scheduler.expire(began)
        made, steps = self._pipeline.turn(began)
        self._record(steps, began)
        return deltas + made

    def _add(self, request: Request) -> list[Delta]:
        """Hand a request to the scheduler. Whatever that raises ends this request alone."""
        try:
            refusal = self._scheduler.enqueue(request)
        except Exception as error:
            LOGGER.exception("request %s could not be added", request.request_id)
            return self._scheduler.fail(request.request_id, f"{type(error).__name__}: {error}")
        if refusal is None:
            return []
        return self._scheduler.fail(request.request_id, refusal.message)

    def _record(self, steps: list[tuple[StepPlan, float]], began: float) -> None:
        gauges = self._scheduler.gauges()
        now = self._clock()
        for request_id in self._scheduler.take_started():
            self._started[request_id] = began
        with self._wake:
            self._scheduler_gauges = gauges
            for plan, seconds in steps:
                self._steps.add(plan, seconds)
                self._last_step_seconds = self._progress_seconds = now

    def _publish(self, deltas: list[Delta]) -> None:
        """Pass deltas on. A sink that raises must not end anybody's request."""
        if not deltas:
            return
        finished = [delta.request_id for delta in deltas if delta.finish_reason is not None]
        if self._started:
            deltas = [self._with_start(delta) for delta in deltas]
        now = self._clock()
        with self._wake:
            self._inflight.difference_update(finished)
            self._finish_times.extend(now for _ in finished)
        try:
            self._sink(deltas)
        except Exception:
            LOGGER.exception("the sink raised; %d deltas may be lost", len(deltas))

    def _with_start(self, delta: Delta) -> Delta:
        began = self._started.pop(delta.request_id, None)
        return delta if began is None else delta._replace(started_seconds=began)

    def _end(self, failure: str) -> None:
        """Fail everything in flight: the engine cannot go on."""
        with self._wake:
            failure = self._failure = self._failure or failure
        try:
            deltas = self._scheduler.end_all("error", failure)
        except Exception:
            LOGGER.exception("the scheduler could not end its requests")
            deltas = []
        self._publish(deltas)

    def _abandon(self) -> None:
        """Answer what never reached the scheduler, or was lost by it: nobody waits for ever."""
        with self._wake:
            left = sorted(self._inflight)
            self._inbox.clear()
        reason = self._failure
        finish: FinishReason = "abort" if reason is None else "error"
        self._publish([Delta(request_id, (), finish, reason) for request_id in left])


def _discard(deltas: list[Delta]) -> None:
    """The sink before `set_sink`: a benchmark without a reader needs none."""
