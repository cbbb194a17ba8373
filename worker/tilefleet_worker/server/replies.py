"""Error replies: one envelope, one table from status to type, no detail that could leak."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from tilefleet_worker.errors import RequestError
from tilefleet_worker.request import Refusal

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
# Clients such as openai-python ignore a Retry-After above 120 s and then do not retry at all.
_MAX_RETRY_AFTER_SECONDS = 120


class ApiError(RequestError):
    """A request error that may carry when to come back."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(status, code, message, param)
        self.retry_after_seconds = retry_after_seconds

    @classmethod
    def of(cls, refusal: Refusal) -> ApiError:
        """The error that answers a refusal of the engine."""
        return cls(
            refusal.status,
            refusal.code,
            refusal.message,
            refusal.param,
            refusal.retry_after_seconds,
        )


def invalid_value(param: str | None, message: str) -> ApiError:
    """400 for a value that breaks a rule."""
    return ApiError(400, "invalid_value", message, param)


def unsupported(param: str, message: str) -> ApiError:
    """400 for a field, or a value of it, that this worker does not implement."""
    return ApiError(400, "unsupported_parameter", message, param)


def internal_error() -> ApiError:
    """500 with a generic text; the cause goes to the log."""
    return ApiError(
        500, "internal_error", "The worker failed on this request; it is not your fault."
    )


def timed_out(message: str) -> ApiError:
    """408 for an answer that was not ready at the client's own deadline; not to be retried."""
    return ApiError(408, "deadline_exceeded", message, "timeout_seconds")


def draining(retry_after_seconds: int = 1) -> ApiError:
    """503 for a worker that is shutting down."""
    message = "This worker is shutting down: send the request again, to another replica."
    return ApiError(503, "draining", message, None, retry_after_seconds)


def not_ready() -> ApiError:
    """503 for a worker that is still loading its model."""
    return ApiError(503, "not_ready", "This worker is still loading its model: try again.", None, 5)


def error_body(error: RequestError) -> dict[str, Any]:
    """The `error` object of a reply or of a stream's error event."""
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: RequestError) -> JSONResponse:
    """The HTTP reply for an error; 429 and 503 always say when to come back."""
    headers = {}
    retry_after = getattr(error, "retry_after_seconds", None)
    if error.status in (429, 503):
        headers["Retry-After"] = str(min(_MAX_RETRY_AFTER_SECONDS, max(1, retry_after or 1)))
    if error.status in (408, 500):
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)
