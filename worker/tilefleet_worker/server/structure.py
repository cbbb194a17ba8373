"""Structured output: the fields that constrain an answer become one grammar, or a 400."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tilefleet_worker.grammar import Grammar
from tilefleet_worker.server.replies import ApiError, invalid_value

MAX_GRAMMAR_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 32

GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]
Schema = dict[str, Any] | str


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JsonSchema(_Model):
    """OpenAI's wrapper of a schema."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Model):
    """vLLM's `structured_outputs`: exactly one of the first five."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False


class Structured(_Model):
    """The fields that a body may constrain its answer with, vLLM's older names among them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None


def grammar_of(body: Structured) -> Grammar | None:
    """The grammar of an answer, or None. Raises ApiError 400 when there are several."""
    found = list(_grammars(body))
    if len(found) > 1:
        names = " and ".join(grammar.param for grammar in found)
        raise invalid_value(found[1].param, f"{names} both constrain the answer: send one.")
    return found[0] if found else None


def _grammars(body: Structured) -> Iterator[Grammar]:
    if body.response_format is not None:
        yield from _of_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_outputs(body.structured_outputs)
    if body.guided_json is not None:
        yield schema_grammar(body.guided_json, "guided_json")
    if body.guided_regex is not None:
        yield Grammar("regex", body.guided_regex, "guided_regex")
    if body.guided_choice is not None:
        yield Grammar.choice(body.guided_choice, "guided_choice")
    if body.guided_grammar is not None:
        yield Grammar("lark", body.guided_grammar, "guided_grammar")


def _of_format(given: ResponseFormat) -> Iterator[Grammar]:
    if given.type == "json_object":
        yield schema_grammar({"type": "object"}, "response_format")
    elif given.type == "json_schema":
        if given.json_schema is None:
            raise invalid_value(
                "response_format.json_schema", "response_format.json_schema is missing."
            )
        yield schema_grammar(given.json_schema.schema_, "response_format.json_schema.schema")


def _of_outputs(given: StructuredOutputs) -> Iterator[Grammar]:
    name, compact = "structured_outputs", given.disable_any_whitespace
    if given.json_ is not None:
        yield schema_grammar(given.json_, f"{name}.json", compact=compact)
    if given.regex is not None:
        yield Grammar("regex", given.regex, f"{name}.regex")
    if given.choice is not None:
        yield Grammar.choice(given.choice, f"{name}.choice")
    if given.grammar is not None:
        yield Grammar("lark", given.grammar, f"{name}.grammar")
    if given.json_object:
        yield schema_grammar({"type": "object"}, f"{name}.json_object", compact=compact)


def schema_grammar(schema: Schema, param: str, *, compact: bool = False) -> Grammar:
    """The grammar of a JSON schema, given as an object or as its text.

    Raises ApiError 400 when it is too large or too deep, or when a text is not JSON.
    """
    if isinstance(schema, str):
        schema = _parsed(schema, param)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise invalid_value(param, f"{param} is deeper than {MAX_SCHEMA_DEPTH} levels.")
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise invalid_value(param, f"{param} is longer than {MAX_GRAMMAR_CHARACTERS} characters.")
    return Grammar("json_schema", text, param, compact)


def _parsed(text: str, param: str) -> dict[str, Any]:
    try:
        schema = json.loads(text[: MAX_GRAMMAR_CHARACTERS + 1])
    except (ValueError, RecursionError) as error:
        raise invalid_value(param, f"{param} is not the text of a JSON schema.") from error
    if not isinstance(schema, dict):
        raise ApiError(400, "invalid_value", f"{param} must be a JSON object.", param)
    return schema


def _depth(value: dict[str, Any]) -> int:
    """Levels of nesting, counted without recursion: the value comes from a client."""
    deepest = 0
    level: list[Any] = [value]
    while level and deepest <= MAX_SCHEMA_DEPTH:
        deepest += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return deepest
