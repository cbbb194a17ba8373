"""What a client may send: bodies become checked values, or one 400 that names the field.

Three classes of fields: implemented; accepted without effect (ACCEPTED_WITHOUT_EFFECT); all others
are refused, so that nothing is ever silently ignored. `null` counts as absent, and so does a value
that asks for nothing (NEUTRAL), because clients send their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tilefleet_worker.request import MAX_SEED
from tilefleet_worker.server.limits import (
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from tilefleet_worker.server.replies import ApiError, invalid_value, unsupported

ACCEPTED_WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier"})
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}

Body = TypeVar("Body", bound=BaseModel)
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


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


class Sampling(_Model):
    """Fields that chat and text completions share. Units: tokens, unless a name says otherwise."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        BeforeValidator(_stops),
        Field(max_length=MAX_STOPS),
    ] = []
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class TextPart(_Model):
    """One part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it: text parts joined, `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        list[Annotated[str, Field(min_length=1)]]
        | list[Annotated[list[TokenId], Field(min_length=1)]],
        BeforeValidator(_prompts),
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]


class TokenizeRequest(_Model):
    """Body of POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(_Model):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def parse(kind: type[Body], body: bytes) -> Body:
    """The checked value of a JSON body.

    Raises ApiError 400 with code invalid_json, unsupported_parameter or invalid_value; `param` is
    the field.
    """
    fields = _without_absent(_json_object(body))
    _merge_max_tokens(fields, kind)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400, "invalid_json", "A text in the body holds half a surrogate pair."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", "The body is not valid JSON in UTF-8.") from error
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "The body must be one JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_absent(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop what has no effect: null, the accepted fields, and neutral values of refused ones."""
    return {
        name: _without_null(value)
        for name, value in fields.items()
        if value is not None
        and name not in ACCEPTED_WITHOUT_EFFECT
        and not _is_neutral(name, value)
    }


def _without_null(value: Any) -> Any:
    """The value with nulls in objects below dropped too: `"name": null` in a message is common."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_null(item) for item in value]
    return value


def _is_neutral(name: str, value: Any) -> bool:
    # The type is compared too, because False == 0 and `logprobs: 0` does ask for something.
    return any(type(value) is type(off) and value == off for off in NEUTRAL.get(name, ()))


def _merge_max_tokens(fields: dict[str, Any], kind: type[BaseModel]) -> None:
    """Accept max_completion_tokens as the other name of max_tokens."""
    if "max_completion_tokens" not in fields or not issubclass(kind, Sampling):
        return
    value = fields.pop("max_completion_tokens")
    if fields.setdefault("max_tokens", value) != value:
        message = (
            f"max_tokens is {fields['max_tokens']} and max_completion_tokens is {value}: send one."
        )
        raise invalid_value("max_completion_tokens", message)


def _explain(error: ValidationError) -> ApiError:
    """The most telling of pydantic's errors: an unknown field, else the one that got deepest."""
    errors = error.errors(include_url=False, include_context=False)
    deepest = max(errors, key=lambda item: len(item["loc"]))
    first = next((item for item in errors if item["type"] == "extra_forbidden"), deepest)
    param = _param(first["loc"])
    if first["type"] == "extra_forbidden":
        return unsupported(param, f"{param} is not supported by this worker: leave it out.")
    if first["type"] == "missing":
        return invalid_value(param, f"{param} is missing: it is required.")
    return invalid_value(param, f"{param} is {_short(first['input'])}: {first['msg']}.")


def _param(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's path, without the names of union branches."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not any(mark in part for mark in "[(") and part not in ("str", "int"):
            text += f".{part}" if text else part
    return text


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
