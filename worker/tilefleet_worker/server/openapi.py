"""The OpenAPI document of port 8000, from the models that check the bodies.

It says what parsing.py does: `null` is as good as absent, and an unknown field is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tilefleet_worker.server.openapi_replies import REPLIES, Schema, ref
from tilefleet_worker.server.parsing import VERBATIM
from tilefleet_worker.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tilefleet_worker.server.response_request import ResponseRequest


@dataclass(frozen=True, slots=True)
class Operation:
    """One route: what it is for, what it takes and what it answers."""

    method: str
    summary: str
    reply: str | None
    """Name of the schema of a 200; None when it has no body."""
    body: type[BaseModel] | None = None
    streams: bool = False
    is_open: bool = False
    """Served without a key."""


OPERATIONS = {
    "/v1/chat/completions": Operation(
        "post", "The next message of a chat.", "ChatCompletion", ChatRequest, streams=True
    ),
    "/v1/completions": Operation(
        "post", "How a text goes on.", "Completion", CompletionRequest, streams=True
    ),
    "/v1/responses": Operation(
        "post", "The next output of a conversation.", "Response", ResponseRequest, streams=True
    ),
    "/v1/models": Operation("get", "The served model, in a list.", "ModelList"),
    "/v1/models/{id}": Operation("get", "The served model.", "Model"),
    "/tokenize": Operation(
        "post", "Tokens of a text or a conversation.", "Tokens", TokenizeRequest
    ),
    "/detokenize": Operation("post", "Text of tokens.", "Text", DetokenizeRequest),
    "/tokenizer_info": Operation("get", "Special tokens and chat template.", "TokenizerInfo"),
    "/version": Operation("get", "Version of the worker.", "Version"),
    "/openapi.json": Operation("get", "This document.", "Document"),
    "/health": Operation("get", "200 when ready, else 503.", None, is_open=True),
}
_REFUSALS = {
    "400": "The request is not valid; `param` names the field.",
    "401": "No valid API key.",
    "404": "Another model than the served one, or no such route.",
    "408": "The request's `timeout_seconds` were over.",
    "413": "The body is too large.",
    "429": "The queue or the key's budget is full: come back after Retry-After seconds.",
    "500": "The worker failed on this request.",
    "503": "The worker starts or drains: come back after Retry-After seconds.",
}
_NOTES = ("title", "description", "default")
_RETRY = {"Retry-After": {"schema": {"type": "integer", "minimum": 1, "maximum": 120}}}


def document(model_name: str, version: str, *, with_keys: bool) -> dict[str, Any]:
    """The document of a worker that serves this model. with_keys: API keys are in use."""
    paths = {
        path: {operation.method: _operation(path, operation, with_keys)}
        for path, operation in OPERATIONS.items()
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tilefleet worker", "version": version},
        "paths": paths,
        "components": {"schemas": _bodies(model_name) | REPLIES},
    }
    if with_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(path: str, operation: Operation, with_keys: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": _answer(operation)} | _errors(operation, with_keys),
    }
    if operation.body is not None:
        content = {"application/json": {"schema": ref(operation.body.__name__)}}
        found["requestBody"] = {"required": True, "content": content}
    if "{id}" in path:
        schema = {"type": "string"}
        found["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    if with_keys and not operation.is_open:
        found["security"] = [{"key": []}]
    return found


def _answer(operation: Operation) -> dict[str, Any]:
    if operation.reply is None:
        return {"description": "Ready."}
    content: dict[str, Any] = {"application/json": {"schema": ref(operation.reply)}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {}}  # the version of the format has no events
    return {"description": "Done.", "content": content}


def _errors(operation: Operation, with_keys: bool) -> dict[str, Any]:
    if operation.is_open:
        return {"503": {"description": "Not ready."}}
    found = {}
    for status, text in _REFUSALS.items():
        if status == "401" and not with_keys:
            continue
        content = {"application/json": {"schema": ref("Error")}}
        found[status] = {"description": text, "content": content}
        if status in ("429", "503"):
            found[status]["headers"] = _RETRY
    return found


def _bodies(model_name: str) -> dict[str, Schema]:
    kinds = [operation.body for operation in OPERATIONS.values() if operation.body is not None]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=ref("{model}")["$ref"]
    )
    schemas: dict[str, Schema] = definitions["$defs"]
    for name in _reached(schemas, [kind.__name__ for kind in kinds]):
        _allow_null(schemas[name])
    for kind in kinds:
        properties = schemas[kind.__name__]["properties"]
        named = (
            [model_name]
            if "model" in schemas[kind.__name__].get("required", ())
            else [model_name, None]
        )
        properties["model"] = {"enum": named}
    return schemas


def _reached(schemas: dict[str, Schema], names: Iterable[str]) -> set[str]:
    """Names of these schemas and of those below them, except where null has a meaning."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _references(schemas[name].get("properties", {}))
    return found


def _references(properties: dict[str, Any]) -> Iterable[str]:
    values = [value for name, value in properties.items() if name not in VERBATIM]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"].rsplit("/", 1)[-1]
            values += value.values()
        elif isinstance(value, list):
            values += value


def _allow_null(schema: Schema) -> None:
    """An optional field may be null, which counts as absent."""
    for name, value in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in value.get(
            "anyOf", ()
        ):
            inner = {key: value.pop(key) for key in list(value) if key not in _NOTES}
            value["anyOf"] = [inner, {"type": "null"}]
