"""Answers in progress: deltas of the engine become text, in order, until each has its end.

The engine's thread posts deltas; everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from tilefleet_worker.engine import Engine
from tilefleet_worker.request import Delta, Request
from tilefleet_worker.server.answer import Answer, Piece
from tilefleet_worker.server.budget import Budget
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.replies import ApiError, draining, internal_error, not_ready, timed_out


class Job:
    """The answers of one HTTP request: `submit` once, read `pieces`, and always `close`."""

    def __init__(
        self, desk: AnswerDesk, answers: Sequence[Answer], budget: Budget | None = None
    ) -> None:
        """budget: of the key that asks; used from `submit` to `close`."""
        self._budget = budget
        self._holds_budget = False
        self.answers = tuple(answers)
        self._desk = desk
        self._by_id = {answer.request.request_id: answer for answer in answers}
        self._queue: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self._submitted: list[Answer] = []
        self._failure: ApiError | None = None

    def submit(self) -> None:
        """Hand all answers to the engine. Raises ApiError when it refuses one; none then stays.

        Raises it too when the key's budget is used up.
        """
        if self._budget is not None:
            self._budget.take(len(self.answers), self._num_prompt_tokens())
            self._holds_budget = True
        try:
            for answer in self.answers:
                self._desk.submit(answer.request, self._queue)
                self._submitted.append(answer)
        except ApiError as error:
            self._failure = error
            self.close()
            raise

    def close(self) -> None:
        """Abort in the engine what has not ended: the client is gone, or the job failed."""
        metrics = self._desk.metrics
        open_answers = [answer for answer in self._submitted if answer.end is None]
        for answer in open_answers:
            metrics.finish(answer, "abort" if self._failure is None else "error")
        if open_answers:
            metrics.fail("client_gone" if self._failure is None else self._failure.code)
        for answer in self._submitted:
            self._desk.release(answer.request.request_id)
        self._submitted = []
        if self._budget is not None and self._holds_budget:
            self._holds_budget = False
            self._budget.settle(len(self.answers), sum(a.num_tokens for a in self.answers))

    async def pieces(self, idle_seconds: float) -> AsyncIterator[Piece | None]:
        """Pieces in order of arrival until every answer has its end; None after idle seconds.

        Raises ApiError when an answer failed or the worker must end it.
        """
        left = len(self.answers)
        while left:
            item = await self._next(idle_seconds)
            if item is None:
                yield None
                continue
            if isinstance(item, ApiError):
                raise self._fail(item)
            answer = self._by_id[item.request_id]
            if answer.end is not None:
                continue  # tokens that were under way when a stop string matched
            piece = self._take(answer, item)
            left -= piece.end is not None
            yield piece

    def _fail(self, error: ApiError) -> ApiError:
        self._failure = error
        return error

    async def _next(self, idle_seconds: float) -> Delta | ApiError | None:
        try:
            async with asyncio.timeout(idle_seconds):
                return await self._queue.get()
        except TimeoutError:
            return None

    def _take(self, answer: Answer, delta: Delta) -> Piece:
        if delta.finish_reason == "timeout":
            raise self._fail(timed_out(delta.error or ""))
        if delta.finish_reason in ("error", "abort"):
            raise self._fail(internal_error())
        metrics = self._desk.metrics
        metrics.tokens(answer, len(delta.token_ids), time.monotonic())
        piece = answer.take(delta)
        if piece.end is not None:
            metrics.finish(answer, piece.end)
            self._desk.release(answer.request.request_id, ended=True)
        return piece

    def usage(self) -> dict[str, object]:
        """The `usage` object over all answers: tokens, including those without text."""
        firsts = [answer for answer in self.answers if answer.counts_prompt]
        prompt = self._num_prompt_tokens()
        completion = sum(answer.num_tokens for answer in self.answers)
        cached = sum(answer.num_cached_tokens for answer in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _num_prompt_tokens(self) -> int:
        firsts = (answer for answer in self.answers if answer.counts_prompt)
        return sum(len(answer.request.prompt_token_ids) for answer in firsts)


class AnswerDesk:
    """Where deltas find their HTTP request. One per process."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._engine: Engine | None = None
        self._queues: dict[str, asyncio.Queue[Delta | ApiError]] = {}

    def connect(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        """Receive the engine's deltas on this event loop. Call before the engine starts."""
        self._engine = engine

        def sink(deltas: list[Delta]) -> None:
            # After the loop closed nobody waits for an answer any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, deltas)

        engine.set_sink(sink)

    @property
    def num_open(self) -> int:
        """Answers that a client still waits for."""
        return len(self._queues)

    def submit(self, request: Request, queue: asyncio.Queue[Delta | ApiError]) -> None:
        """Hand a request to the engine. Raises ApiError when it refuses."""
        if self._engine is None:
            raise not_ready()
        # First the queue, then the engine: its first delta may come before submit returns.
        self._queues[request.request_id] = queue
        refusal = self._engine.submit(request)
        if refusal is not None:
            del self._queues[request.request_id]
            self.metrics.refuse(refusal.code)
            raise ApiError.of(refusal)

    def release(self, request_id: str, *, ended: bool = False) -> None:
        """Forget an answer and end it in the engine; harmless when the engine has ended it.

        ended: the answer is complete, by a stop string, and not given up.
        """
        if self._queues.pop(request_id, None) is not None and self._engine is not None:
            self._engine.abort(request_id, "stop" if ended else "abort")

    def cut(self) -> None:
        """End every open answer with a `draining` error: the drain's time is over."""
        for queue in self._queues.values():
            queue.put_nowait(draining())

    def _deliver(self, deltas: list[Delta]) -> None:
        queues: Mapping[str, asyncio.Queue[Delta | ApiError]] = self._queues
        for delta in deltas:
            queue = queues.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)
