"""The metric families that the server counts: names, label values, bounds of histograms.

Names, types, labels and buckets follow vLLM 0.33, so that dashboards, routers and load tools for it
work unchanged. What the engine counts is in engine_metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping

FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTIONS = {"queue_full": "max_num_queued_reqs", "queue_tokens": "max_num_queued_tokens"}
LIMITS = ("headers", "body", "context_length_exceeded", "queue_full", "rate_limit_exceeded")
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

# Name without `vllm:` and `_total`, and what it tells. All carry model_name and engine.
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _TTFT),
    "inter_token_latency_seconds": ("Seconds between two tokens of an answer.", _INTER_TOKEN),
    "request_time_per_output_token_seconds": ("Mean seconds a token after the first.", _PER_TOKEN),
    "e2e_request_latency_seconds": ("Seconds from arrival to the last token.", _REQUEST),
    "request_queue_time_seconds": ("Seconds from arrival to the first step.", _REQUEST),
    "request_prefill_time_seconds": ("Seconds from the first step to the first token.", _REQUEST),
    "request_decode_time_seconds": ("Seconds from the first to the last token.", _REQUEST),
    "request_inference_time_seconds": ("Seconds from the first step to the last token.", _REQUEST),
    "request_prompt_tokens": ("Tokens of the prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of the answer.", _TOKENS),
    "request_max_num_generation_tokens": ("Most tokens asked for.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of the request.", _TOKENS),
    "request_params_n": ("Answers asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that no cache spared.", _TOKENS),
    "request_num_preemptions": (
        "Times that the request lost its KV blocks to others.",
        (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0),
    ),
}
COUNTERS: Mapping[str, str] = {
    "prompt_tokens": "Prompt tokens of requests that got an answer.",
    "generation_tokens": "Tokens generated.",
    "prompt_tokens_cached": "Prompt tokens that the prefix cache spared.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache on the device.",
    "external_prefix_cache_queries": "Prompt tokens looked up in host memory, too.",
    "external_prefix_cache_hits": "Prompt tokens copied back from host memory.",
}
LABELLED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "request_success": ("Requests ended, by reason.", "finished_reason", FINISHED_REASONS),
    "prompt_tokens_by_source": (
        "Prompt tokens by where their KV came from.",
        "source",
        ("local_compute", "local_cache_hit", "external_kv_transfer"),
    ),
    "prompt_tokens_cached_by_source": (
        "Prompt tokens that the prefix cache spared, by where it held them.",
        "source",
        ("device", "host", "disk", "p2p", "external_unspecified"),
    ),
}
