"""GET /metrics, as scrapers get it. Knows no family."""

from __future__ import annotations

import time

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tilefleet_worker.server.metrics import Metrics

# Routers ask every 50 ms, each replica of them; a page takes milliseconds of the event loop.
_FRESH_SECONDS = 0.025


class Scrape:
    """The page of one worker, rendered at most once in `fresh_seconds` for each format."""

    def __init__(self, metrics: Metrics, fresh_seconds: float = _FRESH_SECONDS) -> None:
        """fresh_seconds: how old a page may be; 0 renders each anew."""
        self._metrics = metrics
        self._fresh_seconds = fresh_seconds
        self._pages: dict[bool, tuple[float, Response]] = {}

    async def page(self, http: HttpRequest) -> Response:
        """GET /metrics."""
        open_metrics = "application/openmetrics-text" in http.headers.get("accept", "")
        now = time.monotonic()
        rendered, reply = self._pages.get(open_metrics, (float("-inf"), None))
        if reply is None or now - rendered >= self._fresh_seconds:
            page, kind = self._metrics.render(open_metrics=open_metrics)
            reply = Response(page, headers={"content-type": kind})
            self._pages[open_metrics] = now, reply
        return reply
