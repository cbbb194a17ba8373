"""JSON schemas of what port 8000 answers, for the OpenAPI document. Knows no route."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    properties = required | optional
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _const(value: str) -> Schema:
    return {"type": "string", "const": value}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ANY: Schema = {}
_LOGPROBS = _maybe({"type": "object"})
_CHAT_END: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
_TEXT_END: Schema = {"type": "string", "enum": ["stop", "length"]}

_CALL = _object(
    {
        "id": _TEXT,
        "type": _const("function"),
        "function": _object({"name": _TEXT, "arguments": _TEXT}),
    }
)
_MESSAGE = _object(
    {"role": _const("assistant"), "content": _maybe(_TEXT)},
    tool_calls=_list(_CALL),
    reasoning_content=_maybe(_TEXT),
)
_USAGE = _object(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    prompt_tokens_details=_object({"cached_tokens": _COUNT}),
)


def _completion(kind: str, choice: Schema) -> Schema:
    return _object(
        {
            "id": _TEXT,
            "object": _const(kind),
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(choice),
            "usage": ref("Usage"),
        }
    )


REPLIES: dict[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT, "param": _maybe(_TEXT), "code": _maybe(_TEXT)}
            )
        }
    ),
    "Usage": _USAGE,
    "ChatCompletion": _completion(
        "chat.completion",
        _object(
            {"index": _COUNT, "message": _MESSAGE, "finish_reason": _CHAT_END}, logprobs=_LOGPROBS
        ),
    ),
    "Completion": _completion(
        "text_completion",
        _object({"index": _COUNT, "text": _TEXT, "finish_reason": _TEXT_END}, logprobs=_LOGPROBS),
    ),
    "Response": _object(
        {
            "id": _TEXT,
            "object": _const("response"),
            "status": {"type": "string", "enum": ["completed", "incomplete", "failed"]},
            "model": _TEXT,
            "output": _list(_object({"id": _TEXT, "type": _TEXT})),
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT}),
        }
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": _const("model"),
            "created": _COUNT,
            "owned_by": _TEXT,
            "max_model_len": _COUNT,
        }
    ),
    "ModelList": _object({"object": _const("list"), "data": _list(ref("Model"))}),
    "Tokens": _object(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": _list(_COUNT),
            "token_strs": _maybe(_list(_TEXT)),
        }
    ),
    "Text": _object({"prompt": _TEXT}),
    "TokenizerInfo": _object(
        {"tokenizer_class": _TEXT, "model_max_length": _COUNT, "chat_template": _maybe(_TEXT)},
        bos_token=_maybe(_TEXT),
        eos_token=_maybe(_TEXT),
    ),
    "Version": _object({"version": _TEXT}),
    "Document": _ANY,
}
