"""The handlers of port 8000 that generate nothing: models, the tokenizer, health, version."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tilefleet_worker.server.conversation import compute, num_characters, renderer
from tilefleet_worker.server.openapi import document
from tilefleet_worker.server.parsing import parse
from tilefleet_worker.server.protocol import DetokenizeRequest, TokenizeRequest
from tilefleet_worker.server.replies import invalid_value
from tilefleet_worker.server.state import Service, WorkerState


def version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version("tilefleet")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _text_of(service: Service, body: TokenizeRequest) -> tuple[Callable[[], str], int, bool]:
    """What writes the text, about how long it is, and whether it wants special tokens around it.

    Raises ApiError 400 unless exactly one of prompt and messages is there.
    """
    if (body.prompt is None) == (body.messages is None):
        raise invalid_value("prompt", "Send either prompt or messages.")
    if body.messages is None:
        text = body.prompt or ""
        return lambda: text, len(text), True
    options = {str(name): value for name, value in body.chat_template_kwargs.items()}
    tools = [tool.for_template() for tool in body.tools]
    generate = body.add_generation_prompt
    write = renderer(service, body.messages, tools, options, add_generation_prompt=generate)
    return write, num_characters(body.messages), False


class ModelApi:
    """Handlers over one worker's state."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model(self._state.served())]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/{id}."""
        service = self._state.served()
        self._state.check_model(http.path_params["id"])
        return JSONResponse(self._model(service))

    async def tokenize(self, http: HttpRequest) -> Response:
        """POST /tokenize."""
        body = parse(TokenizeRequest, await http.body())
        service = self._state.served()
        self._state.check_model(body.model)
        write, size, special = _text_of(service, body)
        if body.add_special_tokens is not None:
            special = body.add_special_tokens

        def encode() -> list[int]:
            return service.tokenizer.encode(write(), add_special_tokens=special)

        tokens = await compute(size, encode)
        found: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": service.config.max_model_len,
            "tokens": tokens,
            "token_strs": None,
        }
        if body.return_token_strs:
            found["token_strs"] = [service.tokenizer.token(token_id) for token_id in tokens]
        return JSONResponse(found)

    async def tokenizer_info(self, http: HttpRequest) -> Response:
        """GET /tokenizer_info: what clients need to write and count prompts as the model does."""
        service = self._state.served()
        most = {"model_max_length": service.config.max_model_len}
        return JSONResponse(service.tokenizer.facts() | most)

    async def detokenize(self, http: HttpRequest) -> Response:
        """POST /detokenize."""
        body = parse(DetokenizeRequest, await http.body())
        tokenizer = self._state.served().tokenizer
        self._state.check_model(body.model)
        for index, token_id in enumerate(body.tokens):
            if token_id >= tokenizer.vocab_size:
                rule = f"the vocabulary has {tokenizer.vocab_size} tokens"
                raise invalid_value(f"tokens[{index}]", f"Token id {token_id} is unknown: {rule}.")

        def decode() -> str:
            return tokenizer.decode(body.tokens, skip_special_tokens=False)

        return JSONResponse({"prompt": await compute(len(body.tokens), decode)})

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: the same answer as the readiness probe."""
        reason = self._state.why_not_ready()
        return Response(status_code=200 if reason is None else 503)

    async def openapi(self, http: HttpRequest) -> Response:
        """GET /openapi.json."""
        with_keys = bool(self._state.config.api_key_file)
        return JSONResponse(document(self._state.model_name, version(), with_keys=with_keys))

    async def version(self, http: HttpRequest) -> Response:
        """GET /version."""
        return JSONResponse({"version": version()})

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
