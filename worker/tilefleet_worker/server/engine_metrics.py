"""The engine's counters and gauges as metric families, read at each scrape."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tilefleet_worker.server.state import KV_CAUSES, WorkerState
from tilefleet_worker.stats import EngineStats, HistogramCounts

PHASES = ("import", "download", "weights", "pool", "warmup")
CACHE_CONFIG = (
    "vllm:cache_config_info",
    "Facts of the KV cache, always 1; once the model is loaded.",
)
_SHARED_COUNTERS = (
    ("num_preemptions", "preemptions", "Times that requests lost their KV blocks to older ones."),
    ("spec_decode_num_drafts", "drafts", "Times that tokens of a request were guessed."),
    ("spec_decode_num_draft_tokens", "draft_tokens", "Tokens guessed."),
    ("spec_decode_num_accepted_tokens", "accepted_tokens", "Guessed tokens that were right."),
)
_NAMES = ["model_name", "engine"]


class EngineCollector(Collector):
    """Reads `WorkerState` when Prometheus asks; holds no number of its own."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._values = [state.model_name, "0"]

    def collect(self) -> Iterator[Metric]:
        """All families. The same series exist before and after the model is loaded."""
        stats = self._state.engine_stats()
        yield from self._shared(stats)
        yield from self._own(stats.gauges, stats.counters)
        yield from self._pool()
        yield self._histogram(
            "tilefleet_worker_step_duration_seconds",
            "Seconds that a step took.",
            stats.histograms["step_seconds"],
        )
        if self._state.service is not None:
            yield self._cache_config(stats.gauges)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_NAMES)
        family.add_metric(self._values, value)
        return family

    def _by(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*_NAMES, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_NAMES)
        family.add_metric(self._values, value)
        return family

    def _histogram(self, name: str, text: str, found: HistogramCounts) -> Metric:
        family = HistogramMetricFamily(name, text, labels=_NAMES)
        below = list(itertools.accumulate(found.counts))
        bounds = [*map(str, map(float, found.bounds)), "+Inf"]
        family.add_metric(self._values, list(zip(bounds, below, strict=True)), found.sum)
        return family

    def _shared(self, stats: EngineStats) -> Iterator[Metric]:
        """Series under vLLM's names."""
        gauges = stats.gauges
        waiting = gauges["waiting"]
        used = gauges["kv_blocks_used"] / max(1, gauges["kv_blocks_total"])
        yield self._gauge("vllm:num_requests_running", "Requests that decode.", gauges["running"])
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", waiting)
        yield self._by(
            "vllm:num_requests_waiting_by_reason",
            "Requests in the queue, by what they wait for.",
            "reason",
            {"capacity": waiting, "deferred": 0},
        )
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used)
        yield self._by(
            "vllm:engine_sleep_state",
            "1 for the state that the engine is in.",
            "sleep_state",
            {"awake": 1, "weights_offloaded": 0, "discard_all": 0},
        )
        for name, counter, text in _SHARED_COUNTERS:
            yield self._counter(f"vllm:{name}", text, stats.counters[counter])
        # A histogram in spite of its name, which is vLLM's.
        yield self._histogram(
            "vllm:iteration_tokens_total",
            "Tokens computed in a step, of prompts and answers.",
            stats.histograms["step_tokens"],
        )

    def _cache_config(self, gauges: Mapping[str, float]) -> Metric:
        config = self._state.resolved
        labels = {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(int(gauges["kv_blocks_total"])),
            "cache_dtype": config.dtype,
            "enable_prefix_caching": str(config.prefix_caching),
        }
        name, text = CACHE_CONFIG
        family = GaugeMetricFamily(name, text, labels=[*_NAMES, *labels])
        family.add_metric([*self._values, *labels.values()], 1)
        return family

    def _own(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> Iterator[Metric]:
        """Series that vLLM has no name for."""
        total, used, cached = (gauges[f"kv_blocks_{kind}"] for kind in ("total", "used", "cached"))
        yield self._by(
            "tilefleet_worker_kv_blocks",
            "KV blocks by what holds them; they sum to the pool.",
            "state",
            {"used": used, "cached": cached, "free": total - used - cached},
        )
        yield self._by(
            "tilefleet_worker_startup_phase_seconds",
            "Seconds that each start phase took; 0 for one that has not happened.",
            "phase",
            dict.fromkeys(PHASES, 0.0) | self._state.phases,
        )
        yield self._gauge("tilefleet_worker_draining", "1 while draining.", self._state.draining)
        yield self._gauge(
            "tilefleet_worker_last_step_timestamp_seconds",
            "Unix time at which the last step finished; 0 before the first.",
            self._last_step(),
        )
        for name, text in (
            ("steps", "Steps finished."),
            ("busy_seconds", "Seconds spent in steps."),
        ):
            yield self._counter(f"tilefleet_worker_{name}", text, counters[name])

    def _pool(self) -> Iterator[Metric]:
        """Bytes of the pool, as at /kv."""
        kv = self._state.kv()
        causes = {cause: kv[cause] for cause in KV_CAUSES}
        yield self._by(
            "tilefleet_worker_kv_bytes",
            "Bytes of the KV pool by cause; they sum to tilefleet_worker_kv_pool_bytes.",
            "cause",
            causes,
        )
        yield self._gauge("tilefleet_worker_kv_pool_bytes", "Bytes of the KV pool.", kv["total"])
        yield self._by(
            "tilefleet_worker_kv_host_bytes",
            "Bytes of host memory for evicted prefixes (--kv-offloading-size) by cause.",
            "cause",
            {cause: kv["host"][cause] for cause in ("cached", "free")},
        )

    def _last_step(self) -> float:
        service = self._state.service
        last = None if service is None else service.engine.last_step_seconds
        return 0.0 if last is None else time.time() - (time.monotonic() - last)
