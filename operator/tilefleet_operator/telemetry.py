"""The operator's own metrics and its HTTP ports: /metrics, /healthz, /readyz.

One registry per process object, passed to whoever counts; nothing is global. It does not know what
is healthy: it asks the functions it is given.
"""

import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Telemetry:
    """All metrics of the operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "tilefleet_operator_"
        self.reconcile_seconds = Histogram(
            prefix + "reconcile_duration_seconds",
            "Seconds of one gather, plan and apply, by result (ok, waiting, error).",
            ["result"],
            buckets=_FAST,
            registry=self.registry,
        )
        self.queue_wait_seconds = Histogram(
            prefix + "queue_wait_seconds",
            "Seconds that a due key waited for a worker.",
            buckets=_FAST,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            prefix + "queue_depth", "Keys that are due and wait for a worker.",
            registry=self.registry,
        )  # fmt: skip
        self.api_requests = Counter(
            prefix + "api_requests_total",
            "Requests to the API server by verb, resource and HTTP status (0: no answer).",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.api_seconds = Histogram(
            prefix + "api_request_duration_seconds",
            "Seconds of one request to the API server.",
            ["verb", "resource"],
            buckets=_FAST,
            registry=self.registry,
        )
        self.watch_age_seconds = Gauge(
            prefix + "watch_age_seconds",
            "Seconds since the last event or list of a resource.",
            ["resource"],
            registry=self.registry,
        )
        self.leader = Gauge(
            prefix + "leader", "1 while this process holds the Lease, else 0.",
            registry=self.registry,
        )  # fmt: skip
        self.scrape_failures = Counter(
            prefix + "scrape_failures_total",
            "Failed reads of a worker's /stats by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.stale_plan_skips = Counter(
            prefix + "stale_plan_skips_total",
            "Plans not made because the view was older than the operator's own last write.",
            registry=self.registry,
        )
        self.actions = Counter(
            prefix + "actions_total",
            "Actions carried out by kind (apply, delete, drain) and result (ok, error).",
            ["action", "result"],
            registry=self.registry,
        )
        self.desired = Gauge(
            "tilefleet_inferencedeployment_desired_replicas",
            "Replicas that the fleet is sized to.",
            ["namespace", "name"],
            registry=self.registry,
        )
        self.ready = Gauge(
            "tilefleet_inferencedeployment_ready_replicas",
            "Replicas that are Ready.",
            ["namespace", "name"],
            registry=self.registry,
        )

    def observe_request(self, verb: str, plural: str, code: int, seconds: float) -> None:
        """Count one request to the API server; fits client.Observer."""
        self.api_requests.labels(verb, plural, str(code)).inc()
        self.api_seconds.labels(verb, plural).observe(seconds)

    def observe_fleet(self, namespace: str, name: str, status: Mapping[str, object]) -> None:
        """Show the two sizes of one fleet."""
        for gauge, field in ((self.desired, "desiredReplicas"), (self.ready, "readyReplicas")):
            value = status.get(field)
            if isinstance(value, int):
                gauge.labels(namespace, name).set(value)

    def forget_fleet(self, namespace: str, name: str) -> None:
        """Drop the series of a deployment that is gone."""
        for gauge in (self.desired, self.ready):
            gauge.remove_by_labels({"namespace": namespace, "name": name})


Check = Callable[[], Sequence[str]]
"""Returns what is wrong, one sentence each; empty when all is well."""


async def serve_metrics(
    telemetry: Telemetry, refresh: Callable[[], None], port: int
) -> web.AppRunner:
    """Serve /metrics; ``refresh`` sets the gauges before each scrape."""

    async def metrics(_: web.Request) -> web.Response:
        refresh()
        return web.Response(
            body=generate_latest(telemetry.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    return await _serve({"/metrics": metrics}, port)


async def serve_probes(healthy: Check, ready: Check, port: int) -> web.AppRunner:
    """Serve /healthz and /readyz: 200 "ok", or 503 with the reasons. Returns the running server."""

    def probe(check: Check) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            problems = check()
            return web.Response(
                status=503 if problems else 200, text="\n".join(problems or ["ok"]) + "\n"
            )

        return answer

    return await _serve({"/healthz": probe(healthy), "/readyz": probe(ready)}, port)


async def _serve(
    routes: Mapping[str, Callable[[web.Request], Awaitable[web.Response]]], port: int
) -> web.AppRunner:
    app = web.Application()
    app.add_routes([web.get(path, handler) for path, handler in routes.items()])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the trace if there is one."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(style: str) -> None:
    """Log to standard error as ``json`` or ``text``; kopf's notes per event only from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("kopf", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
