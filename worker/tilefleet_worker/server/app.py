"""The ASGI application of port 8000: routes, one error envelope, and what stands before them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from tilefleet_worker.errors import RequestError
from tilefleet_worker.server.answers import AnswerDesk
from tilefleet_worker.server.api import Api
from tilefleet_worker.server.auth import METRICS_PATH, OPEN_PATHS, KeyFile, RequireKey
from tilefleet_worker.server.limits import Limits
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.model_api import ModelApi
from tilefleet_worker.server.outer import Outer
from tilefleet_worker.server.replies import ApiError, error_response
from tilefleet_worker.server.scrape import Scrape
from tilefleet_worker.server.series import LIMITS
from tilefleet_worker.server.state import WorkerState
from tilefleet_worker.server.stream import ClientGone


def routes(api: Api, model: ModelApi) -> list[Route]:
    """Every route of port 8000. Nothing here changes the engine; that is port 8001's."""
    return [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/responses", api.responses, methods=["POST"]),
        Route("/v1/models", model.models, methods=["GET"]),
        Route("/v1/models/{id:path}", model.model, methods=["GET"]),
        Route("/tokenizer_info", model.tokenizer_info, methods=["GET"]),
        Route("/tokenize", model.tokenize, methods=["POST"]),
        Route("/detokenize", model.detokenize, methods=["POST"]),
        Route("/health", model.health, methods=["GET"]),
        Route("/openapi.json", model.openapi, methods=["GET"]),
        Route("/version", model.version, methods=["GET"]),
    ]


def create_app(
    state: WorkerState, desk: AnswerDesk, metrics: Metrics, keys: KeyFile | None
) -> ASGIApp:
    """The application. keys: None leaves the API open to whoever reaches the port."""
    table = routes(Api(state, desk), ModelApi(state))
    open_paths = OPEN_PATHS
    if state.config.metrics_on_api_port:
        table.append(Route(METRICS_PATH, Scrape(metrics).page, methods=["GET"]))
        open_paths |= {METRICS_PATH}
    metrics.expect_routes({r.path: tuple(sorted(r.methods or ())) for r in table})
    app: ASGIApp = _starlette(table, metrics)
    app = Limits(app, metrics.limit)
    if keys is not None:
        app = RequireKey(app, keys, open_paths)
    return Outer(app, metrics, {route.endpoint: route.path for route in table})


def _starlette(table: list[Route], metrics: Metrics) -> Starlette:
    async def refused(_: HttpRequest, error: Exception) -> Response:
        if not isinstance(error, RequestError):
            raise error
        if error.code in LIMITS:
            metrics.limit(error.code)
        return error_response(error)

    known: list[BaseRoute] = list(table)
    handlers = {
        RequestError: refused,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        ClientGone: _gone,
    }
    app = Starlette(routes=known, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router, in our envelope."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 405:
        message = f"{http.method} is not allowed here: use {(error.headers or {}).get('Allow')}."
        reply = error_response(ApiError(405, "method_not_allowed", message))
        reply.headers.update(error.headers or {})
        return reply
    if error.status_code == 404:
        message = "This route does not exist: see /v1/models and /v1/chat/completions."
        return error_response(ApiError(404, "unknown_route", message))
    return error_response(ApiError(error.status_code, "invalid_value", "The request is not valid."))


async def _gone(_: HttpRequest, __: Exception) -> Response:
    """The client left: nobody reads this."""
    return Response(status_code=499)
