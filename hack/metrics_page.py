"""docs/reference/metrics.md: every family of a worker, and those that tools for vLLM ask for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tilefleet_worker.config import parse_args
from tilefleet_worker.server.engine_metrics import CACHE_CONFIG
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.state import WorkerState

SERIES = Path(__file__).with_name("vllm_series.yaml")
ASKS = {"R": "routers", "V": "vLLM", "P": "production-stack", "A": "aiperf"}
TEXT = """
Admin port (8001), `/metrics`; with `--metrics-on-api-port` also on the API port, without a key, for
routers that scrape it there (`llm-d.ai/engine-type: vllm`). Prometheus' text format, or OpenMetrics
for who asks for it. Names that begin with `vllm:` have vLLM 0.33's types, labels and bounds.
`engine` is always `0`: one engine a pod. An answer that ends at a stop string reports the
preemptions up to then.
"""


def rows() -> Iterator[tuple[str, ...]]:
    """Name, type, labels and meaning of every family."""
    state = WorkerState(parse_args(["--model", "tiny"]))
    found = {CACHE_CONFIG[0]: ("gauge", "model_name, engine and facts", CACHE_CONFIG[1])}
    metrics = Metrics(state)
    metrics.expect_routes({"/v1/models": ("GET",)})  # so that the HTTP families show their labels
    for family in metrics.families():
        sample = next(iter(family.samples), None)
        labels = () if sample is None else (name for name in sample.labels if name != "le")
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = family.type, ", ".join(labels), family.documentation
    for name in sorted(found):
        yield f"`{name}`", *found[name]


def asked() -> Iterator[tuple[str, ...]]:
    """Series, who asks, and whether they are here, in the order of the list."""
    for entry in listed():
        name = entry["series"] + ("_total" if entry["type"] == "counter" else "")
        who = ", ".join(ASKS[letter] for letter in entry["by"]) or "–"
        yield f"`{name}`", entry["type"], who, "no" if "missing" in entry else "yes", remark(entry)


def remark(entry: dict[str, Any]) -> str:
    return str(entry.get("missing", "–"))


def listed() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(SERIES.read_text())
    return entries
