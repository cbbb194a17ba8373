"""From bytes to a checked body, or one 400 that names the field.

`null` counts as absent, and so does a value that asks for nothing (NEUTRAL), because clients send
their defaults. What is neither known nor neutral is refused: nothing is ever silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from tilefleet_worker.server.replies import ApiError, invalid_value, unsupported

ACCEPTED_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "continue_final_message": (False,),
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
}

# Values in which null has a meaning, as in JSON schemas, or is none of the values.
VERBATIM = frozenset(
    {"response_format", "structured_outputs", "guided_json", "tools", "text", "logit_bias"}
)

Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: bytes) -> Body:
    """The checked value of a JSON body.

    Raises ApiError 400 with code invalid_json, unsupported_parameter or invalid_value; `param` is
    the field.
    """
    fields = _without_absent(_json_object(body))
    _merge_max_tokens(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from None


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
        name: value if name in VERBATIM else _without_null(value)
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


def _merge_max_tokens(fields: dict[str, Any]) -> None:
    """Accept max_completion_tokens as the other name of max_tokens."""
    if "max_completion_tokens" not in fields:
        return
    value = fields.pop("max_completion_tokens")
    if fields.setdefault("max_tokens", value) != value:
        message = (
            f"max_tokens is {fields['max_tokens']} and max_completion_tokens is {value}: send one."
        )
        raise invalid_value("max_completion_tokens", message)


def explain(error: ValidationError) -> ApiError:
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
