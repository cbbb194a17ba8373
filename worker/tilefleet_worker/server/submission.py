"""From a checked body to what the engine is asked: parameters, siblings of one prompt, answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tilefleet_worker.request import MAX_SEED, Request, SamplingParams, TokenConstraint
from tilefleet_worker.server.answer import Answer, AnswerOptions
from tilefleet_worker.server.budget import Budget
from tilefleet_worker.server.limits import MAX_ANSWERS
from tilefleet_worker.server.protocol import ChatRequest, CompletionRequest, Sampling
from tilefleet_worker.server.replies import ApiError, invalid_value
from tilefleet_worker.server.state import Service


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: its API key, if keys are in use, decides what it shares a cache with, how urgent it
    may be, and how much it may use.
    """

    key_id: str = ""
    budget: Budget | None = None

    def salt(self, wanted: str) -> str:
        """Salt of the prefix cache: of the key, and within it as the client wishes."""
        shared = "" if self.budget is None else self.budget.limits.salt
        own = f"salt={shared}" if shared else self.key_id  # an id has no `=`: see auth.py
        return f"{own}/{wanted}" if wanted else own

    def priority(self, body: Sampling) -> int:
        """Priority of a request: the key's, or the body's. Raises ApiError 403 above the key's."""
        if self.budget is None:
            return body.priority
        best = self.budget.limits.priority
        wanted = body.priority if "priority" in body.model_fields_set else best
        if wanted < best:
            message = f"priority is {wanted}: this API key may ask for {best} or more."
            raise ApiError(403, "priority_not_allowed", message, "priority")
        return wanted


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its text, if it was sent as one."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What one HTTP request asks of the engine, besides the fields of its body."""

    prompts: Sequence[Prompt]
    default_max_tokens: int
    """For a body that names no max_tokens."""
    make_constraint: Callable[[], TokenConstraint] | None = None
    skip_special_tokens: bool = True
    num_best: int | None = None
    """Show only that many answers to each prompt."""


def sampling_params(service: Service, body: Sampling, default_max_tokens: int) -> SamplingParams:
    """The engine's parameters of a body. default_max_tokens: for one that names no max_tokens."""
    asked = default_max_tokens if body.max_tokens is None else body.max_tokens
    logprobs, prompt_logprobs = _scores(body)
    return SamplingParams(
        max_tokens=max(1, asked),
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in body.logit_bias.items()),
        bad_words=_bad_words(service, body.bad_words),
        allowed_token_ids=tuple(body.allowed_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _scores(body: Sampling) -> tuple[int | None, int | None]:
    """How many top logprobs of answer and of prompt the engine must report."""
    if isinstance(body, ChatRequest):
        return (body.top_logprobs if body.logprobs else None), body.prompt_logprobs
    if not isinstance(body, CompletionRequest):
        return None, body.prompt_logprobs
    logprobs, prompt = body.logprobs, body.prompt_logprobs
    if body.echo and logprobs is not None:
        prompt = max(logprobs, prompt or 0)
    if (body.best_of or body.n) > body.n and logprobs is None:
        logprobs = 0  # the best ones are chosen by them
    return logprobs, prompt


def _bad_words(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words: at the beginning of a text and after a space."""
    encode = service.tokenizer.encode
    found = {
        tuple(encode(text, add_special_tokens=False))
        for word in words
        for text in (word, " " + word.lstrip())
    }
    return tuple(sorted(filter(None, found)))


def check(body: Sampling, num_prompts: int) -> None:
    """Refuse what contradicts itself. Raises ApiError 400 that names the field."""
    if body.stream and body.prompt_logprobs is not None:
        raise invalid_value("prompt_logprobs", "prompt_logprobs cannot be streamed: leave one out.")
    if isinstance(body, ChatRequest) and body.top_logprobs and not body.logprobs:
        raise invalid_value("top_logprobs", "top_logprobs needs logprobs to be true.")
    num_each = body.n
    if isinstance(body, CompletionRequest):
        num_each = _check_completion(body)
    if num_prompts * num_each > MAX_ANSWERS:
        message = f"{num_prompts} prompts with {num_each} answers each are more than {MAX_ANSWERS}."
        raise invalid_value("n", f"n is {body.n}: {message}")


def _check_completion(body: CompletionRequest) -> int:
    if body.max_tokens == 0 and not body.echo:
        raise invalid_value("max_tokens", "max_tokens is 0: that needs echo to be true.")
    num_each = body.best_of or body.n
    if num_each < body.n:
        raise invalid_value("best_of", f"best_of is {num_each}: it must be at least n ({body.n}).")
    if num_each > body.n and body.stream:
        raise invalid_value("best_of", "best_of above n cannot be streamed: leave one out.")
    return num_each


def answers(
    service: Service, body: Sampling, asked: Asked, name: str, caller: Caller
) -> list[Answer]:
    """The answers of one HTTP request: n, or best_of, for each prompt, in order of the prompts."""
    params = sampling_params(service, body, asked.default_max_tokens)
    num_each = getattr(body, "best_of", None) or body.n
    now, salt, priority = time.monotonic(), caller.salt(body.cache_salt), caller.priority(body)
    deadline = None if body.timeout_seconds is None else now + body.timeout_seconds
    detokenizer = partial(
        service.tokenizer.detokenizer, skip_special_tokens=asked.skip_special_tokens
    )
    made: list[Answer] = []
    for prompt in asked.prompts:
        options = _options(service, body, prompt)
        for sibling in range(num_each):
            index = len(made)
            own = replace(params, seed=_sibling_seed(params.seed, sibling))
            constraint = asked.make_constraint() if asked.make_constraint else None
            request = Request(
                f"{name}-{index}",
                prompt.token_ids,
                own,
                now,
                salt,
                tenant=caller.key_id,
                priority=priority,
                deadline_seconds=deadline,
                constraint=constraint,
            )
            first = sibling == 0
            made.append(
                Answer(
                    index,
                    request,
                    detokenizer(),
                    options,
                    counts_prompt=first,
                    num_siblings=num_each,
                )
            )
    return made


def _sibling_seed(seed: int | None, sibling: int) -> int | None:
    """Each of the n answers draws its own numbers: the seeds of a caller follow one another."""
    if seed is None or sibling == 0:
        return seed
    return (seed + sibling + MAX_SEED) % (2 * MAX_SEED + 1) - MAX_SEED


def _options(service: Service, body: Sampling, prompt: Prompt) -> AnswerOptions:
    echo = ""
    if isinstance(body, CompletionRequest) and body.echo:
        decode = service.tokenizer.decode
        echo = prompt.text or decode(prompt.token_ids, skip_special_tokens=False)
    return AnswerOptions(
        stops=tuple(body.stop),
        include_stop=body.include_stop_str_in_output,
        echo=echo,
        only_echo=body.max_tokens == 0,
        prompt_logprobs=body.prompt_logprobs is not None,
    )


def truncated(body: Sampling, token_ids: Sequence[int]) -> tuple[int, ...]:
    """The prompt, or its last truncate_prompt_tokens tokens."""
    kept = body.truncate_prompt_tokens
    return tuple(token_ids if kept is None else token_ids[-kept:])


def room(service: Service, prompt: Sequence[int], param: str) -> int:
    """Tokens that an answer to this prompt can have. Raises ApiError 400 when there are none."""
    left = service.max_total_tokens - len(prompt)
    if left < 1:
        message = (
            f"The prompt has {len(prompt)} tokens; prompt and answer together may have "
            f"{service.max_total_tokens}: shorten the prompt."
        )
        raise ApiError(400, "context_length_exceeded", message, param)
    return left
