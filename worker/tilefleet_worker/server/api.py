"""The handlers of port 8000: OpenAI's completions, models, and the tokenizer's routes."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tilefleet_worker.server.answers import AnswerDesk, Job, not_ready
from tilefleet_worker.server.formats import ChatFormat, Envelope, Format, TextFormat
from tilefleet_worker.server.parsing import parse
from tilefleet_worker.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from tilefleet_worker.server.replies import ApiError, draining, invalid_value
from tilefleet_worker.server.state import Service, WorkerState
from tilefleet_worker.server.stream import EventStream, whole_reply
from tilefleet_worker.server.submission import (
    Caller,
    Prompt,
    answers,
    check,
    room,
    sampling_params,
    truncated,
)

# Above this many characters tokenizing takes milliseconds: a thread keeps other streams flowing.
_THREAD_CHARACTERS = 8192
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for text completions

Result = TypeVar("Result")


def version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version("tilefleet")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Api:
    """Handlers over one worker's state."""

    def __init__(self, state: WorkerState, desk: AnswerDesk) -> None:
        self._state = state
        self._desk = desk

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        body = parse(ChatRequest, await http.body())
        service = self._admit(body.model)
        template = service.tokenizer.chat_template
        if template is None:
            raise invalid_value(
                "messages", "The model has no chat template: use /v1/completions with a prompt."
            )
        check(body, 1)
        messages = [message.for_template() for message in body.messages]
        size = sum(len(message["content"]) for message in messages)
        _check_size(service, size, "messages")
        options: dict[str, Any] = {
            str(name): value for name, value in body.chat_template_kwargs.items()
        }
        if body.reasoning_effort is not None:
            options.setdefault("reasoning_effort", body.reasoning_effort)

        def tokens() -> list[int]:
            text = template.render(
                messages, add_generation_prompt=body.add_generation_prompt, options=options
            )
            return service.tokenizer.encode(text, add_special_tokens=False)

        prompt = Prompt(truncated(body, await _compute(size, tokens)))
        default = room(service, prompt.token_ids, "messages")
        words = ChatFormat(service.tokenizer, logprobs=body.logprobs)
        return await self._reply(http, body, words, [prompt], default)

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        body = parse(CompletionRequest, await http.body())
        service = self._admit(body.model)
        check(body, len(body.prompt))
        for text in body.prompt:
            if isinstance(text, str):
                _check_size(service, len(text), "prompt")

        def prompt_of(given: str | list[int]) -> Prompt:
            if isinstance(given, str):
                return Prompt(truncated(body, service.tokenizer.encode(given)), given)
            return Prompt(truncated(body, given))

        def tokens() -> list[Prompt]:
            return [prompt_of(given) for given in body.prompt]

        prompts = await _compute(sum(map(len, body.prompt)), tokens)
        most = min(room(service, prompt.token_ids, "prompt") for prompt in prompts)
        default = min(most, max(_DEFAULT_COMPLETION_TOKENS, body.min_tokens))
        num_each = body.best_of or body.n
        words = TextFormat(
            service.tokenizer,
            logprobs=body.logprobs is not None,
            echoed=[p.token_ids for p in prompts for _ in range(num_each)] if body.echo else (),
        )
        num_best = body.n if num_each > body.n else None
        return await self._reply(http, body, words, prompts, default, num_best)

    async def _reply(
        self,
        http: HttpRequest,
        body: Sampling,
        words: Format,
        prompts: Sequence[Prompt],
        default_max_tokens: int,
        num_best: int | None = None,
    ) -> Response:
        """Submit the answers to all prompts and reply with the stream or the whole."""
        service = self._admit(body.model)
        params = sampling_params(service, body, default_max_tokens)
        name = words.id_prefix + uuid.uuid4().hex
        caller = Caller(getattr(http.state, "key_id", ""))
        job = Job(self._desk, answers(service, body, params, prompts, name, caller))
        envelope = Envelope(name, int(time.time()), self._state.model_name, words)
        job.submit()
        if body.stream:
            return EventStream(job, envelope, body.stream_options)
        return JSONResponse(await whole_reply(job, envelope, http.receive, num_best))

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model(self._service())]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/{id}."""
        service = self._service()
        self._check_model(http.path_params["id"])
        return JSONResponse(self._model(service))

    async def tokenize(self, http: HttpRequest) -> Response:
        """POST /tokenize."""
        body = parse(TokenizeRequest, await http.body())
        service = self._service()
        self._check_model(body.model)

        def encode() -> list[int]:
            return service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)

        tokens = await _compute(len(body.prompt), encode)
        most = service.config.max_model_len
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": most})

    async def detokenize(self, http: HttpRequest) -> Response:
        """POST /detokenize."""
        body = parse(DetokenizeRequest, await http.body())
        tokenizer = self._service().tokenizer
        self._check_model(body.model)
        for index, token_id in enumerate(body.tokens):
            if token_id >= tokenizer.vocab_size:
                rule = f"the vocabulary has {tokenizer.vocab_size} tokens"
                raise invalid_value(f"tokens[{index}]", f"Token id {token_id} is unknown: {rule}.")

        def decode() -> str:
            return tokenizer.decode(body.tokens, skip_special_tokens=False)

        return JSONResponse({"prompt": await _compute(len(body.tokens), decode)})

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: the same answer as the readiness probe."""
        reason = self._state.why_not_ready()
        return Response(status_code=200 if reason is None else 503)

    async def version(self, http: HttpRequest) -> Response:
        """GET /version."""
        return JSONResponse({"version": version()})

    def _service(self) -> Service:
        if self._state.service is None:
            raise not_ready()
        return self._state.service

    def _admit(self, model: str) -> Service:
        """The service for a new generation, or the ApiError that says why there is none now."""
        if not self._state.accepting:
            raise draining()
        service = self._service()
        self._check_model(model)
        return service

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._state.model_name:
            message = f"Model {model!r} is not served here: use {self._state.model_name!r}."
            raise ApiError(404, "model_not_found", message, "model")

    def _model(self, service: Service) -> dict[str, Any]:
        name = self._state.model_name
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "tilefleet",
            "root": name,
            "parent": None,
            "max_model_len": service.config.max_model_len,
        }


async def _compute(size: int, work: Callable[[], Result]) -> Result:
    """Run tokenizer work here if it is small, else in a thread. size: characters or tokens."""
    return work() if size < _THREAD_CHARACTERS else await asyncio.to_thread(work)


def _check_size(service: Service, num_characters: int, param: str) -> None:
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
