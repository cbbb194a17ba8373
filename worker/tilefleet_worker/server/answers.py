"""Answers in progress: deltas of the engine become text, in order, until each has its end.

The engine's thread posts deltas; everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tilefleet_worker.engine import Engine
from tilefleet_worker.request import Delta, Request
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.replies import ApiError, draining, internal_error
from tilefleet_worker.stop_strings import StopMatcher

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Detokenizer

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta added to an answer. `end` is set on the last piece."""

    index: int
    text: str
    end: EndReason | None


class Answer:
    """The text of one request: detokenised, cut at stop strings, counted."""

    def __init__(
        self, index: int, request: Request, detokenizer: Detokenizer, stops: Sequence[str]
    ) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.started_seconds = time.monotonic()
        self.first_token_seconds: float | None = None
        self.last_token_seconds = self.started_seconds
        self.end: EndReason | None = None
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)

    def take(self, delta: Delta) -> Piece:
        """The piece that a delta adds. Sets `end`, by the delta's reason or by a stop string."""
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        visible = len(delta.token_ids) - (delta.finish_reason == "stop")
        text = ""
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            # The token that stopped the request has no text, even if it is an ordinary one.
            piece = self._detokenizer.push([token_id]) if position < visible else ""
            text += self._shown(piece)
            if self._matcher.matched is not None:
                self.end = "stop"
                return Piece(self.index, text, "stop")
        if delta.finish_reason in ("stop", "length"):
            text += self._matcher.push(self._detokenizer.finish())
            text += self._matcher.finish()
            self.end = "stop" if self._matcher.matched is not None else delta.finish_reason
        return Piece(self.index, text, self.end)

    def _shown(self, piece: str) -> str:
        """Text that may be shown; stop strings count only after min_tokens tokens."""
        if self.num_tokens <= self.request.params.min_tokens:
            return piece
        return self._matcher.push(piece)


class Job:
    """The answers of one HTTP request: `submit` once, read `pieces`, and always `close`."""

    def __init__(self, desk: AnswerDesk, answers: Sequence[Answer]) -> None:
        self.answers = tuple(answers)
        self._desk = desk
        self._by_id = {answer.request.request_id: answer for answer in answers}
        self._queue: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self._submitted: list[Answer] = []
        self._failure: ApiError | None = None

    def submit(self) -> None:
        """Hand all answers to the engine. Raises ApiError when it refuses one; none then stays."""
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
        if delta.finish_reason in ("error", "abort"):
            raise self._fail(internal_error())
        metrics = self._desk.metrics
        metrics.tokens(answer, len(delta.token_ids), time.monotonic())
        piece = answer.take(delta)
        if piece.end is not None:
            metrics.finish(answer, piece.end)
            self._desk.release(answer.request.request_id)
        return piece

    def usage(self) -> dict[str, object]:
        """The `usage` object over all answers: tokens, including those without text."""
        prompt = sum(len(answer.request.prompt_token_ids) for answer in self.answers)
        completion = sum(answer.num_tokens for answer in self.answers)
        cached = sum(answer.num_cached_tokens for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


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

    def release(self, request_id: str) -> None:
        """Forget an answer and abort it in the engine; harmless when it has ended."""
        if self._queues.pop(request_id, None) is not None and self._engine is not None:
            self._engine.abort(request_id)

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


def not_ready() -> ApiError:
    """503 for a worker that is still loading its model."""
    return ApiError(503, "not_ready", "This worker is still loading its model: try again.", None, 5)
