"""The JSON of /v1/responses: output items, and the events that announce them piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from tilefleet_worker.output_parser import CallArguments, CallBegins, Part, Said, Thought
from tilefleet_worker.server.answer import Piece
from tilefleet_worker.server.answers import Job
from tilefleet_worker.server.chat_format import Reader, call_id
from tilefleet_worker.server.formats import event as sse_event
from tilefleet_worker.server.replies import ApiError
from tilefleet_worker.server.response_request import ResponseRequest
from tilefleet_worker.server.stream import JobStream

Event = dict[str, Any]


class _Item:
    """One output item in progress: a message, reasoning, or a call."""

    def __init__(self, part: Part, place: int) -> None:
        self.place = place
        self.text = ""
        self.kind = type(part)
        self.call_index = getattr(part, "index", None)
        if isinstance(part, CallBegins):
            self.id = f"fc_{uuid.uuid4().hex}"
            self.name, self.call_id = part.name, call_id()
        else:
            self.id = f"{'msg' if isinstance(part, Said) else 'rs'}_{uuid.uuid4().hex}"

    def takes(self, part: Part) -> bool:
        """True when the part belongs to this item."""
        if isinstance(part, CallArguments):
            return self.call_index == part.index
        return not isinstance(part, CallBegins) and type(part) is self.kind

    def value(self, status: str) -> dict[str, Any]:
        """The item's object."""
        if self.kind is CallBegins:
            call = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
            return {"id": self.id, "type": "function_call", "status": status, **call}
        item: dict[str, Any] = {"id": self.id, "type": "message", "role": "assistant"}
        if self.kind is Thought:
            item = {"id": self.id, "type": "reasoning", "summary": []}
        return item | {"status": status, "content": [self.part()] if self.text else []}

    def part(self) -> dict[str, Any]:
        """The content part with the text so far."""
        if self.kind is Thought:
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def opened(self) -> Iterator[Event]:
        """Events that announce it."""
        item = self.value("in_progress")
        yield {"type": "response.output_item.added", "output_index": self.place, "item": item}
        if self.kind is not CallBegins:
            yield self._content("response.content_part.added") | {"part": self.part()}

    def delta(self, text: str) -> Event:
        """The event of a further piece of text."""
        self.text += text
        if self.kind is CallBegins:
            return self._at("response.function_call_arguments.delta") | {"delta": text}
        if self.kind is Thought:
            return self._content("response.reasoning_text.delta") | {"delta": text}
        event = self._content("response.output_text.delta")
        return event | {"delta": text, "logprobs": []}

    def closed(self) -> Iterator[Event]:
        """Events that end it."""
        if self.kind is CallBegins:
            done: Event = {"arguments": self.text, "name": self.name}
            yield self._at("response.function_call_arguments.done") | done
        elif self.kind is Thought:
            yield self._content("response.reasoning_text.done") | {"text": self.text}
        else:
            done = {"text": self.text, "logprobs": []}
            yield self._content("response.output_text.done") | done
        if self.kind is not CallBegins:
            yield self._content("response.content_part.done") | {"part": self.part()}
        item = self.value("completed")
        yield {"type": "response.output_item.done", "output_index": self.place, "item": item}

    def _at(self, kind: str) -> Event:
        return {"type": kind, "item_id": self.id, "output_index": self.place}

    def _content(self, kind: str) -> Event:
        return self._at(kind) | {"content_index": 0}


class ResponseBuilder:
    """Builds one response from the pieces of its answer."""

    def __init__(self, body: ResponseRequest, reader: Reader, model: str) -> None:
        self._body = body
        self._reader = reader
        self._model = model
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._done: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._end: str | None = None

    def take(self, piece: Piece) -> Iterator[Event]:
        """Events of a piece of the answer."""
        for part in self._reader.parts(piece):
            if self._open is None or not self._open.takes(part):
                yield from self._close()
                self._open = _Item(part, len(self._done))
                yield from self._open.opened()
            text = "" if isinstance(part, CallBegins) else part.text
            if text:
                yield self._open.delta(text)
        if piece.end is not None:
            self._end = piece.end
            yield from self._close()

    def _close(self) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.closed()
            self._done.append(self._open.value("completed"))
            self._open = None

    def response(
        self, usage: Mapping[str, Any] | None = None, error: ApiError | None = None
    ) -> dict[str, Any]:
        """The response so far; with its usage it is complete."""
        body = self._body
        status = "in_progress" if usage is None else "completed"
        cut = self._end == "length"
        if error is not None:
            status = "failed"
        elif usage is not None and cut:
            status = "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self._model,
            "output": list(self._done),
            "usage": None if usage is None else _usage(usage),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **_echoed(body),
        }


def _echoed(body: ResponseRequest) -> dict[str, Any]:
    """The fields of the request that a response repeats."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    text = given["text"] or {}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": given["tool_choice"],
        "tools": [{"strict": None, **tool} for tool in given["tools"]],
        "text": {"format": {"type": "text"}} | text,
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


class ResponseStream(JobStream):
    """The numbered, named events of a streamed response."""

    def __init__(self, job: Job, builder: ResponseBuilder) -> None:
        super().__init__(job)
        self._builder = builder
        self._number = 0

    def opening(self) -> bytes:
        """The response before its first item."""
        response = self._builder.response()
        events = ("response.created", "response.in_progress")
        return b"".join(self._event({"type": kind, "response": response}) for kind in events)

    def written(self, piece: Piece) -> bytes:
        """Events of the items that a piece touches."""
        return b"".join(map(self._event, self._builder.take(piece)))

    def ending(self) -> bytes:
        """The whole response."""
        response = self._builder.response(self._job.usage())
        return self._event({"type": f"response.{response['status']}", "response": response})

    def failure(self, error: ApiError) -> bytes:
        """The error, and the response as far as it came."""
        response = self._builder.response(error=error)
        failed = {"type": "response.failed", "response": response}
        event = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return self._event(failed) + self._event(event)

    def _event(self, event: Event) -> bytes:
        numbered = event | {"sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\n".encode() + sse_event(numbered)
