"""The JSON of answers: chat and text completions, whole and as stream events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from tilefleet_worker.server.answer import Answer, Piece
from tilefleet_worker.server.logprob_format import (
    CompletionLogprobs,
    prompt_logprobs,
)

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Tokenizer


class Format(Protocol):
    """How one endpoint words its choices. Made for one reply: it may count."""

    whole_object: str
    chunk_object: str
    id_prefix: str

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices sent before the first text of an answer, one event each."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Choices for one piece, one event each; none when it changed nothing visible."""

    def whole(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        """The choice of a complete answer, whose pieces are joined to one."""


class TextFormat:
    """/v1/completions."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        logprobs: bool = False,
        echoed: Sequence[Sequence[int]] = (),
    ) -> None:
        """echoed: tokens of the prompt of each answer, when they are a part of it."""
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echoed = echoed
        self._by_index: dict[int, CompletionLogprobs] = {}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Nothing: a text has no role."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Text and end in one event."""
        shown = piece.text or piece.end or (self._logprobs and piece.logprobs)
        return [self._choice(piece, piece.index)] if shown else []

    def whole(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        """The text."""
        return self._choice(piece, answer.index) | prompt_scores(self._tokenizer, answer, piece)

    def _choice(self, piece: Piece, place: int) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs_of(piece, place) if self._logprobs else None,
            "finish_reason": piece.end,
        }

    def _logprobs_of(self, piece: Piece, place: int) -> dict[str, Any]:
        """place: index of the answer; that of its choice may differ with best_of."""
        first = place not in self._by_index
        words = self._by_index.setdefault(place, CompletionLogprobs(self._tokenizer))
        if not (first and self._echoed):
            return words.of(piece.logprobs)
        return words.of((*piece.prompt_logprobs, *piece.logprobs), self._echoed[place])


def prompt_scores(tokenizer: Tokenizer, answer: Answer, piece: Piece) -> dict[str, Any]:
    """`prompt_logprobs` of a choice, if they were asked for."""
    if not answer.shows_prompt_logprobs:
        return {}
    return {"prompt_logprobs": prompt_logprobs(tokenizer, piece.prompt_logprobs)}


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one answer as one."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
    )


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


# Line ends that JSON need not escape and the SSE format does not know, but at which readers that
# split text with Python's splitlines (httpx's iter_lines among them) would cut an event.
_LINE_ENDS = str.maketrans({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event. All line ends are escaped, so its text cannot split it."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_ENDS)}\n\n".encode()
