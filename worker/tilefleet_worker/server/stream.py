"""Replies that take time: server-sent events and whole answers, both ended by a client that leaves.

A stream that fails after its headers gets an error event before `[DONE]`: clients take a body that
just ends for a complete answer.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tilefleet_worker.server.answer import Answer, Piece
from tilefleet_worker.server.answers import Job
from tilefleet_worker.server.formats import Envelope, event, joined
from tilefleet_worker.server.protocol import StreamOptions
from tilefleet_worker.server.replies import ApiError, error_body, internal_error

LOGGER = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx holds back a response that it may buffer; this asks it not to.
    (b"x-accel-buffering", b"no"),
]

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection before the reply was complete."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone then.

    The request's body must have been read: the next message can then only be a disconnect.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JobStream(Response, ABC):
    """Streams a submitted job. Owns it: whatever happens, the job is closed.

    How the events are worded is up to the subclass.
    """

    def __init__(self, job: Job, keep_alive_seconds: float = KEEP_ALIVE_SECONDS) -> None:
        """keep_alive_seconds: an idle stream gets a comment line that often, for proxies."""
        super().__init__()
        self._job = job
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send headers and events until the end, an error, or the client's leave."""
        try:
            await until_disconnect(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._job.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for data in self._events():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        if opening := self.opening():
            yield opening
        try:
            async for piece in self._job.pieces(self._keep_alive_seconds):
                data = KEEP_ALIVE if piece is None else self.written(piece)
                if data:
                    yield data
        except ApiError as error:
            yield self.failure(error)
        except Exception:
            LOGGER.exception("a stream failed")
            yield self.failure(internal_error())
        else:
            yield self.ending()

    def opening(self) -> bytes:
        """Events before the first piece."""
        return b""

    @abstractmethod
    def written(self, piece: Piece) -> bytes:
        """Events of a piece; may be empty."""

    @abstractmethod
    def ending(self) -> bytes:
        """Events after the last piece."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """Events that end a stream that cannot go on."""


class EventStream(JobStream):
    """The events of chat and text completions."""

    def __init__(
        self,
        job: Job,
        envelope: Envelope,
        options: StreamOptions,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        super().__init__(job, keep_alive_seconds)
        self._envelope = envelope
        self._options = options
        self._opened: set[int] = set()

    def written(self, piece: Piece) -> bytes:
        """One event a choice, the role of an answer first."""
        words = self._envelope.format
        choices = [] if piece.index in self._opened else words.opening(piece.index)
        self._opened.add(piece.index)
        return b"".join(self._event([choice]) for choice in choices + words.chunks(piece))

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        body = self._envelope.chunk(choices)
        if self._options.continuous_usage_stats:
            body["usage"] = self._job.usage()
        elif self._options.include_usage:
            body["usage"] = None
        return event(body)

    def ending(self) -> bytes:
        """The usage, if it is wanted, and the mark of the end."""
        if not self._options.include_usage:
            return DONE
        return event(self._envelope.chunk([]) | {"usage": self._job.usage()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        """An error event: a body that just ends is taken for a complete answer."""
        return event(error_body(error)) + DONE


async def whole_pieces(job: Job, receive: Receive) -> list[list[Piece]]:
    """All pieces of each answer of a submitted job, which it closes.

    Raises ApiError when the job fails and ClientGone when nobody waits for it any more.
    """
    try:
        return await until_disconnect(receive, _collect(job))
    finally:
        job.close()


async def whole_reply(
    job: Job, envelope: Envelope, receive: Receive, num_best: int | None = None
) -> dict[str, Any]:
    """The complete reply of a submitted job, which it closes.

    num_best: show only that many answers to each prompt, the likeliest ones a token.
    Raises what `whole_pieces` raises.
    """
    pieces = await whole_pieces(job, receive)
    kept = job.answers if num_best is None else best_of(job.answers, num_best)
    choices = []
    for index, answer in enumerate(kept):
        piece = replace(joined(pieces[answer.index]), index=index)
        choices.append(envelope.format.whole(answer, piece))
    return envelope.whole(choices, job.usage())


async def _collect(job: Job) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in job.answers]
    async for piece in job.pieces(KEEP_ALIVE_SECONDS):
        if piece is not None:
            pieces[piece.index].append(piece)
    return pieces


def best_of(answers: Sequence[Answer], num_best: int) -> list[Answer]:
    """Of the answers to each prompt those with the highest log probability a token, best first."""
    groups: list[list[Answer]] = []
    for answer in answers:
        if answer.counts_prompt:
            groups.append([])
        groups[-1].append(answer)
    return [a for group in groups for a in sorted(group, key=_unlikeliness)[:num_best]]


def _unlikeliness(answer: Answer) -> float:
    return -answer.total_logprob / max(1, answer.num_tokens)
