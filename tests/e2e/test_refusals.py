"""The API server refuses what cannot work, with field, value and rule in the message."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from fleets import cpu_fleet
from testbed import Json, Testbed

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


GOLDEN = Path(__file__).parent / "data" / "refusals.yaml"
OTHERS = ("long-name", "scheme-change")


def refusal(testbed: Testbed, obj: Json) -> str:
    """What kubectl says when the API server refuses an object."""
    done = testbed.run("kubectl", "apply", "-f", "-", stdin=json.dumps(obj), check=False)
    assert done.returncode != 0
    return done.stderr.strip()


def assert_golden(name: str, said: str) -> None:
    """The whole message as users see it; UPDATE_GOLDEN=1 writes it anew."""
    held = yaml.safe_load(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        held[name] = said
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(yaml.safe_dump(held, width=100, allow_unicode=True))
    assert said == held[name]


@pytest.mark.parametrize(("name", "spec", "named"), CASES, ids=[case[0] for case in CASES])
def test_invalid_spec_is_refused_by_name_value_and_rule(
    testbed: Testbed, namespace: str, name: str, spec: dict[str, Any], named: tuple[str, ...]
) -> None:
    said = refusal(testbed, cpu_fleet(name, namespace, spec=spec))
    for part in named:
        assert part in said
    assert_golden(name, said)
    assert testbed.get("infd", name, namespace) is None


def test_long_name_is_refused(testbed: Testbed, namespace: str) -> None:
    said = refusal(testbed, cpu_fleet("a" * 49, namespace))
    assert "49" in said
    assert "48" in said
    assert_golden("long-name", said)


def test_scheme_of_a_model_cannot_change(testbed: Testbed, namespace: str) -> None:
    obj = cpu_fleet("fixed", namespace, replicas=0)
    testbed.apply(obj)
    obj["spec"]["model"]["uri"] = "hf://Qwen/Qwen3-8B"
    said = refusal(testbed, obj)
    for part in ("spec.model", "hf://Qwen/Qwen3-8B", "scheme", "immutable"):
        assert part in said
    assert_golden("scheme-change", said)


def test_the_golden_file_holds_these_refusals_and_no_other() -> None:
    assert set(yaml.safe_load(GOLDEN.read_text())) == {case[0] for case in CASES} | {*OTHERS}
