"""The body of POST /v1/responses, and the chat that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from tilefleet_worker.request import MAX_SEED, MAX_TOP_K
from tilefleet_worker.server.limits import MAX_TOOLS
from tilefleet_worker.server.messages import (
    CalledFunction,
    Function,
    FunctionName,
    Message,
    NamedFunction,
    NamedTool,
    TextPart,
    Tool,
    ToolCall,
)
from tilefleet_worker.server.parsing import explain
from tilefleet_worker.server.protocol import ChatRequest
from tilefleet_worker.server.replies import invalid_value
from tilefleet_worker.server.structure import JsonSchema, ResponseFormat


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputMessage(_Model):
    """A message of the conversation; also one that an earlier response returned."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[OutputPart | TextPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def as_message(self) -> Message:
        """As chat knows it."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        return Message(role=self.role, content="\n".join(part.text for part in self.content))


class OutputPart(_Model):
    """A text part of a message that an earlier response returned."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(default=[])
    logprobs: list[Any] = Field(default=[])


class InputCall(_Model):
    """A call that an earlier response returned."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: str | None = None

    def as_message(self) -> Message:
        """As chat knows it."""
        function = CalledFunction(name=self.name, arguments=self.arguments)
        return Message(role="assistant", tool_calls=[ToolCall(id=self.call_id, function=function)])


class InputResult(_Model):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None

    def as_message(self) -> Message:
        """As chat knows it."""
        return Message(role="tool", content=self.output, tool_call_id=self.call_id)


class InputReasoning(_Model):
    """Reasoning that an earlier response returned: models do not read their own again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = Field(default=[])
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None

    def as_message(self) -> None:
        """Nothing."""


def _kind(item: Any) -> str:
    """Name of the union's branch: items without a type are messages."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "")
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseTool(Function):
    """A function that the model may call; here its fields are not nested."""

    type: Literal["function"]


class ResponseNamedTool(_Model):
    """The function that the model must call."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(_Model):
    """What the text of the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = None


class TextOptions(_Model):
    """`text` of a request."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(_Model):
    """`reasoning` of a request."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(_Model):
    """Body of POST /v1/responses: the part about text. Nothing is stored."""

    model: str
    input: Annotated[str, Field(min_length=1)] | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=MAX_TOP_K)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stream: bool = False
    tools: list[ResponseTool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    cache_salt: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9._-]*$")

    def as_chat(self) -> ChatRequest:
        """The chat that this asks for. Raises ApiError 400 when there can be no such chat."""
        try:
            return self._chat()
        except ValidationError as error:
            raise explain(error) from None

    def _chat(self) -> ChatRequest:
        choice: Any = self.tool_choice
        if isinstance(choice, ResponseNamedTool):
            choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
        return ChatRequest(
            model=self.model,
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stream=self.stream,
            tools=[_nested(tool) for tool in self.tools],
            tool_choice=choice if self.tools else None,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._response_format(),
            reasoning_effort=self.reasoning.effort,
            cache_salt=self.cache_salt,
        )

    def _messages(self) -> list[Message]:
        found = []
        if self.instructions:
            found.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*found, Message(role="user", content=self.input)]
        messages = (item.as_message() for item in self.input)
        found += [message for message in messages if message is not None]
        if not found:
            raise invalid_value("input", "input holds no message, only reasoning: add one.")
        return found

    def _response_format(self) -> ResponseFormat | None:
        wanted = self.text.format
        if wanted is None or wanted.type == "text":
            return None
        schema = JsonSchema(name=wanted.name, schema=wanted.schema_)
        return ResponseFormat(type=wanted.type, json_schema=schema)


def _nested(tool: ResponseTool) -> Tool:
    fields = tool.model_dump(exclude={"type"})
    return Tool(type="function", function=Function(**fields))


InputMessage.model_rebuild()
