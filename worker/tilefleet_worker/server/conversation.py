"""From a conversation to a prompt, its constraint, and the way its answers are read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tilefleet_worker.grammar import AfterReasoning, Grammar
from tilefleet_worker.output_parser import OutputParser
from tilefleet_worker.reasoning import BEGIN, END, begins_inside
from tilefleet_worker.request import TokenConstraint
from tilefleet_worker.server.messages import Message
from tilefleet_worker.server.protocol import ChatRequest
from tilefleet_worker.server.replies import ApiError, invalid_value
from tilefleet_worker.server.state import Service
from tilefleet_worker.server.submission import Asked, Prompt, check, room, truncated
from tilefleet_worker.server.tools import Reading, reading_of

# Above this many characters tokenizing takes milliseconds: a thread keeps other streams flowing.
_THREAD_CHARACTERS = 8192
# Of the prompt's end: where a template opens or closes the reasoning of the answer.
_TAIL_CHARACTERS = 256

Result = TypeVar("Result")
Work = Callable[[], Result]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the engine is asked, and how its answers are read."""

    asked: Asked
    make_parser: Callable[[], OutputParser]
    named_call: bool


async def converse(service: Service, body: ChatRequest) -> Conversation:
    """Render, tokenize and constrain a chat. Raises RequestError 400 when that is not possible."""
    check(body, 1)
    reading = reading_of(body, service.conventions)
    text, prompt = await _render(service, body, reading)
    tail = text[-_TAIL_CHARACTERS:]
    asked = Asked(
        [prompt],
        room(service, prompt.token_ids, "messages"),
        await make_constraint(service, reading.grammar, tail if reading.thinks else None),
        reading.skip_special_tokens,
    )
    return Conversation(asked, reading.parser_after(tail), reading.named_call)


async def _render(service: Service, body: ChatRequest, reading: Reading) -> tuple[str, Prompt]:
    options = {str(name): value for name, value in body.chat_template_kwargs.items()}
    if body.reasoning_effort is not None:
        options.setdefault("reasoning_effort", body.reasoning_effort)
    render = renderer(
        service,
        body.messages,
        reading.tools,
        options,
        add_generation_prompt=body.add_generation_prompt,
    )

    def work() -> tuple[str, Prompt]:
        text = render()
        token_ids = service.tokenizer.encode(text, add_special_tokens=False)
        return text, Prompt(truncated(body, token_ids))

    return await compute(num_characters(body.messages), work)


def renderer(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> Work[str]:
    """What writes a conversation as the model's template has it.

    Raises ApiError 400 when the model has no template, or far too much is to be written.
    """
    template = service.tokenizer.chat_template
    if template is None:
        raise invalid_value(
            "messages", "The model has no chat template: use a prompt, as of /v1/completions."
        )
    check_size(service, num_characters(messages), "messages")
    return partial(
        template.render,
        [message.for_template() for message in messages],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        options=options,
    )


def num_characters(messages: Sequence[Message]) -> int:
    """Characters of all messages, without what the template adds."""
    return sum(len(message.text) for message in messages)


async def make_constraint(
    service: Service, grammar: Grammar | None, thinking_tail: str | None = None
) -> Callable[[], TokenConstraint] | None:
    """Makes the constraint of each answer, or None. Raises RequestError 400 for a bad grammar.

    thinking_tail: the end of the prompt, for a model that may think before it answers.
    """
    if grammar is None:
        return None
    constraint = await service.grammars.constraint(grammar)
    marks = service.tokenizer.token_id(BEGIN), service.tokenizer.token_id(END)
    if thinking_tail is None or marks[0] is None or marks[1] is None:
        return constraint.copy
    inside = begins_inside(thinking_tail)
    return AfterReasoning(constraint, marks[0], marks[1], inside=inside).copy


async def compute(size: int, work: Work[Result]) -> Result:
    """Run tokenizer work here if it is small, else in a thread. size: characters or tokens."""
    return work() if size < _THREAD_CHARACTERS else await asyncio.to_thread(work)


def check_size(service: Service, num_characters: int, param: str) -> None:
    """Refuse a text that cannot fit before spending seconds on its tokens. Raises ApiError 400.

    No token is longer than the vocabulary's longest; a normaliser composes at most four characters.
    """
    most = 4 * service.tokenizer.longest_token_characters * service.max_total_tokens
    if num_characters > most:
        message = (
            f"The prompt has {num_characters} characters, far more than fit into "
            f"{service.max_total_tokens} tokens of prompt and answer: shorten the prompt."
        )
        raise ApiError(400, "context_length_exceeded", message, param)
