"""Limits on what a client may send, enforced before anything is parsed."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilefleet_worker.server.replies import ApiError, error_response

MAX_BODY_BYTES = 4 * 2**20
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 2**10
MAX_PROMPTS = 64
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_N = 128
MAX_ANSWERS = 512  # of all prompts of one request together
MAX_BAD_WORDS = 128
MAX_BIASED_TOKENS = 300
MAX_TOOLS = 128
MAX_TIMEOUT_SECONDS = 86_400.0


class Limits:
    """Middleware: 400 for too many headers, 413 for a body that is too large.

    The body is counted while it is read: a Content-Length may be missing or lie.
    """

    def __init__(self, app: ASGIApp, on_reject: Callable[[str], None]) -> None:
        """on_reject: told the name of the limit (headers or body) for each refusal."""
        self._app = app
        self._on_reject = on_reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counted body, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = _header_error(scope)
        if refused is not None:
            self._on_reject("headers")
            await error_response(refused)(scope, receive, send)
            return
        if _declared_length(scope) > MAX_BODY_BYTES:
            await error_response(self._body_error())(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > MAX_BODY_BYTES:
                    raise self._body_error()
            return message

        return counted

    def _body_error(self) -> ApiError:
        self._on_reject("body")
        message = f"The body is larger than {MAX_BODY_BYTES} bytes: send less."
        return ApiError(413, "body_too_large", message)


def _header_error(scope: Scope) -> ApiError | None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) <= MAX_HEADERS and size <= MAX_HEADER_BYTES:
        return None
    rule = f"at most {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes of them"
    return ApiError(400, "invalid_value", f"{len(headers)} headers of {size} bytes: send {rule}.")


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:18])
    return 0
