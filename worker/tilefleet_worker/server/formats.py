"""The JSON of answers: chat and text completions, whole and as stream events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tilefleet_worker.server.answers import Piece


class Format(Protocol):
    """How one endpoint words its choices."""

    whole_object: str
    chunk_object: str
    id_prefix: str

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices sent before the first text of an answer, one event each."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Choices for one piece, one event each; none when it changed nothing visible."""

    def whole(self, index: int, text: str, end: str) -> dict[str, Any]:
        """The choice of a complete answer."""


class ChatFormat:
    """/v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role, once."""
        return [_chat_chunk(index, {"role": "assistant", "content": ""}, None)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Text in one event; the end in a further one with an empty delta."""
        found = [_chat_chunk(piece.index, {"content": piece.text}, None)] if piece.text else []
        if piece.end is not None:
            found.append(_chat_chunk(piece.index, {}, piece.end))
        return found

    def whole(self, index: int, text: str, end: str) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": end}


class TextFormat:
    """/v1/completions."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Nothing: a text has no role."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Text and end in one event."""
        return [self.whole(piece.index, piece.text, piece.end)] if piece.text or piece.end else []

    def whole(self, index: int, text: str, end: str | None) -> dict[str, Any]:
        """The text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": end}


def _chat_chunk(index: int, delta: Mapping[str, str], end: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": end}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all events of one reply share."""

    id: str
    created: int
    model: str
    format: Format

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The body of one stream event, without usage."""
        return self._body(self.format.chunk_object, choices)

    def whole(
        self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, object]
    ) -> dict[str, Any]:
        """The body of a complete reply."""
        return self._body(self.format.whole_object, choices) | {"usage": usage}

    def _body(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": list(choices)}


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event. JSON escapes line ends, so the event cannot be split by its text."""
    return (
        b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
