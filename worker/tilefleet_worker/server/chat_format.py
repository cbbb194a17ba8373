"""The JSON of chat completions: text, reasoning and tool calls, whole and as stream events."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tilefleet_worker.output_parser import (
    CallArguments,
    CallBegins,
    OutputParser,
    Part,
    Plain,
    Said,
    Thought,
)
from tilefleet_worker.server.answer import Answer, Piece
from tilefleet_worker.server.formats import prompt_scores
from tilefleet_worker.server.logprob_format import chat_logprobs

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Tokenizer


class Reader:
    """Turns the pieces of one answer into parts, and remembers what they mean for its end."""

    def __init__(
        self, parser: OutputParser, *, several_calls: bool = True, named_call: bool = False
    ) -> None:
        """several_calls: False drops every call but the first. named_call: the caller chose it."""
        self._parser = parser
        self._named_call = named_call
        self._several_calls = several_calls
        self.called = False

    def parts(self, piece: Piece) -> list[Part]:
        """Parts that a piece completes."""
        found = self._parser.push(piece.text) if piece.text else []
        if piece.end is not None:
            found += self._parser.finish()
        if not self._several_calls:
            found = [part for part in found if getattr(part, "index", 0) == 0]
        self.called |= any(isinstance(part, CallBegins) for part in found)
        return found

    def finish_reason(self, end: str | None) -> str | None:
        """As OpenAI words it: an answer that chose to call tools did not just stop."""
        chose = self.called and not self._named_call
        return "tool_calls" if end == "stop" and chose else end


class ChatFormat:
    """/v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        logprobs: bool = False,
        make_parser: Callable[[], OutputParser] = Plain,
        several_calls: bool = True,
        named_call: bool = False,
        include_reasoning: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._make_parser = make_parser
        self._calls = {"several_calls": several_calls, "named_call": named_call}
        self._include_reasoning = include_reasoning
        self._readers: dict[int, Reader] = {}

    def _reader(self, index: int) -> Reader:
        if index not in self._readers:
            self._readers[index] = Reader(self._make_parser(), **self._calls)
        return self._readers[index]

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role, once."""
        return [_chunk(index, {"role": "assistant", "content": ""}, None)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Each part in an event; the end in a further one with an empty delta."""
        reader = self._reader(piece.index)
        deltas = [delta for part in reader.parts(piece) if (delta := self._delta(part))]
        logprobs = self._logprobs_of(piece)
        if logprobs is not None and not deltas:
            deltas = [{"content": ""}]
        found = [_chunk(piece.index, delta, None) for delta in deltas]
        if logprobs is not None:
            found[0]["logprobs"] = logprobs
        if piece.end is not None:
            found.append(_chunk(piece.index, {}, reader.finish_reason(piece.end)))
        return found

    def _delta(self, part: Part) -> dict[str, Any] | None:
        match part:
            case Said(text):
                return {"content": text}
            case Thought(text):
                thought = {"reasoning_content": text, "reasoning": text}
                return thought if self._include_reasoning else None
            case CallBegins(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id(), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def whole(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        """The message."""
        reader = self._reader(answer.index)
        choice = {
            "index": piece.index,
            "message": self._message(reader.parts(piece)),
            "logprobs": self._logprobs_of(piece),
            "finish_reason": reader.finish_reason(piece.end),
        }
        return choice | prompt_scores(self._tokenizer, answer, piece)

    def _message(self, parts: list[Part]) -> dict[str, Any]:
        calls = [
            {"id": call_id(), "type": "function", "function": {"name": name, "arguments": text}}
            for name, text in calls_of(parts)
        ]
        said, thought = text_of(parts, Said), text_of(parts, Thought)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if calls:
            message |= {"content": said or None, "tool_calls": calls}
        if thought and self._include_reasoning:
            message |= {"reasoning_content": thought, "reasoning": thought}
        return message

    def _logprobs_of(self, piece: Piece) -> dict[str, Any] | None:
        wanted = self._logprobs and piece.logprobs
        return chat_logprobs(self._tokenizer, piece.logprobs) if wanted else None


def call_id() -> str:
    """A fresh id of a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def text_of(parts: Iterable[Part], kind: type[Said] | type[Thought]) -> str:
    """All text of one kind of part, joined."""
    return "".join(part.text for part in parts if isinstance(part, kind))


def calls_of(parts: Iterable[Part]) -> list[tuple[str, str]]:
    """(name, JSON text of the arguments) of each call."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for part in parts:
        if isinstance(part, CallBegins):
            names[part.index] = part.name
        elif isinstance(part, CallArguments):
            arguments[part.index] = arguments.get(part.index, "") + part.text
    return [(name, arguments.get(index, "")) for index, name in names.items()]


def _chunk(index: int, delta: dict[str, Any], end: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": end}
