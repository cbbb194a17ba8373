"""The outermost layer of port 8000: request ids, the HTTP metrics, and the last line of defence."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.replies import error_response, internal_error

LOGGER = logging.getLogger(__name__)

# What may be echoed into a header and a log line.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Asked by machines all the time; they would drown the rates of real requests.
_UNCOUNTED = frozenset({"/health", "/version", "/metrics"})


class Outer:
    """Middleware: X-Request-Id on every reply, one count a request, a generic 500 for a bug."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Mapping[object, str]) -> None:
        """paths: the route's path of each endpoint, so that no label is of a client's choice."""
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, began, status = _request_id(scope), time.monotonic(), 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", []), named]
            await send(message)

        try:
            await self._app(scope, receive, marked)
        except Exception:
            LOGGER.exception("request %s failed", request_id)
            if status == 0:
                await error_response(internal_error())(scope, receive, marked)
        finally:
            self._count(scope, status, time.monotonic() - began)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = self._paths.get(scope.get("endpoint"), "none")
        # 499: the client left before there was a status. It is counted as an abort elsewhere.
        if path not in _UNCOUNTED and status not in (0, 499):
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            self._metrics.http(path, method, status, seconds)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text):
            return str(text)
    return f"req-{uuid.uuid4().hex}"
