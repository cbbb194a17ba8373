"""The metrics page of a live worker: parses, has vLLM's names, counts what happened."""

import json
import re
import threading
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse_text

TEXT = {"model": "tiny", "prompt": "p" * 40, "max_tokens": 8}
ROOT = Path(__file__).parents[3]
LISTED = yaml.safe_load((ROOT / "hack" / "vllm_series.yaml").read_text())
# What routers, dashboards and load tools for vLLM ask for, of what this worker has; and our own.
NEEDED = {entry["series"]: entry["type"] for entry in LISTED if "missing" not in entry} | {
    "tilefleet_worker_kv_blocks": "gauge",
    "tilefleet_worker_kv_bytes": "gauge",
    "tilefleet_worker_kv_pool_bytes": "gauge",
    "tilefleet_worker_kv_host_bytes": "gauge",
    "tilefleet_worker_step_duration_seconds": "histogram",
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


def test_page_parses_and_has_every_name(worker):
    reply = httpx.get(worker.admin + "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family.type for family in parse_text(reply.text)}
    assert {name: families.get(name) for name in NEEDED} == NEEDED
    assert not any(name.endswith("_created") for name in families)
    ours = ("vllm:", "tilefleet_worker_", "http_request", "process_", "python_gc_")
    assert all(name.startswith(ours) for name in families)


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
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grown(f"vllm:{name}_seconds_count") == 2
    parts = [f"request_{part}_time_seconds_sum" for part in ("queue", "prefill", "decode")]
    seconds = [grown(f"vllm:{part}") for part in parts]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(grown("vllm:e2e_request_latency_seconds_sum"))
    inference = grown("vllm:request_inference_time_seconds_sum")
    assert inference == pytest.approx(seconds[1] + seconds[2])
    steps = grown("tilefleet_worker_steps_total")
    assert steps == grown("vllm:iteration_tokens_total_count")
    assert steps == grown("tilefleet_worker_step_duration_seconds_count")
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
        "kv_tokens_wasted",
        *("max_concurrent", "max_model_len"),
    }
    assert 0 < len(stats["steps"]) <= 64
    assert set(stats["steps"][0]) == {"seconds", "prefill_tokens", "sequences", "kv_tokens"}
    assert set(stats["startup"][0]) == {"phase", "seconds"}
    assert (stats["model"], stats["block_size"]) == ("tiny", 16)
    assert len(json.dumps(stats)) < 32_768


def kv_while_running(worker):
    """Readings of /kv while three answers of 300 tokens are made."""
    body = TEXT | {"prompt": "q" * 100, "max_tokens": 300, "ignore_eos": True, "n": 3}
    options = {"json": body, "timeout": 120}
    asking = threading.Thread(
        target=httpx.post, args=(worker.api + "/v1/completions",), kwargs=options
    )
    asking.start()
    seen = []
    while asking.is_alive():
        seen.append(httpx.get(worker.admin + "/kv").json())
    asking.join()
    return seen


def test_kv_bytes_sum_to_the_pool_while_requests_run(worker):
    """At /kv and in the metrics; at most a block is wasted for each request."""
    seen = []
    while not any(kv["wasted"] for kv in seen):  # a slow reader can miss a whole answer
        seen += kv_while_running(worker)
    for kv in seen:
        causes = [kv[cause] for cause in ("used", "wasted", "cached", "free", "spare")]
        assert sum(causes) == kv["total"] == 2**20
        assert min(causes) >= 0
        assert kv["wasted"] <= 3 * kv["block_bytes"]
    assert max(kv["used"] for kv in seen) > 0
    worker.wait_idle()
    kv, found = httpx.get(worker.admin + "/kv").json(), samples(worker)
    assert (kv["used"], kv["wasted"]) == (0, 0)
    assert kv["cached"] > 0
    assert total(found, "tilefleet_worker_kv_bytes") == kv["total"]
    assert total(found, "tilefleet_worker_kv_pool_bytes") == kv["total"]
    assert total(found, "tilefleet_worker_kv_bytes", cause="cached") == kv["cached"]


def test_request_parameters_are_counted_a_request(worker):
    before = samples(worker)
    assert httpx.post(worker.api + "/v1/completions", json=TEXT | {"n": 3}).status_code == 200
    after = samples(worker)

    def grown(name):
        return total(after, name) - total(before, name)

    assert grown("vllm:request_params_n_count") == 1
    assert grown("vllm:request_params_n_sum") == 3
    assert grown("vllm:request_params_max_tokens_count") == 3


def test_the_api_port_has_the_page_only_when_told(worker, start_worker, tmp_path):
    """Routers scrape the serving port, without a key; there the page may be a moment old."""
    assert httpx.get(worker.api + "/metrics").status_code == 404
    (tmp_path / "keys").write_text("secret")
    told = start_worker("--metrics-on-api-port", "--api-key-file", str(tmp_path / "keys"))
    told.wait_ready()
    reply = httpx.get(told.api + "/metrics")
    assert reply.status_code == 200
    assert re.search(r"^# TYPE vllm:kv_cache_usage_perc gauge$", reply.text, re.M)
    assert httpx.head(told.api + "/metrics").status_code == 200
    assert httpx.get(told.api + "/v1/models").status_code == 401
