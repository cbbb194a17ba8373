"""Metrics in Prometheus format: vLLM's names for what both engines have, `tilefleet_worker_` else.

Names, types, labels and buckets follow vLLM 0.33, so that dashboards, routers and load tools for it
work unchanged. Every label value exists from the start, at 0: absence is never a zero. Not here,
because the server cannot see when the scheduler starts a request: queue and prefill time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import prometheus_client as prometheus

from tilefleet_worker.server.engine_metrics import EngineCollector
from tilefleet_worker.server.state import WorkerState

if TYPE_CHECKING:
    from tilefleet_worker.server.answer import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTIONS = {"queue_full": "max_num_queued_reqs", "queue_tokens": "max_num_queued_tokens"}
LIMITS = ("headers", "body", "context_length_exceeded", "queue_full")
FAILURES = ("internal_error", "draining", "client_gone", "other")
STATUS_CLASSES = ("2xx", "4xx", "5xx")

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
# vLLM's bounds and four finer ones: decode steps of large GPUs are below 10 ms.
_INTER_TOKEN = (0.001, 0.002, 0.005, 0.0075, *_PER_TOKEN)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(m * 10.0**e for e in range(6) for m in (1, 2, 5) if m * 10**e <= 200_000)

# name: (help, bounds). All carry model_name and engine.
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _TTFT),
    "inter_token_latency_seconds": ("Seconds between two tokens of an answer.", _INTER_TOKEN),
    "request_time_per_output_token_seconds": ("Mean seconds a token after the first.", _PER_TOKEN),
    "e2e_request_latency_seconds": ("Seconds from arrival to the last token.", _REQUEST),
    "request_decode_time_seconds": ("Seconds from the first to the last token.", _REQUEST),
    "request_prompt_tokens": ("Tokens of the prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of the answer.", _TOKENS),
    "request_max_num_generation_tokens": ("Most tokens asked for.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of the request.", _TOKENS),
    "request_params_n": ("Answers asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that no cache spared.", _TOKENS),
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that got an answer.",
    "generation_tokens": "Tokens generated.",
    "prompt_tokens_cached": "Prompt tokens that the prefix cache spared.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
}
_LABELLED = {
    "request_success": ("Requests ended, by reason.", "finished_reason", FINISHED_REASONS),
    "prompt_tokens_by_source": (
        "Prompt tokens by where their KV came from.",
        "source",
        ("local_compute", "local_cache_hit", "external_kv_transfer"),
    ),
}


class Metrics:
    """All metrics of one worker, in a registry of their own."""

    def __init__(self, state: WorkerState) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._names = (state.model_name, "0")
        self._histograms = {
            name: self._histogram(name, *spec) for name, spec in _HISTOGRAMS.items()
        }
        self._counters = {name: self._counter(name, text) for name, text in _COUNTERS.items()}
        self._labelled = {name: self._by(name, *spec) for name, spec in _LABELLED.items()}
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
        self._prompt(len(answer.request.prompt_token_ids), answer.num_cached_tokens)
        decode = timing.last_token - timing.first_token
        observed = {
            "e2e_request_latency_seconds": timing.last_token - timing.started,
            "request_decode_time_seconds": decode,
            "request_generation_tokens": answer.num_tokens,
            "request_max_num_generation_tokens": answer.request.params.max_tokens,
            "request_params_max_tokens": answer.request.params.max_tokens,
            "request_params_n": 1,
        }
        if answer.num_tokens > 1:
            observed["request_time_per_output_token_seconds"] = decode / (answer.num_tokens - 1)
        for name, value in observed.items():
            self._histograms[name].observe(value)

    def _prompt(self, prompt: int, cached: int) -> None:
        self._histograms["request_prompt_tokens"].observe(prompt)
        self._histograms["request_prefill_kv_computed_tokens"].observe(prompt - cached)
        for name in ("prompt_tokens", "prefix_cache_queries"):
            self._counters[name].inc(prompt)
        for name in ("prompt_tokens_cached", "prefix_cache_hits"):
            self._counters[name].inc(cached)
        self._labelled["prompt_tokens_by_source"]["local_compute"].inc(prompt - cached)
        self._labelled["prompt_tokens_by_source"]["local_cache_hit"].inc(cached)

    def render(self) -> bytes:
        """The page, in the text format of CONTENT_TYPE whatever a scraper would like better.

        The client library turns the colons of vLLM's names into underscores in OpenMetrics.
        """
        return prometheus.generate_latest(self._registry)


def without_created_series() -> None:
    """Turn off the `_created` series of the client library, which double the page for nobody."""
    prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
