"""The operator's error tree. Knows nothing about Kubernetes clients or HTTP.

OperatorError
├── SpecInvalid        an InferenceDeployment that cannot be acted on; carries every problem found
├── ObservationInvalid an object or a /stats document that is not what its schema promises
├── ApiError           the API server's answer was not a success; carries status, reason, message
│   ├── NotFound       404
│   ├── Conflict       409: precondition failed, field conflict or AlreadyExists
│   │   └── NameTaken  an object of somebody else holds the name of a child
│   ├── Gone           410: a list or watch version that the server no longer holds
│   ├── Unprocessable  422: the server's validation refused the object
│   ├── TooManyRequests 429; carries retry_after_seconds
│   └── Forbidden      403: RBAC, quota or an admission webhook
├── RevisionNotFound   the user asked for a revision that is not recorded
├── ConfigInvalid      a flag, an environment value or a file given by the user
└── LeaseLost          this process no longer holds the Lease and must write nothing more
"""

from __future__ import annotations

from collections.abc import Sequence


class OperatorError(Exception):
    """Base of every error that the operator raises on purpose."""


class SpecInvalid(OperatorError):
    """An InferenceDeployment that cannot be acted on.

    problems: one sentence each, naming field, value and rule.
    """

    def __init__(self, name: str, problems: Sequence[str]) -> None:
        self.name = name
        self.problems = tuple(problems)
        super().__init__(f"InferenceDeployment {name!r}: " + "; ".join(self.problems))


class ObservationInvalid(OperatorError):
    """An observed object or document lacks a field, or holds a value outside its range."""


class RevisionNotFound(OperatorError):
    """The user asked for a revision that is not recorded; the message names those that are."""


class ApiError(OperatorError):
    """The API server answered with an error.

    status: HTTP status code. reason: the Status object's reason, for example "AlreadyExists".
    message: the server's own words. path: request path.
    """

    def __init__(self, status: int, reason: str, message: str, path: str = "") -> None:
        self.status = status
        self.reason = reason
        self.message = message
        self.path = path
        super().__init__(f"{path or 'API server'}: {status} {reason}: {message}")


class NotFound(ApiError):
    """404: the object or the resource does not exist."""


class Conflict(ApiError):
    """409: a precondition failed, another manager owns a field, or the object exists."""


class NameTaken(Conflict):
    """An object of somebody else holds the name of a child; nothing was sent."""


class Gone(ApiError):
    """410: the resource version is too old; list again."""


class Unprocessable(ApiError):
    """422: the object breaks its schema or a CEL rule."""


class Forbidden(ApiError):
    """403: RBAC, a quota or an admission webhook said no."""


class TooManyRequests(ApiError):
    """429: wait retry_after_seconds, then repeat."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        path: str = "",
        retry_after_seconds: float = 1.0,
    ) -> None:
        super().__init__(status, reason, message, path)
        self.retry_after_seconds = retry_after_seconds


class ConfigInvalid(OperatorError):
    """A flag, an environment value or a file of the user's that cannot be used."""


class LeaseLost(OperatorError):
    """The Lease went to another process, or could not be renewed in time."""
