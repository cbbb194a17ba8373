"""The API server refuses what cannot work, with field, value and rule in the message."""

import json
from typing import Any

import pytest
from fleets import cpu_fleet
from testbed import Testbed

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (
        "scheme",
        {"model": {"uri": "ftp://host/x"}},
        ("spec.model.uri", "ftp://host/x", "hf|pvc|file"),
    ),
    ("unknown-field", {"engine": {"gpus": 8}}, ("spec.engine.gpus", "unknown field")),
    ("wrong-type", {"replicas": "three"}, ("spec.replicas", '"string"', "integer")),
    ("below-minimum", {"engine": {"maxBatchTokens": 0}}, ("spec.engine.maxBatchTokens", "0", "1")),
    (
        "bounds",
        {"autoscaling": {"minReplicas": 5, "maxReplicas": 2}},
        ("spec.autoscaling", "minReplicas: 5 exceeds maxReplicas 2", "lower minReplicas"),
    ),
    (
        "utilization",
        {"autoscaling": {"targetUtilization": "1.5"}},
        ("spec.autoscaling", "targetUtilization: 1.5", "at most 1"),
    ),
    (
        "devices-on-cpu",
        {"accelerator": {"count": 2}},
        ("spec.accelerator", "count: 2", "vendor is cpu"),
    ),
    (
        "product",
        {"accelerator": {"vendor": "amd", "products": ["MI999"]}},
        ("spec.accelerator.products", "MI999", "MI300X"),
    ),
    (
        "duration",
        {"rollout": {"drain": {"timeout": "5 minutes"}}},
        ("spec.rollout.drain.timeout", "5 minutes", "ms|s|m|h"),
    ),
    (
        "rollout-room",
        {"rollout": {"maxSurge": 0, "maxUnavailable": 0}},
        ("spec.rollout", "maxSurge: 0", "raise one of them"),
    ),
]


@pytest.mark.parametrize(("name", "spec", "named"), CASES, ids=[case[0] for case in CASES])
def test_invalid_spec_is_refused_by_name_value_and_rule(
    testbed: Testbed, namespace: str, name: str, spec: dict[str, Any], named: tuple[str, ...]
) -> None:
    obj = cpu_fleet(name, namespace, spec=spec)
    done = testbed.run("kubectl", "apply", "-f", "-", stdin=json.dumps(obj), check=False)
    assert done.returncode != 0
    for part in named:
        assert part in done.stderr
    assert testbed.get("infd", name, namespace) is None


def test_long_name_is_refused(testbed: Testbed, namespace: str) -> None:
    name = "a" * 49
    done = testbed.run(
        "kubectl", "apply", "-f", "-", stdin=json.dumps(cpu_fleet(name, namespace)), check=False
    )
    assert done.returncode != 0
    assert "49" in done.stderr
    assert "48" in done.stderr


def test_scheme_of_a_model_cannot_change(testbed: Testbed, namespace: str) -> None:
    obj = cpu_fleet("fixed", namespace, replicas=0)
    testbed.apply(obj)
    obj["spec"]["model"]["uri"] = "hf://Qwen/Qwen3-8B"
    done = testbed.run("kubectl", "apply", "-f", "-", stdin=json.dumps(obj), check=False)
    assert done.returncode != 0
    for part in ("spec.model", "hf://Qwen/Qwen3-8B", "scheme", "immutable"):
        assert part in done.stderr
