"""Every error the worker raises on purpose. A message names the value, the rule and the remedy."""


class WorkerError(Exception):
    """Root of the tree: catching it catches everything the worker reports on purpose."""


class ConfigError(WorkerError):
    """A flag or option is outside its range, or two contradict. Raised before serving."""


class ModelError(WorkerError):
    """A model folder cannot be served: a file is missing, damaged, or describes something else."""


class RequestError(WorkerError):
    """One request is invalid. It answers that caller and touches nobody else.

    `status` is an HTTP status, `code` the machine-readable reason of the OpenAI error object and
    `param` the request field at fault, when there is one.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


class EngineError(WorkerError):
    """The engine itself broke: an invariant, the device, or a thread that will not stop."""
