"""What AMD's parts write on a Node: device ids in three forms, counts, health, taints."""

from dataclasses import replace
from typing import Any

import pytest

from tests.operator.builders import AMD_NODES as FIXTURES
from tests.operator.builders import node
from tilefleet_operator.accelerator import AcceleratorSpec
from tilefleet_operator.hardware import (
    NodeView,
    Taint,
    device_count,
    device_ids,
    is_candidate,
    is_sick,
    unhealthy,
    unhealthy_gpus,
    unusable,
)

ANY = AcceleratorSpec(vendor="amd", count=8)


@pytest.mark.parametrize(
    ("name", "ids", "count"),
    [
        ("spx8", ("74a1",), 8),
        ("vf1", ("74b5",), 1),
        ("betaonly", ("74a1",), 8),
        ("cpx64", ("74a1",), 8),
        ("hetero", ("74a1",), 8),
        ("twoids", ("740f", "74a1"), 8),
        ("sick", ("74a1",), 8),
    ],
)
def test_node_fixtures(name: str, ids: tuple[str, ...], count: int) -> None:
    assert set(FIXTURES) == {"spx8", "vf1", "betaonly", "cpx64", "hetero", "twoids", "sick"}
    assert is_candidate(node(name))
    assert (device_ids(node(name)), device_count(node(name))) == (ids, count)


def test_old_count_of_zero_is_ignored() -> None:
    labels = {"amd.com/gpu.device-id.74a1": "0", "amd.com/gpu.device-id.0x740F": "4"}
    view = NodeView("n", labels=labels, allocatable={"amd.com/gpu": 4})
    assert device_ids(view) == ("740f",)
    assert device_count(view) == 4
    assert device_count(NodeView("n")) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ready": False}, "not Ready"),
        ({"schedulable": False}, "cordoned"),
        ({"taints": (Taint("amd-dcm", "up", "NoExecute"),)}, "taint amd-dcm=up"),
        ({"taints": (Taint("dedicated", "", "NoSchedule"),)}, "taint dedicated"),
        ({"taints": (Taint("amd.com/gpu", "true", "NoSchedule"),)}, ""),
        ({"taints": (Taint("slow", "", "PreferNoSchedule"),)}, ""),
    ],
)
def test_what_keeps_the_scheduler_away(change: dict[str, Any], reason: str) -> None:
    assert unusable(replace(node("spx8"), **change), ANY) == reason


def test_node_selector_is_obeyed() -> None:
    wanted = AcceleratorSpec(vendor="amd", node_selector={"zone": "a"})
    assert unusable(NodeView("n", labels={"zone": "b"}), wanted) == "label zone is b, not a"
    assert unusable(NodeView("n"), wanted) == "label zone is absent, not a"
    assert unusable(NodeView("n", labels={"zone": "a"}), wanted) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conditions": {"AMDGPUXgmi": "True"}}, "condition AMDGPUXgmi"),
        ({"conditions": {"AMDGPUXgmi": "False"}}, ""),
        ({"labels": {"dcm.amd.com/gpu-config-profile-state": "failure"}}, "partitioning failure"),
        ({"labels": {"dcm.amd.com/gpu-config-profile-state": "success"}}, ""),
        ({"labels": {"amd.com/gpu.mode": "vf-passthrough"}}, "mode vf-passthrough"),
        ({"taints": (Taint("amd-dcm", "up", "NoExecute"),)}, "taint amd-dcm"),
        ({"taints": (Taint("amd-gpu-unhealthy", "X"),)}, "taint amd-gpu-unhealthy"),
        ({"taints": (Taint("amd.com/gpu"),)}, ""),
    ],
)
def test_what_no_scheduler_knows(change: dict[str, Any], reason: str) -> None:
    view = NodeView("n", **change)
    assert unhealthy(view) == reason
    assert is_sick(view) is bool(reason)


def test_extra_toleration_opens_a_tainted_node() -> None:
    tainted = replace(node("spx8"), taints=(Taint("team", "blue", "NoSchedule"),))
    for toleration, reason in [
        ({"key": "team", "operator": "Equal", "value": "blue"}, ""),
        ({"key": "team", "operator": "Equal", "value": "red"}, "taint team=blue"),
        ({"key": "team", "operator": "Exists", "effect": "NoExecute"}, "taint team=blue"),
        ({"operator": "Exists"}, ""),
    ]:
        spec = AcceleratorSpec.model_validate({"vendor": "amd", "tolerations": [toleration]})
        assert unusable(tainted, spec) == reason


def test_sick_node_is_recognised_with_and_without_its_taint() -> None:
    assert is_sick(node("sick"))
    assert is_sick(replace(node("sick"), taints=()))
    assert not is_sick(replace(node("sick"), taints=(), conditions={"Ready": "True"}))


def test_unhealthy_gpus_are_named_by_the_exporter() -> None:
    assert unhealthy_gpus(node("sick")) == ("3",)
    assert unhealthy_gpus(node("spx8")) == ()
