"""How an answer is read: which tools it may call, by which convention, and where it thinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilefleet_worker.grammar import Grammar
from tilefleet_worker.output_parser import Chain, OutputParser, Plain
from tilefleet_worker.reasoning import ThinkParser, begins_inside
from tilefleet_worker.server.conventions import Conventions
from tilefleet_worker.server.messages import NamedTool, Tool
from tilefleet_worker.server.protocol import ChatRequest
from tilefleet_worker.server.replies import invalid_value, unsupported
from tilefleet_worker.server.structure import grammar_of, schema_grammar
from tilefleet_worker.tool_calls import NamedCall, ToolCallParser, family_parser


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one body are constrained and read."""

    grammar: Grammar | None
    make_parser: Callable[[], OutputParser]
    tools: tuple[dict[str, Any], ...]
    """Tools as the template gets them."""
    skip_special_tokens: bool
    """False when markers of calls may be special tokens, which the parser must see."""
    thinks: bool
    named_call: bool = False
    """The caller named the function that must be called."""

    def parser_after(self, prompt_tail: str) -> Callable[[], OutputParser]:
        """Makes the parser of each answer that follows this prompt."""
        if not self.thinks:
            return self.make_parser
        inside = begins_inside(prompt_tail)
        return lambda: Chain(ThinkParser(inside=inside), self.make_parser())


def reading_of(body: ChatRequest, conventions: Conventions) -> Reading:
    """Decide it for a body. Raises ApiError 400 when the body contradicts itself."""
    grammar, choice = grammar_of(body), body.tool_choice
    skip = body.skip_special_tokens
    if choice is None:
        choice = "auto" if body.tools else "none"
    if choice != "none" and not body.tools:
        raise invalid_value("tool_choice", "tool_choice needs tools.")
    if choice == "none":
        return Reading(grammar, Plain, (), skip, conventions.thinks)
    tools = tuple(tool.for_template() for tool in body.tools)
    if choice == "auto":
        family = conventions.tool_family
        if family is None:
            message = "tools: this model's chat template has no tool calls; tool_choice may be "
            raise unsupported("tools", message + "required or name a function.")
        return Reading(grammar, lambda: family_parser(family), tools, False, conventions.thinks)
    if grammar is not None:
        raise invalid_value(grammar.param, f"{grammar.param} and tool_choice contradict.")
    if isinstance(choice, NamedTool):
        tool = _tool_named(body.tools, choice.function.name)
        grammar, name = schema_grammar(tool.function.parameters, "tools"), tool.function.name
        return Reading(grammar, lambda: NamedCall(name), tools, skip, conventions.thinks, True)
    grammar = schema_grammar(_array_of_calls(body), "tools")
    return Reading(grammar, lambda: ToolCallParser(""), tools, skip, conventions.thinks)


def _tool_named(tools: list[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise invalid_value("tool_choice", f"tool_choice names {name!r}, which is none of the tools.")


def _array_of_calls(body: ChatRequest) -> dict[str, Any]:
    """Schema of at least one call of one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": tool.function.parameters,
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in body.tools
    ]
    limit = {} if body.parallel_tool_calls else {"maxItems": 1}
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **limit}
