"""The handlers of port 8000 that generate: chat and text completions."""

from __future__ import annotations

import collections
import time
import uuid

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tilefleet_worker.server.answers import AnswerDesk, Job
from tilefleet_worker.server.auth import Key
from tilefleet_worker.server.budget import Budgets
from tilefleet_worker.server.chat_format import ChatFormat, Reader
from tilefleet_worker.server.conversation import check_size, compute, converse, make_constraint
from tilefleet_worker.server.formats import Envelope, Format, TextFormat, joined
from tilefleet_worker.server.parsing import parse
from tilefleet_worker.server.protocol import ChatRequest, CompletionRequest, Sampling
from tilefleet_worker.server.response_format import ResponseBuilder, ResponseStream
from tilefleet_worker.server.response_request import ResponseRequest
from tilefleet_worker.server.state import Service, WorkerState
from tilefleet_worker.server.stream import EventStream, whole_pieces, whole_reply
from tilefleet_worker.server.structure import grammar_of
from tilefleet_worker.server.submission import (
    Asked,
    Caller,
    Prompt,
    answers,
    check,
    room,
    truncated,
)

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for text completions


class Api:
    """Handlers over one worker's state."""

    def __init__(self, state: WorkerState, desk: AnswerDesk) -> None:
        self._state = state
        self._desk = desk
        self._budgets = Budgets()

    def _caller(self, http: HttpRequest) -> Caller:
        key: Key | None = getattr(http.state, "key", None)
        return Caller() if key is None else Caller(key.id, self._budgets.of(key.id, key.limits))

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        body = parse(ChatRequest, await http.body())
        service = self._state.admit(body.model)
        conversation = await converse(service, body)
        words = ChatFormat(
            service.tokenizer,
            logprobs=body.logprobs,
            make_parser=conversation.make_parser,
            several_calls=body.parallel_tool_calls,
            named_call=conversation.named_call,
            include_reasoning=body.include_reasoning,
        )
        return await self._reply(http, body, words, conversation.asked)

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        body = parse(CompletionRequest, await http.body())
        service = self._state.admit(body.model)
        check(body, len(body.prompt))
        prompts = await _tokenized(service, body)
        most = min(room(service, prompt.token_ids, "prompt") for prompt in prompts)
        num_each = body.best_of or body.n
        words = TextFormat(
            service.tokenizer,
            logprobs=body.logprobs is not None,
            echoed=[p.token_ids for p in prompts for _ in range(num_each)] if body.echo else (),
        )
        asked = Asked(
            prompts,
            min(most, max(_DEFAULT_COMPLETION_TOKENS, body.min_tokens)),
            await make_constraint(service, grammar_of(body)),
            body.skip_special_tokens,
            body.n if num_each > body.n else None,
        )
        return await self._reply(http, body, words, asked)

    async def responses(self, http: HttpRequest) -> Response:
        """POST /v1/responses."""
        body = parse(ResponseRequest, await http.body())
        service = self._state.admit(body.model)
        chat = body.as_chat()
        conversation = await converse(service, chat)
        caller = self._caller(http)
        name = f"resp-{uuid.uuid4().hex}"
        job = Job(
            self._desk, answers(service, chat, conversation.asked, name, caller), caller.budget
        )
        reader = Reader(conversation.make_parser(), several_calls=body.parallel_tool_calls)
        builder = ResponseBuilder(body, reader, self._state.model_name)
        self._state.admit(body.model)
        job.submit()
        if body.stream:
            return ResponseStream(job, builder)
        [pieces] = await whole_pieces(job, http.receive)
        collections.deque(builder.take(joined(pieces)), maxlen=0)
        return JSONResponse(builder.response(job.usage()))

    async def _reply(
        self, http: HttpRequest, body: Sampling, words: Format, asked: Asked
    ) -> Response:
        """Submit the answers to all prompts and reply with the stream or the whole."""
        service = self._state.admit(body.model)
        name = words.id_prefix + uuid.uuid4().hex
        caller = self._caller(http)
        job = Job(self._desk, answers(service, body, asked, name, caller), caller.budget)
        envelope = Envelope(name, int(time.time()), self._state.model_name, words)
        job.submit()
        if body.stream:
            return EventStream(job, envelope, body.stream_options)
        return JSONResponse(await whole_reply(job, envelope, http.receive, asked.num_best))


async def _tokenized(service: Service, body: CompletionRequest) -> list[Prompt]:
    for text in body.prompt:
        if isinstance(text, str):
            check_size(service, len(text), "prompt")

    def prompt_of(given: str | list[int]) -> Prompt:
        if isinstance(given, str):
            return Prompt(truncated(body, service.tokenizer.encode(given)), given)
        return Prompt(truncated(body, given))

    return await compute(
        sum(map(len, body.prompt)), lambda: [prompt_of(given) for given in body.prompt]
    )
