"""Conversations: messages, tools and calls, as clients send them and as templates read them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Model):
    """One part of a message; text is the only kind."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(_Model):
    """Name and arguments of a call; the arguments are JSON in a text."""

    name: FunctionName
    arguments: str = "{}"


class ToolCall(_Model):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """As templates know it: the arguments as a value, when they are valid JSON."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _needs_content(cls, value: Any) -> Any:
        """Only an assistant that calls tools may say nothing."""
        if isinstance(value, dict) and "content" not in value and not value.get("tool_calls"):
            # Validated as a field below, so that the error names it.
            return value | {"content": _Missing()}
        return value

    @property
    def text(self) -> str:
        """All text parts, joined."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: text parts joined, `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        found: dict[str, Any] = {"role": role, "content": self.text}
        if self.tool_calls:
            found["tool_calls"] = [call.for_template() for call in self.tool_calls]
        thought = self.reasoning_content or self.reasoning
        optional = {
            "tool_call_id": self.tool_call_id,
            "name": self.name if role == "tool" else None,
            "reasoning_content": thought,
        }
        return found | {name: value for name, value in optional.items() if value is not None}


class _Missing:
    """Stands where a required value is missing: no type accepts it."""


class Function(_Model):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None


class Tool(_Model):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As OpenAI's API describes it, which templates expect."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class NamedFunction(_Model):
    """A reference to a function."""

    name: FunctionName


class NamedTool(_Model):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction
