"""The operator's own metrics, and the format of its log.

One registry per process object, passed to whoever counts; nothing is global. No label holds a
text that a client of a fleet could choose; fleets beyond FLEETS_SHOWN are counted, not shown.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tilefleet_operator import status

FLEETS_SHOWN = 2000
_FLEET = ("namespace", "name")
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# Field of a fleet's report → name of its series, and what it holds.
_FLEET_GAUGES = {
    "desired": ("desired_replicas", "Replicas that the fleet is sized to."),
    "ready": ("ready_replicas", "Replicas that are Ready."),
    "utilization": (
        "utilization_ratio", "Demand over the capacity of the ready replicas; above 1: too much.",
    ),
    "capacity": (
        "replica_capacity_tokens_per_second", "Tokens per second of one replica at full load.",
    ),
    "demand": ("demand_tokens_per_second", "Tokens per second that arrive, prompt and output."),
    "queue": ("queue_tokens", "Tokens of requests that wait for a replica."),
}  # fmt: skip


class Telemetry:
    """All metrics of the operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "tilefleet_operator_"
        self.reconcile_seconds = Histogram(
            prefix + "reconcile_duration_seconds",
            "Seconds of one gather, plan and execute, by result (ok, waiting, error).",
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
        self.events = Counter(
            prefix + "events_total",
            "Events by what became of them: posted, held_back (repeated or too many), error.",
            ["result"],
            registry=self.registry,
        )
        self.actions = Counter(
            prefix + "actions_total",
            "Actions carried out by kind (apply, delete, drain) and result (ok, error).",
            ["action", "result"],
            registry=self.registry,
        )
        self.queue_oldest_seconds = Gauge(
            prefix + "queue_oldest_seconds",
            "Seconds of the longest overdue or longest running key.",
            registry=self.registry,
        )
        self.decisions = Counter(
            prefix + "decisions_total",
            "Decisions on the size of a fleet by kind of reason.",
            ["reason"],
            registry=self.registry,
        )
        self.fleets_not_shown = Gauge(
            prefix + "fleets_not_shown",
            f"Fleets without series of their own, because {FLEETS_SHOWN} others have them.",
            registry=self.registry,
        )
        self.fleet_gauges = {
            field: self._fleet_gauge(name, text) for field, (name, text) in _FLEET_GAUGES.items()
        }
        self.condition = Gauge(
            "tilefleet_inferencedeployment_condition",
            "1 while the condition of this type is True, else 0.",
            [*_FLEET, "type"],
            registry=self.registry,
        )
        self._shown: set[tuple[str, str]] = set()
        self._not_shown: set[tuple[str, str]] = set()

    def _fleet_gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"tilefleet_inferencedeployment_{name}", text, _FLEET, registry=self.registry)

    def observe_request(self, verb: str, plural: str, code: int, seconds: float) -> None:
        """Count one request to the API server; fits client.Observer."""
        self.api_requests.labels(verb, plural, str(code)).inc()
        self.api_seconds.labels(verb, plural).observe(seconds)

    def observe_fleet(
        self, namespace: str, name: str, report: Mapping[str, Any], measured: status.Telemetry
    ) -> None:
        """Show one fleet. report: its status. A figure that is not known has no series."""
        key = (namespace, name)
        if key not in self._shown and len(self._shown) >= FLEETS_SHOWN:
            self._count_not_shown(self._not_shown | {key})
            return
        self._count_not_shown(self._not_shown - {key})
        figures: dict[str, float | None] = {
            "desired": report.get("desiredReplicas"),
            "ready": report.get("readyReplicas"),
            "utilization": measured.utilization,
            "capacity": measured.capacity,
            "demand": measured.demand,
            "queue": measured.queue if measured.demand is not None else None,
        }
        for field, value in figures.items():
            if value is None:
                self.fleet_gauges[field].remove_by_labels(dict(zip(_FLEET, key, strict=True)))
            else:
                self.fleet_gauges[field].labels(*key).set(value)
        self._shown.add(key)
        for condition in report.get("conditions") or ():
            self.condition.labels(*key, condition["type"]).set(condition["status"] == "True")

    def forget_fleet(self, namespace: str, name: str) -> None:
        """Drop the series of a deployment that is gone."""
        key = {"namespace": namespace, "name": name}
        for gauge in (*self.fleet_gauges.values(), self.condition):
            gauge.remove_by_labels(key)
        self._shown.discard((namespace, name))
        self._count_not_shown(self._not_shown - {(namespace, name)})

    def _count_not_shown(self, keys: set[tuple[str, str]]) -> None:
        self._not_shown = keys
        self.fleets_not_shown.set(len(keys))


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
