"""The metrics page of a live worker: parses, has vLLM's names, counts what happened."""

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

TEXT = {"model": "tiny", "prompt": "p" * 40, "max_tokens": 8}
# What routers, dashboards and load tools for vLLM ask for, of what this worker has.
NEEDED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_waiting_by_reason": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:engine_sleep_state": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:prompt_tokens_by_source": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:request_success": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:admission_rejections": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "http_requests": "counter",
    "tilefleet_worker_kv_blocks": "gauge",
    "tilefleet_worker_draining": "gauge",
    "tilefleet_worker_startup_phase_seconds": "gauge",
    "tilefleet_worker_last_step_timestamp_seconds": "gauge",
    "tilefleet_worker_limit_rejections": "counter",
    "tilefleet_worker_request_failures": "counter",
}


def samples(worker):
    page = httpx.get(worker.admin + "/metrics").text
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in parse_text(page)
        for sample in family.samples
    }


def total(found, name, **labels):
    return sum(
        value
        for (sample, text), value in found.items()
        if sample == name and labels.items() <= json.loads(text).items()
    )


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;q=0.3",
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    ],
)
def test_page_parses_and_has_every_name(worker, accept):
    """With its colons, whatever the scraper prefers: Prometheus 2 and 3 send such headers."""
    reply = httpx.get(worker.admin + "/metrics", headers={"Accept": accept})
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family.type for family in parse_text(reply.text)}
    assert {name: families.get(name) for name in NEEDED} == NEEDED
    assert not any(name.endswith("_created") for name in families)
    assert all(name.startswith(("vllm:", "tilefleet_worker_", "http_request")) for name in families)


def test_every_label_value_exists_before_it_happens(worker):
    found = samples(worker)
    for reason in ("stop", "length", "abort", "error", "repetition"):
        text = json.dumps({"engine": "0", "finished_reason": reason, "model_name": "tiny"})
        assert ("vllm:request_success_total", text) in found
    for status in ("2xx", "4xx", "5xx"):
        labels = {"handler": "/v1/chat/completions", "method": "POST", "status": status}
        assert ("http_requests_total", json.dumps(labels)) in found
    states = [text for name, text in found if name == "tilefleet_worker_kv_blocks"]
    assert len(states) == 3


def test_counts_follow_what_happens(worker):
    before = samples(worker)
    httpx.post(worker.api + "/v1/completions", json=TEXT)
    httpx.post(worker.api + "/v1/completions", json=TEXT)
    httpx.post(worker.api + "/v1/completions", json=TEXT | {"prompt": [1, 259]})
    httpx.post(worker.api + "/v1/completions", json=TEXT | {"prompt": "p" * 600})
    httpx.get(worker.api + "/no-such-path-of-a-client")
    after = samples(worker)

    def grown(name, **labels):
        return total(after, name, **labels) - total(before, name, **labels)

    assert grown("vllm:request_success_total", finished_reason="length") == 2
    assert grown("vllm:request_success_total", finished_reason="error") == 1
    assert grown("vllm:generation_tokens_total") == 16
    assert grown("vllm:prompt_tokens_total") == 80
    assert grown("vllm:prefix_cache_queries_total") == 80
    assert grown("vllm:prefix_cache_hits_total") == grown("vllm:prompt_tokens_cached_total") == 32
    assert grown("vllm:prompt_tokens_by_source_total", source="local_compute") == 48
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    assert grown("vllm:inter_token_latency_seconds_count") == 14
    assert grown("vllm:e2e_request_latency_seconds_count") == 2
    assert grown("tilefleet_worker_limit_rejections_total", limit="context_length_exceeded") == 1
    assert grown("tilefleet_worker_request_failures_total", reason="internal_error") == 1
    assert grown("http_requests_total", handler="/v1/completions", status="2xx") == 2
    assert grown("http_requests_total", handler="/v1/completions", status="4xx") == 1
    assert grown("http_requests_total", handler="/v1/completions", status="5xx") == 1
    assert grown("http_requests_total", handler="none", status="4xx") == 1
    assert not any("no-such-path" in text for _, text in after)
    last = total(after, "tilefleet_worker_last_step_timestamp_seconds")
    assert last > 1_700_000_000


def test_stats_have_every_name_of_the_contract(worker):
    stats = worker.stats()
    assert stats["version"] == 1
    assert set(stats["counters"]) >= {
        *("arrivals", "prompt_tokens_computed", "prompt_tokens_cached", "generated_tokens"),
        *("completions", "aborts", "errors", "steps", "busy_seconds", "preemptions"),
    }
    assert set(stats["gauges"]) == {
        *("running", "waiting", "waiting_prompt_tokens", "oldest_wait_seconds"),
        *("kv_blocks_total", "kv_blocks_used", "kv_blocks_cached"),
        *("max_concurrent", "max_model_len"),
    }
    assert 0 < len(stats["steps"]) <= 64
    assert set(stats["steps"][0]) == {"seconds", "prefill_tokens", "sequences", "kv_tokens"}
    assert set(stats["startup"][0]) == {"phase", "seconds"}
    assert (stats["model"], stats["block_size"]) == ("tiny", 16)
    assert len(json.dumps(stats)) < 32_768
