"""Port 8001: probes, metrics, stats and drain. For the pod network only; it has no keys.

Nothing here returns a prompt or a text, and no probe sends a request through the model.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tilefleet_worker.errors import RequestError
from tilefleet_worker.server.drain import Drain
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.parsing import parse
from tilefleet_worker.server.replies import ApiError, error_response
from tilefleet_worker.server.scrape import Scrape
from tilefleet_worker.server.state import WorkerState


class DrainRequest(BaseModel):
    """Body of POST /drain; an empty body means the configured time-out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    timeout_seconds: float | None = Field(default=None, ge=0, le=86_400)


class Admin:
    """Handlers of the admin port."""

    def __init__(self, state: WorkerState, drain: Drain) -> None:
        self._state = state
        self._drain = drain

    async def startup(self, http: HttpRequest) -> Response:
        """GET /startupz: 200 as soon as the process serves; says which start phase it is in."""
        phases = [{"phase": n, "seconds": s} for n, s in list(self._state.phases.items())]
        return JSONResponse({"phase": self._state.phase, "startup": phases})

    async def ready(self, http: HttpRequest) -> Response:
        """GET /readyz: 200 once the model is loaded and answered, until a drain begins."""
        return _probe("ready", self._state.why_not_ready())

    async def live(self, http: HttpRequest) -> Response:
        """GET /livez: 503 when work is queued and no step has finished for too long."""
        return _probe("live", self._state.why_not_live())

    async def stats(self, http: HttpRequest) -> Response:
        """GET /stats: what the autoscaler reads."""
        return JSONResponse(self._state.stats())

    async def kv(self, http: HttpRequest) -> Response:
        """GET /kv: bytes of the KV pool by cause."""
        return JSONResponse(self._state.kv())

    async def drain(self, http: HttpRequest) -> Response:
        """POST /drain: begin draining; the process stays until it gets SIGTERM."""
        asked = parse(DrainRequest, await http.body() or b"{}").timeout_seconds
        self._drain.begin(self._state.config.drain_timeout if asked is None else asked)
        return JSONResponse({"draining": True, "inflight": self._drain.num_inflight}, 202)


def _probe(name: str, reason: str | None) -> Response:
    return JSONResponse({name: reason is None, "reason": reason}, 200 if reason is None else 503)


def create_admin(state: WorkerState, metrics: Metrics, drain: Drain) -> Starlette:
    """The application of port 8001."""
    admin = Admin(state, drain)
    table = [
        Route("/startupz", admin.startup),
        Route("/readyz", admin.ready),
        Route("/livez", admin.live),
        Route("/metrics", Scrape(metrics, fresh_seconds=0.0).page),
        Route("/stats", admin.stats),
        Route("/kv", admin.kv),
        Route("/drain", admin.drain, methods=["POST"]),
    ]
    return Starlette(
        routes=table, exception_handlers={RequestError: _refused, HTTPException: _unknown}
    )


async def _refused(_: HttpRequest, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return error_response(error)


async def _unknown(_: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = "method_not_allowed" if status == 405 else "unknown_route"
    return error_response(ApiError(status, code, "This route or method does not exist here."))
