"""Operator and worker meet over arguments and /stats: what one writes, the other reads."""

import json
from typing import Any

import pytest

from tests.operator.builders import deployment
from tilefleet_operator.desired import (
    ADMIN_PORT,
    API_PORT,
    CACHE_PATH,
    REMOVAL_DELAY_SECONDS,
    Defaults,
    worker_args,
)
from tilefleet_operator.stats import STATS_VERSION, Counters, Gauges, worker_stats
from tilefleet_worker.config import ServeConfig, parse_args
from tilefleet_worker.server.state import COUNTERS, GAUGES, WorkerState


def parsed(**spec: Any) -> ServeConfig:
    """The worker's reading of what the operator renders for a spec."""
    command, *flags = worker_args(deployment(**spec), Defaults(hf_endpoint="http://hub:8080"))
    assert command == "serve"
    return parse_args(flags)


def test_least_spec_parses_and_agrees_on_ports_and_times() -> None:
    config = parsed()
    assert (config.port, config.admin_port) == (API_PORT, ADMIN_PORT)
    assert config.cache_dir == CACHE_PATH
    assert config.removal_delay == REMOVAL_DELAY_SECONDS
    assert config.drain_timeout == 300
    assert config.served_model_name == "llm"
    assert config.backend == "cpu"


def test_every_field_arrives() -> None:
    config = parsed(
        model={"uri": "hf://org/name@main", "name": "tiny", "maxModelLen": 512},
        engine={
            "kvCache": {"memory": "1.5Gi", "blockSize": 32, "prefixCaching": False},
            "maxBatchTokens": 64,
            "maxConcurrent": 8,
            "resources": {"cpu": "1500m"},
        },
        rollout={"drain": {"timeout": "1m30s"}},
    )
    assert config.model == "hf://org/name@main"
    assert config.hf_endpoint == "http://hub:8080"
    assert (config.served_model_name, config.max_model_len) == ("tiny", 512)
    assert (config.kv_cache_memory, config.block_size) == (3 * 2**29, 32)
    assert config.prefix_caching is False
    assert (config.max_batch_tokens, config.max_concurrent) == (64, 8)
    assert (config.drain_timeout, config.threads) == (90.0, 2)


@pytest.mark.parametrize(
    ("uri", "path"),
    [("file:///m/x", "file:///m/x"), ("pvc://claim/a/b", "file:///models/a/b")],
)
def test_model_sources_arrive(uri: str, path: str) -> None:
    assert parsed(model={"uri": uri}).model == path


def test_amd_arguments_parse() -> None:
    assert parsed(accelerator={"vendor": "amd"}).backend == "auto"


def test_stats_of_a_starting_worker_are_read() -> None:
    state = WorkerState(parsed(), revision="0a1b2c3d")
    state.end_phase("import", 1.5)
    answer = worker_stats(json.loads(json.dumps(state.stats())))
    assert (answer.model, answer.revision) == ("llm", "0a1b2c3d")
    assert (answer.ready, answer.draining, answer.inflight) == (False, False, 0)
    assert answer.startup == (("import", 1.5),)
    assert state.stats()["version"] == STATS_VERSION


def test_both_sides_name_the_same_counters_and_gauges() -> None:
    assert set(COUNTERS) == set(Counters.__dataclass_fields__)
    assert set(GAUGES) == set(Gauges.__dataclass_fields__)
