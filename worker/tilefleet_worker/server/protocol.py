"""What a client may send: the bodies of port 8000 as checked values.

Three classes of fields: implemented; accepted without effect; all others are refused (parsing.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tilefleet_worker.request import MAX_LOGPROBS, MAX_SEED, MAX_TOP_K
from tilefleet_worker.server.limits import (
    MAX_BAD_WORDS,
    MAX_BIASED_TOKENS,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TIMEOUT_SECONDS,
    MAX_TOOLS,
)
from tilefleet_worker.server.messages import Message, NamedTool, Tool
from tilefleet_worker.server.structure import Structured

# What clients of reasoning models hand to the template; everything else is the server's own.
TemplateName = Literal["enable_thinking", "thinking", "preserve_thinking", "reasoning_effort"]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
PromptText = Annotated[str, Field(min_length=1)]
PromptIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    """The four prompt forms as one: a list of texts or of id lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [value]
    return value


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Model):
    """What a stream reports besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(Structured):
    """Fields that chat and text completions share. Units: tokens, unless a name says otherwise."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=MAX_TOP_K)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stop: Annotated[
        list[StopText],
        BeforeValidator(_stops, json_schema_input_type=StopText | list[StopText]),
        Field(max_length=MAX_STOPS),
    ] = Field(default=[])
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool = False
    n: int = Field(default=1, ge=1, le=MAX_N)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    # Logits are divided by it: below, they would leave the range of numbers.
    repetition_penalty: float = Field(default=1.0, ge=1e-6, le=10.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
    ] = Field(default={}, max_length=MAX_BIASED_TOKENS)
    bad_words: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default=[], max_length=MAX_BAD_WORDS
    )
    allowed_token_ids: list[TokenId] = Field(default=[], max_length=65_536)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    priority: int = Field(default=0, ge=-1000, le=1000)
    timeout_seconds: float | None = Field(default=None, gt=0.0, le=MAX_TIMEOUT_SECONDS)
    cache_salt: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9._-]*$")
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    chat_template_kwargs: dict[TemplateName, Any] = Field(default={})
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)
    prompt: Annotated[
        Prompts, BeforeValidator(_prompts, json_schema_input_type=PromptText | PromptIds | Prompts)
    ]


class TokenizeRequest(_Model):
    """Body of POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    """Default: true for a text; false for a conversation, whose template writes them."""
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    chat_template_kwargs: dict[TemplateName, Any] = Field(default={})


class DetokenizeRequest(_Model):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
