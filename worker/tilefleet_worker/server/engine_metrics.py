"""The engine's counters and gauges as metric families, read at each scrape."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tilefleet_worker.server.state import WorkerState

PHASES = ("import", "download", "weights", "pool", "warmup")
_NAMES = ["model_name", "engine"]


class EngineCollector(Collector):
    """Reads `WorkerState` when Prometheus asks; holds no number of its own."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._values = [state.model_name, "0"]

    def collect(self) -> Iterator[Metric]:
        """All families. The same series exist before and after the model is loaded."""
        stats = self._state.engine_stats()
        yield from self._shared(stats.gauges)
        yield from self._own(stats.gauges, stats.counters)
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

    def _shared(self, gauges: Mapping[str, float]) -> Iterator[Metric]:
        """Series under vLLM's names."""
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
        preemptions = CounterMetricFamily(
            "vllm:num_preemptions",
            "Requests that lost their KV blocks to older ones.",
            labels=_NAMES,
        )
        preemptions.add_metric(self._values, self._state.engine_stats().counters["preemptions"])
        yield preemptions

    def _cache_config(self, gauges: Mapping[str, float]) -> Metric:
        config = (self._state.service or self._state).config
        labels = {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(int(gauges["kv_blocks_total"])),
            "cache_dtype": config.dtype,
            "enable_prefix_caching": str(config.prefix_caching),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Facts of the KV cache, always 1.", labels=[*_NAMES, *labels]
        )
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
            family = CounterMetricFamily(f"tilefleet_worker_{name}", text, labels=_NAMES)
            family.add_metric(self._values, counters[name])
            yield family

    def _last_step(self) -> float:
        service = self._state.service
        last = None if service is None else service.engine.last_step_seconds
        return 0.0 if last is None else time.time() - (time.monotonic() - last)
