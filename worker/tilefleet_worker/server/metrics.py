"""Metrics in Prometheus format: vLLM's names for what both engines have, `tilefleet_worker_` else.

Every label value exists from the start, at 0: absence is never a zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import prometheus_client as prometheus
from prometheus_client import openmetrics
from prometheus_client.core import Metric

from tilefleet_worker.server.engine_metrics import EngineCollector
from tilefleet_worker.server.series import (
    COUNTERS,
    FAILURES,
    HISTOGRAMS,
    LABELLED,
    LIMITS,
    REJECTIONS,
    STATUS_CLASSES,
)
from tilefleet_worker.server.state import WorkerState

if TYPE_CHECKING:
    from tilefleet_worker.server.answer import Answer

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Metrics:
    """All metrics of one worker, in a registry of their own."""

    def __init__(self, state: WorkerState) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._names = (state.model_name, "0")
        self._histograms = {name: self._histogram(name, *spec) for name, spec in HISTOGRAMS.items()}
        self._counters = {name: self._counter(name, text) for name, text in COUNTERS.items()}
        self._offloads = state.config.kv_offloading_size > 0
        self._labelled = {name: self._by(name, *spec) for name, spec in LABELLED.items()}
        self._rejections = self._plain(
            "vllm:admission_rejections", "Requests refused at a queue bound.", "reason",
            tuple(REJECTIONS.values()), model_name=state.model_name,
        )  # fmt: skip
        self._limits = self._plain(
            "tilefleet_worker_limit_rejections", "Requests refused at a limit.", "limit", LIMITS
        )
        self._failures = self._plain(
            "tilefleet_worker_request_failures",
            "Accepted requests that did not get their answer.", "reason", FAILURES,
        )  # fmt: skip
        self._http = prometheus.Counter(
            "http_requests",
            "HTTP requests.",
            ["handler", "method", "status"],
            registry=self._registry,
        )
        self._http_seconds = prometheus.Histogram(
            "http_request_duration_seconds", "Seconds until the reply was complete.",
            ["handler", "method"], registry=self._registry,
        )  # fmt: skip
        self._registry.register(EngineCollector(state))
        # Uptime, memory and CPU of the process: dashboards ask for them.
        prometheus.ProcessCollector(registry=self._registry)
        prometheus.GCCollector(registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> prometheus.Histogram:
        family = prometheus.Histogram(
            f"vllm:{name}", text, ["model_name", "engine"], buckets=bounds, registry=self._registry
        )
        return family.labels(*self._names)

    def _counter(self, name: str, text: str) -> prometheus.Counter:
        family = prometheus.Counter(
            f"vllm:{name}", text, ["model_name", "engine"], registry=self._registry
        )
        return family.labels(*self._names)

    def _by(
        self, name: str, text: str, label: str, values: tuple[str, ...]
    ) -> dict[str, prometheus.Counter]:
        family = prometheus.Counter(
            f"vllm:{name}", text, ["model_name", "engine", label], registry=self._registry
        )
        return {value: family.labels(*self._names, value) for value in values}

    def _plain(
        self, name: str, text: str, label: str, values: tuple[str, ...], **fixed: str
    ) -> dict[str, prometheus.Counter]:
        family = prometheus.Counter(name, text, [*fixed, label], registry=self._registry)
        return {value: family.labels(*fixed.values(), value) for value in values}

    def expect_routes(self, handlers: dict[str, tuple[str, ...]]) -> None:
        """Create the HTTP series of these handlers (path: methods) at 0."""
        for handler, methods in handlers.items():
            for method in methods:
                self._http_seconds.labels(handler, method)
                for status in STATUS_CLASSES:
                    self._http.labels(handler, method, status)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request. handler: the route's path, never the client's."""
        self._http.labels(handler, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def limit(self, name: str) -> None:
        """Count a refusal at a limit, one of LIMITS."""
        self._limits[name].inc()

    def refuse(self, code: str) -> None:
        """Count a refusal at a bound of the queue, under vLLM's name for it."""
        if code in REJECTIONS:
            self._rejections[REJECTIONS[code]].inc()

    def fail(self, reason: str) -> None:
        """Count an accepted request without its answer; one outside FAILURES counts as `other`."""
        self._failures[reason if reason in FAILURES else "other"].inc()

    def tokens(self, answer: Answer, count: int, now: float) -> None:
        """Count tokens that arrived for an answer. now: monotonic seconds."""
        if count == 0:
            return
        self._counters["generation_tokens"].inc(count)
        timing = answer.timing
        if timing.first_token is None:
            timing.first_token = timing.last_token = now
            self._histograms["time_to_first_token_seconds"].observe(now - timing.started)
            return
        for _ in range(count):
            gap = (now - timing.last_token) / count
            self._histograms["inter_token_latency_seconds"].observe(gap)
        timing.last_token = now

    def finish(self, answer: Answer, reason: str) -> None:
        """Count the end of an answer. reason: one of FINISHED_REASONS."""
        self._labelled["request_success"][reason].inc()
        timing = answer.timing
        if timing.first_token is None:
            return
        prompt = len(answer.request.prompt_token_ids)
        self._prompt(prompt, answer.num_cached_tokens, answer.num_host_tokens)
        for name, value in (_times(answer) | _sizes(answer)).items():
            self._histograms[name].observe(value)

    def _prompt(self, prompt: int, cached: int, from_host: int) -> None:
        self._histograms["request_prompt_tokens"].observe(prompt)
        self._histograms["request_prefill_kv_computed_tokens"].observe(prompt - cached)
        for name in ("prompt_tokens", "prefix_cache_queries"):
            self._counters[name].inc(prompt)
        on_device = cached - from_host
        self._counters["prompt_tokens_cached"].inc(cached)
        self._counters["prefix_cache_hits"].inc(on_device)
        if self._offloads:
            self._counters["external_prefix_cache_queries"].inc(prompt - on_device)
            self._counters["external_prefix_cache_hits"].inc(from_host)
        self._labelled["prompt_tokens_by_source"]["local_compute"].inc(prompt - cached)
        self._labelled["prompt_tokens_by_source"]["local_cache_hit"].inc(on_device)
        self._labelled["prompt_tokens_by_source"]["external_kv_transfer"].inc(from_host)
        self._labelled["prompt_tokens_cached_by_source"]["device"].inc(on_device)
        self._labelled["prompt_tokens_cached_by_source"]["host"].inc(from_host)

    def families(self) -> Iterable[Metric]:
        """All families, with what they count now."""
        return self._registry.collect()

    def render(self, *, open_metrics: bool = False) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics, or the text format of Prometheus."""
        if not open_metrics:
            return prometheus.generate_latest(self._registry), TEXT
        # Names with a colon are legal; the library's default would turn it into an underscore.
        page = openmetrics.exposition.generate_latest(  # type: ignore[no-untyped-call]
            self._registry, escaping="allow-utf-8"
        )
        return page, OPEN_METRICS


def _times(answer: Answer) -> dict[str, float]:
    """Where the seconds of an answer went, by histogram. It has had a token."""
    timing = answer.timing
    first = timing.last_token if timing.first_token is None else timing.first_token
    decode = timing.last_token - first
    found = {
        "e2e_request_latency_seconds": timing.last_token - timing.started,
        "request_decode_time_seconds": decode,
    }
    if timing.left_queue is not None:
        found["request_queue_time_seconds"] = timing.left_queue - timing.started
        found["request_prefill_time_seconds"] = first - timing.left_queue
        found["request_inference_time_seconds"] = timing.last_token - timing.left_queue
    if answer.num_tokens > 1:
        found["request_time_per_output_token_seconds"] = decode / (answer.num_tokens - 1)
    return found


def _sizes(answer: Answer) -> dict[str, float]:
    """Counts of an answer by histogram; what belongs to the request only with its first answer."""
    found: dict[str, float] = {
        "request_generation_tokens": answer.num_tokens,
        "request_max_num_generation_tokens": answer.request.params.max_tokens,
        "request_params_max_tokens": answer.request.params.max_tokens,
        "request_num_preemptions": answer.num_preemptions,
    }
    return found | ({"request_params_n": answer.num_siblings} if answer.counts_prompt else {})


def without_created_series() -> None:
    """Turn off the `_created` series of the client library, which double the page for nobody."""
    prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
